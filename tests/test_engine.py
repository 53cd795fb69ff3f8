"""engine.py: its answers against a plain loop over the full forward, and the sampler against
transformers' warpers. Models are tiny, random and fp32, so that answers differ wherever arithmetic
does."""

from pathlib import Path
from typing import Callable

import pytest
import torch
from sampling import Sampling, derive_seed, sample
from tiny import halve, make_prism, plain_log_p, plain_loop
from torch import Tensor
from transformers import generation

from engine import Engine, Output, Request, hidden_states, token_log_probabilities
from model import Transformer, load
from support.device import pad
from support.hub import InputError

GREEDY = Sampling(max_new_tokens=16, temperature=0.0)
DRAWN = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95)
STOP = set(range(0, 256, 11))  # about one token in eleven ends an answer: lengths come out mixed
PROMPT_LENGTHS = [3, 17, 8, 1, 30, 12, 5, 22, 9, 14]
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def prompts_of(lengths: list[int], seed: int = 3) -> list[list[int]]:
    """Prompts of random ids below 256, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def run(engine: Engine, requests: list[Request], on_token: Callable | None = None) -> list[Output]:
    """All outputs of an engine, one a request, in the order of the requests."""
    outputs = sorted(engine.run(requests, on_token), key=lambda out: out.index)
    assert [out.index for out in outputs] == list(range(len(requests)))
    return outputs


@pytest.fixture(scope="module")
def net(tiny_checkpoint: Callable[..., Path]) -> Transformer:
    """A tiny random model without a tokenizer."""
    return load(tiny_checkpoint("qwen2"))


# --------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize(("family", "fields", "slots", "sampling"), [
    ("qwen2", {}, 1, GREEDY), ("qwen2", {}, 3, GREEDY), ("qwen2", {}, 16, GREEDY),
    ("mistral", {"sliding_window": 8}, 3, GREEDY), ("qwen2", {}, 4, DRAWN)])
def test_answers_are_those_of_a_plain_loop(family: str, fields: dict, slots: int,
                                           sampling: Sampling, tiny_checkpoint: Callable) -> None:
    """Slots, refills, a window or other rows' draws would change an answer, its end or a count."""
    model, heard = load(tiny_checkpoint(family, **fields)), {}
    requests = [Request(p, seed=100 + i) for i, p in enumerate(prompts_of(PROMPT_LENGTHS))]
    engine = Engine(model, sampling, STOP, slots)
    outputs = run(engine, requests, lambda i, token: heard.setdefault(i, []).append(token))
    for request, out in zip(requests, outputs):
        wanted = plain_loop(model, request.ids, sampling, STOP, request.seed)
        assert out.ids == heard[out.index] == wanted
        assert out.stop == ("eos" if out.ids[-1] in STOP else "length")
        assert out.gate is None and out.routed is False
    assert engine.prompt_tokens == sum(PROMPT_LENGTHS)
    assert engine.new_tokens == sum(len(out.ids) for out in outputs)
    assert len({len(out.ids) for out in outputs}) > 3  # or nothing was refilled


def test_derived_seeds_keep_their_parts_apart() -> None:
    """Two rows would draw the same numbers, or a seed would not fit torch's generator."""
    several = [(0, 1), (1, 0), (0, 11), (1,), (0, "1", ""), ("01",)]
    seeds = {derive_seed(*parts) for parts in several}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a") == derive_seed(0, "a")


def test_shared_prefixes_are_read_once(net: Transformer) -> None:
    """A prefix would be read again for each request, change an answer, or mix with another."""
    long, short = prompts_of([40, 7], seed=9)
    tails = prompts_of([3, 9, 1, 14, 6], seed=10)
    requests = [Request(long + tail, prefix=40) for tail in tails]
    requests += [Request(short + tail, prefix=7) for tail in tails]
    requests.append(Request(tails[1]))
    engine = Engine(net, GREEDY, STOP, 4)
    found = [out.ids for out in run(engine, requests)]
    assert found == [plain_loop(net, r.ids, GREEDY, STOP) for r in requests]
    assert engine.prompt_tokens == 40 + 7 + sum(len(r.ids) - r.prefix for r in requests)


