"""generate.py: the engine against a plain loop over the full forward, the sampler, the command.

Models are tiny and random, so that answers differ wherever arithmetic does; all of it is fp32.
"""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import copy_folder, edit_json
from tiny import one_thread
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import generate as generate_module
from engine import Engine, Output, Request, Sampling, derive_seed, sample
from generate import Completion, explain, generate, main, router, show_explanation, stop_tokens
from lora import LoRA
from model import Transformer, load
from prism import PRISM, Router
from support.device import pad
from support.hub import InputError
from tokenizer import Tokenizer

GREEDY = Sampling(max_new_tokens=16, temperature=0.0)
STOP = set(range(0, 256, 11))  # about one token in eleven ends an answer: lengths come out mixed
PROMPT_LENGTHS = [3, 17, 8, 1, 30, 12, 5, 22, 9, 14]
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()


def random_prompts(lengths: list[int] = PROMPT_LENGTHS, seed: int = 3) -> list[list[int]]:
    """Prompts of random ids below 256, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def make_prism(net: Transformer, gate_pool: str = "last", seed: int = 5,
               gate_layer: int = 0) -> PRISM:
    """A PRISM whose adapter and gate are random, and strong enough to matter."""
    prism = PRISM(net, 4, 8, gate_layer, gate_pool, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in prism.adapter.modules():
            if isinstance(module, LoRA):
                for b in module.B:
                    b.normal_(0.0, 0.3, generator=generator)
    return prism


def halve(prism: PRISM, prompts: list[list[int]], masks: list[list[bool]] | None = None) -> Tensor:
    """Set the threshold so that about half of the prompts are gated; returns their flags [B]."""
    ids, lengths = pad(prompts, "cpu")
    mask = None if masks is None else pad(masks, "cpu")[0].bool()
    probability = prism.gate_probability(ids, lengths, mask)
    ordered = probability.sort().values
    prism.threshold = (ordered[len(ordered) // 2 - 1: len(ordered) // 2 + 1].mean()).item()
    return probability >= prism.threshold


@torch.no_grad()
def plain_loop(logits: Callable[[Tensor], Tensor], prompt: list[int], sampling: Sampling,
               stop: set[int], seed: int = 0) -> list[int]:
    """The answer to one prompt without engine, batch or cache: the whole text is read again for
    every token."""
    draws = torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed))
    answer: list[int] = []
    while len(answer) < sampling.max_new_tokens and not (answer and answer[-1] in stop):
        last = logits(torch.tensor([prompt + answer]))[:, -1]
        answer += sample(last, sampling, draws[len(answer):len(answer) + 1]).tolist()
    return answer


def run(engine: Engine, requests: list[Request]) -> list[Output]:
    """All outputs of an engine, in the order of the requests."""
    outputs = sorted(engine.run(requests), key=lambda out: out.index)
    assert [out.index for out in outputs] == list(range(len(requests)))
    return outputs


class WatchedEngine(Engine):
    """An Engine that checks, after everything it does, that its slots are in order."""

    def check(self) -> None:
        """Gated rows first, and every list speaks of the same dense slots."""
        self.seen = getattr(self, "seen", [])
        rows = [slot.out for slot in self.busy]
        self.seen.append((self.k, len(rows)))
        assert [row.routed for row in rows] == sorted((r.routed for r in rows),
                                                           reverse=True)
        assert self.k == sum(row.routed for row in rows)
        assert len(rows) <= self.slots
        assert len({row.index for row in rows}) == len(rows)

    def _admit(self, *args) -> None:
        super()._admit(*args)
        self.check()

    def _step(self) -> None:
        super()._step()
        self.check()
        assert self.tokens.tolist() == [slot.out.ids[-1] for slot in self.busy]
        assert self.start.tolist() == [slot.length for slot in self.busy]

    def _collect(self, *args) -> list[Output]:
        finished = super()._collect(*args)
        self.check()
        return finished


@pytest.fixture(scope="module")
def net(tiny_checkpoint: Callable[..., Path]) -> Transformer:
    """A tiny random model without a tokenizer."""
    return load(tiny_checkpoint("qwen2"))


@pytest.fixture(scope="module")
def chat_folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random model with the default model's tokenizer."""
    return tiny_checkpoint("llama", with_tokenizer=True)


@pytest.fixture(scope="module")
def chat_net(chat_folder: Path) -> Transformer:
    """The model of `chat_folder`."""
    return load(chat_folder)


@pytest.fixture
def adapter(chat_net: Transformer, tmp_path: Path) -> Path:
    """A random adapter for `chat_folder` on disk; the prompts PROMPT_TEXTS route mixed."""
    prism, tok = make_prism(chat_net), Tokenizer(chat_net.folder)
    halve(prism, [tok.render([{"role": "user", "content": text}]) for text in PROMPT_TEXTS])
    prism.save(tmp_path / "adapter")
    return tmp_path / "adapter"


PROMPT_TEXTS = ["Hi!", "What is 2 + 2? Explain every step, please.", "为什么天空是蓝色的？",
                "Write a poem about the sea and the wind that comes from it.", "1, 2, 3, ...", "😀"]