def test_answers_and_prompts_at_the_end_of_the_context(tiny_checkpoint: Callable) -> None:
    """A long prompt would not get the room that is left, or one without room not be named."""
    small = load(tiny_checkpoint("llama", max_position_embeddings=32))
    prompts = prompts_of([31, 29, 5])
    outputs = run(Engine(small, GREEDY, set(), 3), [Request(p) for p in prompts])
    assert [len(out.ids) for out in outputs] == [1, 3, 16]
    assert {out.stop for out in outputs} == {"length"}
    for prompt, out in zip(prompts, outputs):
        limit = Sampling(max_new_tokens=len(out.ids), temperature=0.0)
        assert out.ids == plain_loop(small, prompt, limit, set())
    for length in (0, 32, 33):
        wrong = [Request(p) for p in prompts_of([4, length])]
        with pytest.raises(InputError, match=f"prompt 1 has {length} tokens.*31"):
            next(Engine(small, GREEDY, set(), 2).run(wrong))


def test_a_run_that_was_left_does_not_stay(net: Transformer) -> None:
    """The first answer would wait for the last, or an engine go on with a run that was left."""
    engine, prompts = Engine(net, DRAWN, STOP, 4), prompts_of(PROMPT_LENGTHS)
    left = engine.run(list(map(Request, prompts)))
    assert next(left).stop
    left.close()
    assert engine.busy  # others hold their slots
    outputs = run(engine, list(map(Request, prompts[:2])))
    assert [out.ids for out in outputs] == [plain_loop(net, p, DRAWN, STOP) for p in prompts[:2]]


# --------------------------------------------------------------------------------------------------
# Routing


class WatchedEngine(Engine):
    """An Engine that checks its slots after everything it does, and the shapes of its steps."""

    mixed = False  # whether both routes were ever busy at once

    def _collect(self) -> list[Output]:
        self.check()
        finished = super()._collect()
        self.check()
        return finished

    def check(self) -> None:
        """Gated rows come first, and none twice."""
        rows = self.busy
        self.mixed |= 0 < self.k < len(rows)
        assert [row.routed for row in rows] == [True] * self.k + [False] * (len(rows) - self.k)
        assert len(rows) <= self.slots and len({row.index for row in rows}) == len(rows)

    def _advance(self, state: Tensor, uniform: Tensor, keys: int, k: int | None) -> Tensor:
        if self.static:
            assert len(state) in (1, 2, 4, 8, self.slots) and k is None
            assert keys % 8 == 0 or keys == self.cache.kv.shape[3]
        return super()._advance(state, uniform, keys, k)


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("gate", "slots", "order"), [
    ("auto", 3, "mixed"), ("auto", 10, "mixed"), ("auto", 4, "gated first"),
    ("auto", 4, "gated last"), ("on", 4, "mixed"), ("off", 4, "mixed")])
def test_every_row_is_answered_by_its_own_route(gate: str, slots: int, order: str, static: bool,
                                                sampling: Sampling, net: Transformer,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """A row would get the other route or another row's cache or draws, or a forced gate decide; or
    static steps, each a CUDA graph, have a shape for every number of busy slots and of tokens."""
    monkeypatch.setattr("engine.STATIC_KEYS", 8)
    prism = make_prism(net)
    prompts = prompts_of(PROMPT_LENGTHS if order == "mixed" else [8] * 12)
    gated = halve(prism, prompts).tolist()
    if order != "mixed":  # prompts of one length are read as they come: slots change their route
        ranked = sorted(zip(gated, prompts), reverse=order == "gated first")
        gated, prompts = map(list, zip(*ranked))
    assert 0 < sum(gated) < len(gated)
    engine = WatchedEngine(prism, sampling, STOP, slots, gate)
    engine.static = static
    # A request may name a prefix although a PRISM reads its prompts whole.
    outputs = run(engine, [Request(p, seed=i, prefix=1) for i, p in enumerate(prompts)])
    probability = prism.gate_probability(*pad(prompts, "cpu")).tolist()
    assert [out.gate for out in outputs] == pytest.approx(probability, abs=1e-5)
    routes = {"auto": gated, "on": [True] * len(gated), "off": [False] * len(gated)}[gate]
    assert [out.routed for out in outputs] == routes
    unlike = 0
    for i, (prompt, out) in enumerate(zip(prompts, outputs)):
        base, adapted = (plain_loop(lambda ids, k=k: prism(ids, k), prompt, sampling, STOP, i)
                         for k in (0, 1))
        assert out.ids == (adapted if out.routed else base)
        unlike += base != adapted
    assert unlike > len(prompts) / 2  # the adapter matters
    assert engine.mixed is (gate == "auto")


# --------------------------------------------------------------------------------------------------
# The sampler


def logits_of(rows: int = 1, seed: int = 0) -> Tensor:
    """Random logits [rows, 60], every row the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, 60, generator=generator) * 2).expand(rows, -1)


def wanted_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [V] by transformers' own warpers: temperature, then top-k, then top-p."""
    logits = generation.TemperatureLogitsWarper(sampling.temperature)(None, logits[:1])
    if sampling.top_k:
        logits = generation.TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = generation.TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits[0].softmax(-1)


SETTINGS = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.5, 0, 1.0), (1.0, 5, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.8),
    (1.3, 0, 0.3), (0.9, 10, 0.7), (1.0, 1000, 0.95), (1.0, 0, 1e-6)]]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampler_draws_the_wanted_distribution(sampling: Sampling) -> None:
    """Evenly spread uniforms would not give each token its probability in transformers."""
    n = 20_000
    logits = logits_of(n)
    wanted = wanted_distribution(logits, sampling)
    counts = sample(logits, sampling, (torch.arange(n) + 0.5) / n).bincount(minlength=60)
    assert (counts / n - wanted).abs().max() <= 2 / n
    assert counts[wanted == 0].sum() == 0


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_sampler_never_draws_the_impossible(sampling: Sampling) -> None:
    """A token of probability zero would be drawn: at the front, in the middle or at the end."""
    for uniform in (0.0, 1e-45, 0.5, BELOW_ONE, 1.0):
        for seed in range(20):
            logits = logits_of(1, seed=seed).clone()
            logits[0, [0, 1, 30, 58, 59]] = float("-inf")
            logits[0, [2, 31, 57]] = -1e4  # exp underflows to zero
            token = sample(logits, sampling, torch.tensor([uniform])).item()
            assert wanted_distribution(logits, sampling)[token] > 0
        only = torch.full((2, 60), float("-inf"))
        only[0, 0] = only[1, 59] = 3.0
        assert sample(only, sampling, torch.tensor([uniform] * 2)).tolist() == [0, 59]


def test_sampler_over_a_large_vocabulary() -> None:
    """At 150k tokens, where fp32 sums are coarse, a draw would miss its place or be impossible."""
    logits = torch.zeros(4, 152_000)
    logits[:, -1000:] = float("-inf")
    logits[:, :1000] = float("-inf")
    uniform = torch.tensor([0.0, 0.25, 0.75, BELOW_ONE])
    tokens = sample(logits, Sampling(temperature=1.0), uniform).tolist()
    assert tokens == pytest.approx([1000, 38_500, 113_500, 150_999], abs=150)
    assert min(tokens) >= 1000 and max(tokens) < 151_000


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-6, 1e-20, 1e-40, 1e-60])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    """Temperature 0, or one next to it, would not take the likeliest token."""
    logits = torch.cat([logits_of(3, seed=s) for s in range(8)])
    uniform = torch.tensor([0.0, 0.5, BELOW_ONE] * 8)
    for top_k, top_p in ((0, 1.0), (5, 0.9), (0, 0.5)):
        drawn = sample(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p), uniform)
        assert torch.equal(drawn, logits.argmax(-1))


# --------------------------------------------------------------------------------------------------
# Reading


@torch.no_grad()
def test_prefix_scoring_is_plain_scoring(net: Transformer) -> None:
    """Scores after a prefix that is read once would be others, or what was read be miscounted."""
    prompts = prompts_of([25, 9], seed=1) * 4
    targets = prompts_of([5, 8, 3, 11, 7, 4, 9, 6], seed=2)
    plain = [plain_log_p(net, prompt, target) for prompt, target in zip(prompts, targets)]
    found, read = token_log_probabilities(net, prompts, targets, [len(p) - 1 for p in prompts])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert read == 24 + 8 + sum(len(t) + 1 for t in targets)
    found, read = token_log_probabilities(net, prompts, targets)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert read == sum(map(len, prompts + targets))
    assert token_log_probabilities(net, [], []) == ([], 0)
    assert hidden_states(net, [], []) == ([], 0)