# --------------------------------------------------------------------------------------------------
# The engine


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_engine_equals_a_plain_loop(slots: int, net: Transformer) -> None:
    """DESIGN 6: ten prompts of mixed length through a few refilled slots: the greedy answers that
    each prompt gets alone, stop reasons included."""
    prompts = random_prompts()
    outputs = run(Engine(net, GREEDY, STOP, slots), [Request(p) for p in prompts])
    for prompt, out in zip(prompts, outputs):
        assert out.ids == plain_loop(net, prompt, GREEDY, STOP)
        assert out.stop == ("eos" if out.ids[-1] in STOP else "length")
        assert out.gate is None and out.routed is False
    assert {out.stop for out in outputs} == {"eos", "length"}  # both happen here
    assert len({len(out.ids) for out in outputs}) > 3


def test_engine_with_sliding_window(tiny_checkpoint: Callable[..., Path]) -> None:
    """The same for a model whose window is shorter than its prompts and answers."""
    windowed = load(tiny_checkpoint("mistral", sliding_window=8))
    prompts = random_prompts()
    outputs = run(Engine(windowed, GREEDY, STOP, 3), [Request(p) for p in prompts])
    assert [out.ids for out in outputs] == [plain_loop(windowed, p, GREEDY, STOP) for p in prompts]


def test_sampled_rows_do_not_depend_on_the_batch(net: Transformer) -> None:
    """DESIGN 7: a row's draws come from its own seed: sampled answers are the same alone, in
    company, in another order, and without the engine."""
    sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95)
    requests = [Request(p, seed=100 + i) for i, p in enumerate(random_prompts())]
    together = [out.ids for out in run(Engine(net, sampling, STOP, 4), requests)]
    backwards = [out.ids for out in run(Engine(net, sampling, STOP, 3), requests[::-1])][::-1]
    assert together == backwards
    for request, ids in zip(requests, together):
        assert run(Engine(net, sampling, STOP, 1), [request])[0].ids == ids
        assert plain_loop(net, request.ids, sampling, STOP, request.seed) == ids
    reseeded = [Request(r.ids, seed=r.seed + 1) for r in requests]
    others = [out.ids for out in run(Engine(net, sampling, STOP, 4), reseeded)]
    assert sum(a != b for a, b in zip(together, others)) >= 8  # the seed does decide
    same_prompt = [Request(requests[0].ids, seed=s) for s in range(8)]
    assert len({tuple(o.ids) for o in run(Engine(net, sampling, STOP, 8), same_prompt)}) >= 6


def test_derived_seeds_keep_their_parts_apart() -> None:
    """A seed depends on every part and on where one ends; it fits torch's generator."""
    several = [(0, 1), (1, 0), (0, 11), (1,), (0, "1", ""), ("01",)]
    seeds = {derive_seed(*parts) for parts in several}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a") == derive_seed(0, "a")


def test_shared_prefixes_are_read_once(net: Transformer) -> None:
    """DESIGN 6: requests that share a prefix get the same greedy answers as without sharing, and
    the prefix is read once; two prefixes and a prompt without one may mix."""
    long, short = random_prompts([40, 7], seed=9)
    tails = random_prompts([3, 9, 1, 14, 6], seed=10)
    shared = [Request(long + t, prefix=40) for t in tails] + [
        Request(short + t, prefix=7) for t in tails] + [Request(tails[1])]
    plain = [Request(r.ids) for r in shared]
    with_prefix, without = Engine(net, GREEDY, STOP, 4), Engine(net, GREEDY, STOP, 4)
    a, b = run(with_prefix, shared), run(without, plain)
    assert [out.ids for out in a] == [out.ids for out in b]
    assert [out.ids for out in b] == [plain_loop(net, r.ids, GREEDY, STOP) for r in plain]
    assert without.prompt_tokens == sum(len(r.ids) for r in plain)
    assert with_prefix.prompt_tokens == 40 + 7 + sum(len(r.ids) - r.prefix for r in shared)
    assert with_prefix.new_tokens == sum(len(out.ids) for out in a)


def test_on_token_reports_every_token_once(net: Transformer) -> None:
    """generate's on_token: called with the tokens as they appear, each of them once, refills
    included."""
    heard: dict[int, list[int]] = {}
    requests = [Request(p) for p in random_prompts()]
    engine = Engine(net, GREEDY, STOP, 3)
    outputs = list(engine.run(requests, lambda i, token: heard.setdefault(i, []).append(token)))
    assert heard == {out.index: out.ids for out in outputs}


def test_output_is_yielded_as_soon_as_it_is_finished(net: Transformer) -> None:
    """Continuous batching: the first answer is there while others are still being written."""
    engine = Engine(net, GREEDY, STOP, 3)
    first = next(engine.run([Request(p) for p in random_prompts()]))
    assert first.stop and engine.busy  # others hold their slots


def test_answer_ends_with_the_context(tiny_checkpoint: Callable[..., Path]) -> None:
    """A prompt that nearly fills the context gets what is left, and stops by length."""
    small = load(tiny_checkpoint("llama", max_position_embeddings=32))
    prompts = random_prompts([31, 29, 5])
    outputs = run(Engine(small, GREEDY, set(), 3), [Request(p) for p in prompts])
    assert [len(out.ids) for out in outputs] == [1, 3, 16]
    assert {out.stop for out in outputs} == {"length"}
    for prompt, out in zip(prompts, outputs):
        limit = Sampling(max_new_tokens=len(out.ids), temperature=0.0)
        assert out.ids == plain_loop(small, prompt, limit, set())


@pytest.mark.parametrize("length", [0, 32, 33])
def test_prompt_that_does_not_fit_is_an_input_error(length: int,
                                                    tiny_checkpoint: Callable[..., Path]) -> None:
    """Issue: a prompt longer than the context (or with no token) is an error that says so, before
    anything is answered."""
    small = load(tiny_checkpoint("llama", max_position_embeddings=32))
    prompts = random_prompts([4]) + random_prompts([length])
    with pytest.raises(InputError, match=f"prompt 1 has {length} tokens.*31"):
        list(Engine(small, GREEDY, set(), 2).run([Request(p) for p in prompts]))


# --------------------------------------------------------------------------------------------------
# Routing


@pytest.mark.parametrize("slots", [2, 3, 5, 10])
def test_mixed_routes_equal_forced_routes(slots: int, net: Transformer) -> None:
    """DESIGN 1, 3, 6: in a mixed batch with refills, un-gated rows answer as the base model and
    gated rows as with the gate forced on; rows stay ordered gated-first after every step."""
    prism, prompts = make_prism(net), random_prompts(PROMPT_LENGTHS * 2)
    gated = halve(prism, prompts).tolist()
    assert sum(gated) == 10
    requests = [Request(p) for p in prompts]
    engine = WatchedEngine(prism, GREEDY, STOP, slots)
    mixed = run(engine, requests)
    assert any(0 < k < n for k, n in engine.seen) and engine.k == 0
    base = run(Engine(net, GREEDY, STOP, slots), requests)
    forced = run(WatchedEngine(prism, GREEDY, STOP, slots, "on"), requests)
    assert sum(a.ids != b.ids for a, b in zip(base, forced)) >= 15  # the adapter matters
    for i, out in enumerate(mixed):
        assert out.routed is gated[i]
        assert out.ids == (forced if gated[i] else base)[i].ids
    probability = prism.gate_probability(*pad(prompts, "cpu")).tolist()
    assert [out.gate for out in mixed] == pytest.approx(probability, abs=1e-5)


def test_routed_answers_equal_a_plain_loop(net: Transformer) -> None:
    """The gated answers are those of PRISM's own forward with k = 1, the others' with k = 0."""
    prism, prompts = make_prism(net), random_prompts()
    gated = halve(prism, prompts).tolist()
    outputs = run(Engine(prism, GREEDY, STOP, 3), [Request(p) for p in prompts])
    for prompt, out, on in zip(prompts, outputs, gated):
        assert out.ids == plain_loop(lambda ids, k=int(on): prism(ids, k), prompt, GREEDY, STOP)


def test_gate_off_is_the_base_model(net: Transformer) -> None:
    """gate="off" answers as the bare Transformer, and still reports the probability."""
    prism, requests = make_prism(net), [Request(p) for p in random_prompts()]
    off = run(Engine(prism, GREEDY, STOP, 4, "off"), requests)
    base = run(Engine(net, GREEDY, STOP, 4), requests)
    assert [out.ids for out in off] == [out.ids for out in base]
    assert all(0 < out.gate < 1 and not out.routed for out in off)


@pytest.mark.parametrize("edge", ["first", "last"])
def test_slots_of_one_route_then_the_other(edge: str, net: Transformer) -> None:
    """All gated prompts are shorter (or longer) than the others, so slots change their route as
    the queue, sorted by length, is worked off."""
    prism, prompts = make_prism(net), random_prompts([4] * 12)
    gated = halve(prism, prompts).tolist()
    filler = random_prompts([20], seed=11)[0]  # at the front: the gate reads the last token's state
    longer = edge == "last"
    prompts = [filler + p if on is longer else p for p, on in zip(prompts, gated)]
    gated = halve(prism, prompts).tolist()
    engine = WatchedEngine(prism, GREEDY, STOP, 4)
    outputs = run(engine, [Request(p) for p in prompts])
    for prompt, out, on in zip(prompts, outputs, gated):
        assert out.routed is on
        assert out.ids == plain_loop(lambda ids, k=int(on): prism(ids, k), prompt, GREEDY, STOP)
    assert 0 < sum(gated) < 12


def test_prefix_with_a_gate_changes_nothing(net: Transformer) -> None:
    """A request may name a shared prefix although a PRISM reads its prompts whole."""
    prism, prompts = make_prism(net), random_prompts()
    halve(prism, prompts)
    plain = run(Engine(prism, GREEDY, STOP, 3), [Request(p) for p in prompts])
    hinted = run(Engine(prism, GREEDY, STOP, 3), [Request(p, prefix=1) for p in prompts])
    assert [(o.ids, o.routed) for o in plain] == [(o.ids, o.routed) for o in hinted]


# --------------------------------------------------------------------------------------------------
# The sampler


def logits_of(rows: int = 1, vocabulary: int = 60, seed: int = 0) -> Tensor:
    """Random logits [rows, vocabulary], every row the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, vocabulary, generator=generator) * 2).expand(rows, -1)


def wanted_distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [V] by transformers' own warpers: temperature, then top-k, then top-p."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(None, logits[:1].clone())[0].softmax(-1)


SETTINGS = [Sampling(temperature=t, top_k=k, top_p=p) for t, k, p in [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.5, 0, 1.0), (1.0, 5, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.8),
    (1.3, 0, 0.3), (0.9, 10, 0.7), (1.0, 1000, 0.95), (1.0, 0, 1e-6)]]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}")
def test_sampler_draws_the_wanted_distribution(sampling: Sampling) -> None:
    """Evenly spread uniforms give each token its probability (transformers' warpers) up to one
    draw, and none outside top-k / top-p; random uniforms pass a chi-square test."""
    n = 20_000
    logits = logits_of(n)
    wanted = wanted_distribution(logits, sampling)
    even = (torch.arange(n) + 0.5) / n
    counts = sample(logits, sampling, even).bincount(minlength=60)
    assert (counts / n - wanted).abs().max() <= 2 / n
    assert counts[wanted == 0].sum() == 0

    drawn = torch.rand(n, generator=torch.Generator().manual_seed(1))
    counts = sample(logits, sampling, drawn).bincount(minlength=60).double()
    kept = wanted > 5 / n
    expected = wanted[kept].double() * n
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum().item()
    freedom = max(int(kept.sum()) - 1, 0)
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5 + 2  # five deviations


@pytest.mark.parametrize("uniform", [0.0, 1e-45, 0.5, BELOW_ONE, 1.0])
@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}")
def test_sampler_never_draws_the_impossible(sampling: Sampling, uniform: float) -> None:
    """Whatever the uniform number, at its very ends, too: never a token of probability zero, where
    -inf and underflowing logits stand at the front, in the middle and at the end."""
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
    """The same at 150k tokens, where fp32 sums are coarse: both ends of the line and the middle."""
    logits = torch.zeros(4, 152_000)
    logits[:, -1000:] = float("-inf")
    logits[:, :1000] = float("-inf")
    uniform = torch.tensor([0.0, 0.25, 0.75, BELOW_ONE])
    tokens = sample(logits, Sampling(temperature=1.0), uniform).tolist()
    assert tokens == pytest.approx([1000, 38_500, 113_500, 150_999], abs=150)
    assert min(tokens) >= 1000 and max(tokens) < 151_000


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-6, 1e-20, 1e-40, 1e-60])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    """Temperature 0 is greedy, and so is any that is next to it."""
    logits = torch.cat([logits_of(3, seed=s) for s in range(8)])
    uniform = torch.tensor([0.0, 0.5, BELOW_ONE] * 8)
    for top_k, top_p in ((0, 1.0), (5, 0.9), (0, 0.5)):
        drawn = sample(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p), uniform)
        assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("fields", [
    {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")},
    {"top_k": -1}], ids=str)
def test_sampling_settings_are_checked(fields: dict) -> None:
    """Settings that mean nothing are InputErrors that name the setting."""
    with pytest.raises(InputError, match=next(iter(fields))):
        Sampling(**fields)


# --------------------------------------------------------------------------------------------------
# generate()


def asked(text: str) -> list[dict]:
    """A conversation of one user message."""
    return [{"role": "user", "content": text}]


def test_stop_tokens_are_the_union(chat_folder: Path, tmp_path: Path) -> None:
    """Issue: stop at every end-of-turn id the checkpoint names: generation_config.json,
    config.json, and the template's."""
    folder = copy_folder(chat_folder, tmp_path / "c")

    def stops(config: object, generation: object) -> set[int]:
        edit_json(folder / "config.json", lambda c: c.update(eos_token_id=config))
        edit_json(folder / "generation_config.json", lambda c: c.update(eos_token_id=generation))
        return stop_tokens(load(folder), Tokenizer(folder))

    assert stops([9, 8], [5, 7]) == {2, 5, 7, 8, 9}  # 2 is <|im_end|>, which the template writes
    assert stops(9, 5) == {2, 5, 9}
    assert stops(None, None) == {2}
    (folder / "generation_config.json").unlink()
    assert stop_tokens(load(folder), Tokenizer(folder)) == {2}


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_generate_stops_where_the_checkpoint_says(where: str, chat_folder: Path,
                                                  tmp_path: Path) -> None:
    """The token that ends the answer is among the ids but not in the text, and stop is "eos"."""
    folder = copy_folder(chat_folder, tmp_path / "c")
    free = generate(load(folder), Tokenizer(folder), [asked("Hi!")], GREEDY)[0]
    assert (free.stop, len(free.ids)) == ("length", 16)
    at = next(i for i in range(3, 16) if free.ids[i] not in free.ids[:i])
    edit_json(folder / where, lambda config: config.update(eos_token_id=[free.ids[at], 2]))
    tok = Tokenizer(folder)
    stopped = generate(load(folder), tok, [asked("Hi!")], GREEDY)[0]
    assert stopped.stop == "eos" and stopped.ids == free.ids[:at + 1]
    assert stopped.text == tok.decode(free.ids[:at])
    assert free.text == tok.decode(free.ids)


def test_generate_answers_in_input_order(chat_net: Transformer) -> None:
    """INTERFACE: a list of Completion(text, ids, gate, routed, stop), in input order, whatever the
    batch size; a bare Transformer has no gate."""
    tok = Tokenizer(chat_net.folder)
    talks = [asked(text) for text in PROMPT_TEXTS]
    found = generate(chat_net, tok, talks, GREEDY, batch_size=2)
    stop = stop_tokens(chat_net, tok)
    assert len(found) == len(talks) and all(isinstance(c, Completion) for c in found)
    for talk, completion in zip(talks, found):
        prompt = tok.render(talk)
        assert completion.ids == plain_loop(chat_net, prompt, GREEDY, stop)
        assert completion.prompt_tokens == len(prompt)
        assert completion.gate is None and completion.routed is False
    assert generate(chat_net, tok, talks, GREEDY, batch_size=16) == found
    assert generate(chat_net, tok, [], GREEDY) == []


def test_generate_draws_by_seed_and_index(chat_net: Transformer) -> None:
    """Per-row seeds: an answer depends on the run's seed and its own index, not on the others."""
    tok = Tokenizer(chat_net.folder)
    talks = [asked(text) for text in PROMPT_TEXTS]
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=4)
    found = [c.ids for c in generate(chat_net, tok, talks, sampling, batch_size=3)]
    assert found[:2] == [c.ids for c in generate(chat_net, tok, talks[:2], sampling, batch_size=1)]
    swapped = talks[:1] + talks[:0:-1]
    assert generate(chat_net, tok, swapped, sampling)[0].ids == found[0]
    stop = stop_tokens(chat_net, tok)
    assert found[3] == plain_loop(chat_net, tok.render(talks[3]), sampling, stop, derive_seed(4, 3))
    other = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
    assert all(a != c.ids for a, c in zip(found, generate(chat_net, tok, talks, other)))


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_generate_routes_by_the_gate(pool: str, chat_net: Transformer) -> None:
    """generate routes each conversation by gate_probability of its own prompt, for both ways of
    pooling, in padded batches with refills."""
    tok, prism = Tokenizer(chat_net.folder), make_prism(chat_net, pool)
    talks = [asked(text) for text in PROMPT_TEXTS]
    rendered = [tok.render(talk, return_user_mask=True) for talk in talks]
    gated = halve(prism, [ids for ids, _ in rendered],
                  [mask for _, mask in rendered] if pool == "mean" else None).tolist()
    assert sum(gated) == 3
    auto = generate(prism, tok, talks, GREEDY, batch_size=4)
    on, off = (generate(prism, tok, talks, GREEDY, gate=g, batch_size=4) for g in ("on", "off"))
    assert [c.routed for c in auto] == gated
    assert all(c.routed for c in on) and not any(c.routed for c in off)
    for i, completion in enumerate(auto):
        assert completion.ids == (on if gated[i] else off)[i].ids
        assert on[i].ids != off[i].ids
        assert (completion.gate >= prism.threshold) is gated[i]


# --------------------------------------------------------------------------------------------------
# The command


def command(*arguments: object, tokens: int = 6) -> int:
    """Run `python generate.py ...` in this process: greedy, fp32, few tokens."""
    return main([*map(str, arguments), "--dtype", "float32", "--temperature", "0",
                 "--max-new-tokens", str(tokens), "--device", "cpu"])


def refused(capsys: pytest.CaptureFixture, status: int) -> str:
    """The one line on stderr of a refused command; nothing was printed to stdout."""
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "", captured
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


def test_jsonl_rows_are_the_interface(chat_folder: Path, chat_net: Transformer, adapter: Path,
                                      tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """INTERFACE: --jsonl rows in input order (--prompt, then the file) with exactly these fields;
    --adapter alone names its base."""
    talk = [{"role": "system", "content": "Be brief."}, *asked(PROMPT_TEXTS[4])]
    rows = [{"prompt": PROMPT_TEXTS[2]}, {"prompt": PROMPT_TEXTS[3]}, {"messages": talk}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    status = command("--adapter", adapter, "--prompt", PROMPT_TEXTS[0], "--prompt", PROMPT_TEXTS[1],
                     "--prompts", path, "--jsonl", "--batch-size", 2)
    captured = capsys.readouterr()
    assert status == 0 and captured.err == ""
    found = [json.loads(line) for line in captured.out.splitlines()]
    tok, prism = Tokenizer(chat_folder), PRISM.load(adapter, chat_net)
    talks = [asked(text) for text in PROMPT_TEXTS[:4]] + [talk]
    wanted = generate(prism, tok, talks, Sampling(6, 0.0))
    for i, (row, completion) in enumerate(zip(found, wanted, strict=True)):
        assert list(row) == ["index", "text", "gate", "routed", "prompt_tokens", "tokens", "stop"]
        assert row["index"] == i and row["text"] == completion.text
        assert row["gate"] == pytest.approx(completion.gate, abs=1e-5)
        assert row["routed"] is completion.routed
        assert row["prompt_tokens"] == len(tok.render(talks[i]))
        assert row["tokens"] == len(completion.ids) and row["stop"] in ("eos", "length")
    assert {row["routed"] for row in found} == {True, False}


PROMPTS, KEPT = 2000, 2**12  # prompts under load; KiB that the answers may take, see below


@pytest.mark.slow
def test_two_thousand_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture) -> None:
    """Issue: all answered once, in input order, by both routes, as each would be alone; resident
    memory flat from the first quarter to the last.

    Flat but for the answers, which are kept until they are printed: 0.8 KiB each, at most 1.2 MiB
    between the medians of the two quarters. KEPT is three times that; one forgotten cache row a
    prompt (some 20 KiB) would make it 30 MiB.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to read the resident memory from")
    answered, memory, full = [], [], []

    class Metered(Engine):
        def _collect(self) -> list[Output]:
            full.append(0 < self.k < len(self.busy) == self.slots)
            finished = super()._collect()
            answered.extend(out.index for out in finished)
            resident = int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1])
            memory.extend([resident] * len(finished))
            return finished

    net, tok, path = load(folder), Tokenizer(folder), tmp_path / "prompts.jsonl"
    draw = random.Random(0)
    texts = [" ".join(draw.choices(" ".join(PROMPT_TEXTS).split(), k=int(2**draw.uniform(0, 7))))
             for _ in range(PROMPTS)]  # 1 to 127 words, short ones more often
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    prism = make_prism(net)
    halve(prism, [tok.render(asked(text)) for text in texts[:200]])
    prism.save(tmp_path / "adapter")
    monkeypatch.setattr("generate.Engine", Metered)
    with one_thread():
        assert command("--adapter", tmp_path / "adapter", "--prompts", path, "--jsonl",
                       "--batch-size", 16, tokens=24) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        monkeypatch.undo()
        some = list(range(0, PROMPTS, 50))
        alone = [generate(prism, tok, [asked(texts[i])], Sampling(24, 0.0))[0] for i in some]
    assert sorted(answered) == list(range(PROMPTS)) == [row["index"] for row in rows]
    assert answered != sorted(answered) and sum(full) > 500  # slots were refilled while both ran
    assert [row["prompt_tokens"] for row in rows] == [len(tok.render(asked(t))) for t in texts]
    routed = sum(row["routed"] for row in rows)
    assert 0.3 * PROMPTS < routed < 0.7 * PROMPTS
    assert {row["stop"] for row in rows} == {"eos", "length"}
    for i, answer in zip(some, alone):
        assert (rows[i]["text"], rows[i]["routed"], rows[i]["tokens"]) == (
            answer.text, answer.routed, len(answer.ids))
    quarter = PROMPTS // 4
    first, last = (sorted(part)[quarter // 2] for part in (memory[:quarter], memory[-quarter:]))
    with capsys.disabled():
        print(f"\n{PROMPTS} prompts, {routed} routed, {sum(full)} steps of mixed full slots; "
              f"resident {first} KiB in the first quarter, {last} KiB in the last")
    assert last - first < KEPT


def test_jsonl_gate_is_null_without_adapter(chat_folder: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    """INTERFACE: gate is null without an adapter."""
    assert command("--model", chat_folder, "--prompt", "Hi!", "--jsonl") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["gate"] is None and row["routed"] is False and row["tokens"] == 6


def test_gate_can_be_forced(adapter: Path, capsys: pytest.CaptureFixture) -> None:
    """--gate on and off force the route of every prompt, auto leaves it to the gate."""
    routes = {}
    for gate in ("on", "off", "auto"):
        prompts = [part for text in PROMPT_TEXTS for part in ("--prompt", text)]
        assert command("--adapter", adapter, "--gate", gate, "--jsonl", *prompts) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        routes[gate] = [(row["routed"], row["text"]) for row in rows]
    assert {routed for routed, _ in routes["on"]} == {True}
    assert {routed for routed, _ in routes["off"]} == {False}
    assert sum(routed for routed, _ in routes["auto"]) == 3
    for i, (routed, text) in enumerate(routes["auto"]):
        assert text == routes["on" if routed else "off"][i][1]


def test_plain_output_shows_the_route(chat_folder: Path, adapter: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    """Issue: generate.py answers and shows the route."""
    assert command("--adapter", adapter, "--gate", "on", "--prompt", "Hi!") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[gate 0.") and " -> adapter] " in shown
    assert command("--adapter", adapter, "--gate", "off", "--prompt", "Hi!") == 0
    assert " -> base] " in capsys.readouterr().out
    assert command("--model", chat_folder, "--prompt", "Hi!") == 0
    assert capsys.readouterr().out.startswith("[base] ")


def test_system_message_is_put_before_every_prompt(chat_folder: Path, chat_net: Transformer,
                                                   tmp_path: Path,
                                                   capsys: pytest.CaptureFixture) -> None:
    """--system TEXT: before every prompt that has no system message of its own."""
    path = tmp_path / "p.jsonl"
    own = [{"role": "system", "content": "You are a cat."}, *asked("Hi!")]
    path.write_text(json.dumps({"messages": own}) + "\n", encoding="utf-8")
    assert command("--model", chat_folder, "--system", "You are a dog.", "--prompt", "Hi!",
                   "--prompts", path, "--jsonl") == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    dog = [{"role": "system", "content": "You are a dog."}, *asked("Hi!")]
    wanted = generate(chat_net, Tokenizer(chat_folder), [dog, own, asked("Hi!")], Sampling(6, 0.0))
    assert texts == [wanted[0].text, wanted[1].text]
    assert len({completion.text for completion in wanted}) == 3


@pytest.mark.parametrize("line", ['{"prompt": "unfinished', '["prompt"]', '{"question": "x"}',
                                  '{"prompt": 5}', '{"messages": "hi"}', "nonsense", "5",
                                  '{"prompt": ' + "[" * 100_000],
                         ids=lambda line: line[:20])
def test_broken_prompts_line_is_named(line: str, chat_folder: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    """Issue: a prompts file with a broken line: one line on stderr with its number, status 2,
    nothing answered."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}\n', encoding="utf-8")
    error = refused(capsys, command("--model", chat_folder, "--prompts", path, "--jsonl"))
    assert "line 3" in error and "prompts.jsonl" in error


@pytest.mark.parametrize("system", [[], ["--system", "Be brief."]], ids=["", "system"])
@pytest.mark.parametrize("content", [
    b"", b"\n \n", b'{"prompt": "\xff"}\n', b'{"messages": []}', b'{"messages": ["hi"]}',
    b'{"messages": [{"role": "user"}]}', b'{"prompt": "half a pair \\ud800"}',
    b'{"messages": [{"role": "user", "content": 3}]}',
], ids=["empty", "blank", "latin-1", "no-message", "messages-of-text", "no-content", "surrogate",
        "number"])
def test_bad_prompts_file_is_refused(content: bytes, system: list[str], chat_folder: Path,
                                     tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Issue: whatever is wrong with a prompts file ends in one line and status 2."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    refused(capsys, command("--model", chat_folder, "--prompts", path, *system))


def test_prompts_file_that_is_not_there(chat_folder: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture) -> None:
    """A missing prompts file, or a folder in its place, is named."""
    for path in (tmp_path / "none.jsonl", tmp_path):
        status = command("--model", chat_folder, "--prompts", path)
        assert str(path) in refused(capsys, status)


def test_windows_line_ends_and_bom_are_fine(chat_folder: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    """Prompts files written elsewhere are read; U+2028 inside a prompt does not end its line."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a"}\r\n{"prompt": "b\u2028c"}\r\n'.encode())
    assert command("--model", chat_folder, "--prompts", path, "--jsonl") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_prompt_longer_than_the_context(tiny_checkpoint: Callable[..., Path],
                                        capsys: pytest.CaptureFixture) -> None:
    """Issue: a prompt longer than the context: one line, status 2, and no other prompt answered."""
    folder = tiny_checkpoint("llama", with_tokenizer=True, max_position_embeddings=64)
    status = command("--model", folder, "--prompt", "Hi!", "--prompt", "word " * 100)
    assert "64" in (error := refused(capsys, status)) or "63" in error


@pytest.mark.parametrize("name", ["./no/such/folder", "nobody-prism/no-such-model"])
def test_unknown_model_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    """Issue: unknown model: one line on stderr that names it, exit status 2."""
    monkeypatch.chdir(tmp_path)
    assert name in refused(capsys, command("--model", name, "--prompt", "x"))


@pytest.mark.parametrize("arguments, named", [
    (["--temperature", "-1"], "temperature"), (["--temperature", "nan"], "temperature"),
    (["--top-p", "0"], "top_p"), (["--top-k", "-2"], "top_k"),
    (["--max-new-tokens", "0"], "max_new_tokens"), (["--batch-size", "0"], "batch-size"),
    (["--dtype", "int8"], "int8"), (["--device", "nonsense"], "nonsense"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_settings_are_refused(arguments: list[str], named: str, chat_folder: Path,
                                  capsys: pytest.CaptureFixture) -> None:
    """House style: settings that mean nothing are one line and status 2."""
    status = main(["--model", str(chat_folder), "--prompt", "x", *arguments])
    assert named in refused(capsys, status)


def test_adapter_errors_are_one_line(chat_folder: Path, adapter: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture) -> None:
    """Issue: an adapter for another base (fingerprint), a missing folder, broken files."""
    other = copy_folder(chat_folder, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    ask = ["--prompt", "x"]
    error = refused(capsys, command("--model", other, "--adapter", adapter, *ask))
    assert "trained on" in error and str(other) in error
    assert "none" in refused(capsys, command("--adapter", tmp_path / "none", *ask))
    assert "prism.json" in refused(capsys, command("--adapter", chat_folder, *ask))
    for name in ("adapter_model.safetensors", "gate.safetensors", "prism.json"):
        damaged = copy_folder(adapter, tmp_path / f"damaged-{name}")
        (damaged / name).write_bytes((damaged / name).read_bytes()[:20])
        assert name in refused(capsys, command("--adapter", damaged, *ask))


class Recorder(io.StringIO):
    """A terminal that remembers what each write added."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        """Remember and pass on."""
        self.pieces.append(text)
        return super().write(text)


def talk_to(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object,
            tokens: int = 6) -> tuple[int, Recorder]:
    """Chat through the command with `typed` on stdin; its status and what it wrote to stdout."""
    out = Recorder()
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.setattr("sys.stdout", out)
    return command(*arguments, tokens=tokens), out


def test_chat_streams_and_routes_every_turn(chat_net: Transformer, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """INTERFACE, issue: without a prompt, a chat that streams and shows the route of every turn;
    each turn re-reads the whole conversation and is routed anew, here to the other side."""
    tok, prism, sampling = Tokenizer(chat_net.folder), make_prism(chat_net), Sampling(6, 0.0)

    def answer(talk: list[dict], gate: str) -> Completion:
        return generate(prism, tok, [talk], sampling, gate, 1)[0]

    def second(first: Completion) -> list[dict]:
        return [*asked("Hi!"), {"role": "assistant", "content": first.text}, *asked("And then?")]

    # A threshold between the two turns' probabilities, whichever side the first turn is on.
    for gates in (("on", "off"), ("off", "on")):
        one = answer(asked("Hi!"), gates[0])
        two = answer(second(one), gates[1])
        if (one.gate > two.gate) is (gates[0] == "on"):
            break
    else:
        pytest.fail("this random gate does not tell the two turns apart")
    prism.threshold = (one.gate + two.gate) / 2
    prism.save(tmp_path / "adapter")

    status, out = talk_to(monkeypatch, "Hi!\nAnd then?\n\n", "--adapter", tmp_path / "adapter")
    route = {"on": "adapter", "off": "base"}
    label = [f"[gate {c.gate:.2f} -> {route[g]}]" for c, g in zip((one, two), gates)]
    assert status == 0
    assert out.getvalue() == f"> {one.text}\n{label[0]}\n> {two.text}\n{label[1]}\n> "
    streamed = out.pieces[:next(i for i, p in enumerate(out.pieces) if label[0] in p)]
    assert len([piece for piece in streamed if piece.strip() and piece.strip() != ">"]) >= 4


def test_chat_without_adapter(chat_folder: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture) -> None:
    """The chat works for a base model, with a system message, and ends at the end of input."""
    status, out = talk_to(monkeypatch, "Hi!", "--model", chat_folder, "--system", "Be brief.")
    net, tok = load(chat_folder), Tokenizer(chat_folder)
    talk = [{"role": "system", "content": "Be brief."}, *asked("Hi!")]
    text = generate(net, tok, [talk], Sampling(6, 0.0))[0].text
    assert status == 0 and out.getvalue() == f"> {text}\n[base]\n> "
    assert "Ctrl-D" in capsys.readouterr().err


def test_interrupted_chat_is_status_130(chat_folder: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture) -> None:
    """INTERFACE: Ctrl-C is status 130 and no traceback."""
    class Interrupted(io.StringIO):
        def readline(self, *args: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert command("--model", chat_folder) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("tied", [True, False])
def test_router_decides_like_the_whole_model(pool: str, tied: bool, tmp_path: Path,
                                             tiny_checkpoint: Callable[..., Path]) -> None:
    """The same probabilities and routes from the first layers and the gate alone; neither the other
    layers nor a head are in memory; another base is refused."""
    net = load(tiny_checkpoint("qwen2", True, tie_word_embeddings=tied), dtype=torch.float32)
    tok, prism = Tokenizer(net.folder), make_prism(net, gate_layer=1, gate_pool=pool)
    talks = [[{"role": "user", "content": text}] for text in PROMPT_TEXTS]
    found = [c.gate for c in generate(prism, tok, talks, Sampling(1))]
    prism.threshold = sum(sorted(found)[2:4]) / 2
    prism.save(tmp_path / "adapter")
    route = router(tmp_path / "adapter", "cpu", "float32")
    assert [route(talk) for talk in talks] == [p >= prism.threshold for p in found]
    gate = Router.of_adapter(tmp_path / "adapter", dtype=torch.float32)
    assert len(gate.net.layers) == 2 and gate.net.lm_head is gate.net.embed_tokens
    settings = json.loads((tmp_path / "adapter/prism.json").read_text())
    (tmp_path / "adapter/prism.json").write_text(
        json.dumps(settings | {"base_fingerprint": "0" * 64}))
    with pytest.raises(InputError, match="weights differ"):
        router(tmp_path / "adapter", "cpu", "float32")


def test_explanation_is_the_kl_of_every_token(chat_folder: Path, chat_net: Transformer,
                                              adapter: Path, capsys: pytest.CaptureFixture) -> None:
    """Both forced answers, and KL(adapter || base) recomputed from full logits; the pieces of text
    make up the adapted answer."""
    prism, tok = PRISM.load(adapter, chat_net), Tokenizer(chat_folder)
    talk = [{"role": "user", "content": "Why is the sky blue?"}]
    sampling = Sampling(12, 0.7, seed=3)
    e = explain(prism, tok, talk, sampling)
    for answer, gate in ((e.base, "off"), (e.adapted, "on")):
        assert answer.ids == generate(prism, tok, [talk], sampling, gate)[0].ids
    prompt = tok.render(talk)
    ids = torch.tensor([[*prompt, *e.adapted.ids]])
    with torch.no_grad():
        p, q = (prism(ids, k)[0, len(prompt) - 1:-1].double().log_softmax(-1) for k in (1, 0))
    assert e.kl == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-6)
    assert max(e.kl) > 1e-3 and len(e.tokens) == len(e.kl)
    assert "".join(e.tokens).startswith(e.adapted.text)
    plain, shaded = (show_explanation(e, 0.5, colour) for colour in (False, True))
    assert "\x1b" not in plain and "\x1b[0m" in shaded and f"{max(e.kl):.2f} at" in plain
    argv = ["--adapter", str(adapter), "--prompt", talk[0]["content"], "--max-new-tokens", "12",
            "--seed", "3", "--dtype", "float32", "--device", "cpu", "--explain"]
    assert main([*argv, "--jsonl"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["base"], row["adapted"]) == (e.base.text, e.adapted.text)
    assert row["kl"] == pytest.approx(e.kl, abs=1e-5)
    assert main(["--model", str(chat_folder), "--prompt", "x", "--explain"]) == 2
    assert "--adapter" in capsys.readouterr().err


def test_explained_answers_are_others_than_the_plain_ones(adapter: Path,
                                                          capsys: pytest.CaptureFixture) -> None:
    """--explain would show answers that the same command without it does not give."""
    argv = ["--adapter", str(adapter), "--prompt", "Why?", "--prompt", "Why?", "--prompt", "Why?",
            "--max-new-tokens", "12", "--temperature", "1.5", "--seed", "3", "--batch-size", "1",
            "--dtype", "float32", "--device", "cpu", "--jsonl"]
    explained = {}
    assert main([*argv, "--explain"]) == 0
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        explained[row["index"]] = row
    for gate, side in (("off", "base"), ("on", "adapted")):
        assert main([*argv, "--gate", gate]) == 0
        plain = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
        assert plain == [explained[i][side] for i in range(3)]
        assert len(set(plain)) == 3  # one question, three positions


def test_turns_of_a_chat_draw_the_same_numbers(chat_net: Transformer,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn would begin with the same uniform numbers, whatever was said before."""
    real, drawn = generate_module.generate, []

    def noted(*args, **more) -> list[Completion]:
        requests = []
        monkeypatch.setattr(generate_module, "Request", lambda ids, seed, **rest: (
            requests.append(seed) or Request(ids, seed, **rest)))
        answers = real(*args, **more)
        drawn.extend(requests)
        return answers

    monkeypatch.setattr(generate_module, "generate", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\n"))
    tok = Tokenizer(chat_net.folder)
    assert generate_module.chat(chat_net, tok, Sampling(4, seed=7), "auto", None) == 0
    assert drawn == [derive_seed(7, turn) for turn in range(3)]
