"""train.py: the split, the gate, the distillation, and the whole command with its restarts."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Sequence

import peft
import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file
from test_hub import file_size_limit
from tiny import one_thread, randomize_adapter, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from bootstrap import (
    Candidate,
    Pair,
    Persona,
    Query,
    RunFolder,
    Verdict,
    chance_personas,
    won_pairs,
)
from generate import Sampling, generate
from support.hub import InputError, resolve
from lora import LoRA
from model import FAMILIES, Transformer, fingerprint, load
from prism import PRISM, distill_loss
from support.report import split_warnings
from tokenizer import Tokenizer
from train import (
    Sample,
    auc,
    checksum,
    choose_threshold,
    distill_samples,
    gate_features,
    gate_scores,
    held_out_kl,
    hold_out,
    learning_rate,
    micro_batches,
    out_of_fold,
    read_transfer_sets,
    roc,
    sample_loss,
    train_gate,
    train_lora,
)

Capture = pytest.CaptureFixture[str]
CHEMIST = Persona("chemist", "You are a careful chemist who explains each reaction step by step.")
PIRATE = Persona("pirate", "Answer as a pirate: short, loud and rude.")
ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json", "prism.json", "report.md"}
ALL_FILES = ADAPTER_FILES | {"run.json", "candidates.jsonl", "queries.jsonl", "answers.jsonl",
                             "verdicts.jsonl", "metrics.jsonl", "gate.safetensors"}


def settings(**changes: object) -> argparse.Namespace:
    """What train_lora reads from the command line."""
    return argparse.Namespace(**{"epochs": 2, "batch_size": 4, "lr": 1e-3, "kd_temperature": 1.0,
                                 "loss": "kl", "seed": 0} | changes)


def pairs_for(persona: Persona, n: int = 6, tokens: int = 8, vocab: int = 2000) -> list[Pair]:
    """Hand-made rows: n queries with random expert answers that end in the end of turn."""
    generator = torch.Generator().manual_seed(n)
    pairs = []
    for i in range(n):
        ids = [*torch.randint(20, vocab, (tokens + i,), generator=generator).tolist(), 2]
        pairs.append(Pair(persona.name, i, f"What about the thing number {i}?", "b", "e", [7, 2],
                          ids, "eos", "eos"))
    return pairs


# --------------------------------------------------------------------------------------------------
# The split, the scores, the schedule


def verdicts_of(targets: Sequence[int], persona: str = "p") -> list[Verdict]:
    """Verdict rows with these targets."""
    return [Verdict(persona, i, "expert" if t else "base", t, "letter", float(t),
                    ["expert" if t else "base"], []) for i, t in enumerate(targets)]


def test_hold_out_takes_a_fifth_of_each_class() -> None:
    """A fifth of the won and a fifth of the others, a function of names and seed only."""
    verdicts = verdicts_of([1] * 25 + [0] * 40)
    held = hold_out(verdicts, 0)
    target = {(v.persona, v.index): v.target for v in verdicts}
    assert sorted(target[key] for key in held) == [0] * 8 + [1] * 5
    assert hold_out(verdicts[::-1], 0) == held and hold_out(verdicts, 0) == held
    assert hold_out(verdicts, 1) != held


@pytest.mark.parametrize(("ones", "zeros", "expected"), [
    (2, 2, (1, 1)), (1, 9, (0, 2)), (1, 1, (0, 0)), (0, 10, (0, 2)), (3, 0, (1, 0)),
    (0, 0, (0, 0))])
def test_hold_out_of_small_classes(ones: int, zeros: int, expected: tuple[int, int]) -> None:
    """At least one of a class of two, none of a class of one: something is left to fit on."""
    verdicts = verdicts_of([1] * ones + [0] * zeros)
    held = hold_out(verdicts, 0)
    found = [verdicts[i].target for _, i in held]
    assert (found.count(1), found.count(0)) == expected


def test_gate_scores_by_hand() -> None:
    """Five queries worked out by hand, one tie between the classes, threshold inclusive."""
    scores = gate_scores([0.9, 0.4, 0.4, 0.2, 0.5], [1, 1, 0, 0, 0], [0.5] * 5)
    # positives 0.9 and 0.4 against 0.4, 0.2, 0.5: three wins; then a tie, a win and a loss
    assert scores["auc"] == pytest.approx((3 + 0.5 + 1 + 0) / 6)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["majority"] == pytest.approx(3 / 5) and scores["n"] == 5
    assert scores["confusion"] == {"true_open": 1, "false_open": 1, "true_closed": 2,
                                   "false_closed": 1}


def test_gate_scores_without_a_class() -> None:
    """One class only has no AUC, and no query at all no accuracy: None, not an invented number."""
    one = gate_scores([0.9, 0.1], [1, 1], [0.5, 0.5])
    assert one["auc"] is None and one["accuracy"] == 0.5 and one["majority"] == 1
    none = gate_scores([], [], [])
    assert (none["n"], none["auc"], none["accuracy"], none["majority"]) == (0, None, None, None)


def test_auc_interval_by_hand() -> None:
    """Hanley and McNeil's interval for 3 of 4 won pairs, its variance taken at 3.5 of 5; perfect
    scores of very few queries are not certainty."""
    area, low, high = auc([0.9, 0.4], [0.5, 0.1])
    a = 3.5 / 5
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + (q1 - a**2) + (q2 - a**2)) / 4
    assert area == 0.75
    assert low == pytest.approx(max(0.75 - 1.96 * variance**0.5, 0))
    assert high == min(0.75 + 1.96 * variance**0.5, 1.0)
    area, low, high = auc([0.6], [0.4])
    assert area == high == 1 and low < 0.5
    area, low, _ = auc([1.0] * 40, [0.0] * 40)
    assert area == 1 and low > 0.95
    assert auc([], [0.5]) == (None, None, None)


def test_roc_and_threshold() -> None:
    """The curve's corners, and the threshold halfway below the point farthest from the diagonal;
    classes that cannot be told apart leave it at one half."""
    probability, targets = [0.9, 0.8, 0.7, 0.3, 0.2, 0.1], [1, 1, 0, 1, 0, 0]
    assert roc(probability, targets) == [
        [0.9, 0, 1 / 3], [0.8, 0, 2 / 3], [0.7, 1 / 3, 2 / 3], [0.3, 1 / 3, 1],
        [0.2, 2 / 3, 1], [0.1, 1, 1]]
    high, low = [0.7 + i / 100 for i in range(20)], [0.1 + i / 100 for i in range(20)]
    assert choose_threshold(high + low, [1] * 20 + [0] * 20) == pytest.approx((0.7 + 0.29) / 2)
    assert choose_threshold(low + high, [1] * 20 + [0] * 20) == 0.5  # worse than chance
    assert choose_threshold(high, [1, 0] * 10) == 0.5  # no better than chance
    assert choose_threshold(high, [1] * 20) == choose_threshold([], []) == 0.5


def test_out_of_fold_never_saw_the_query(net: Transformer) -> None:
    """Labels that nothing can predict: a gate scored on what it was fitted on looks perfect, out
    of fold it is at chance; labels that can be predicted stay so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 32, generator=generator)
    noise = (torch.arange(120) % 2).float()
    with one_thread():
        prism = PRISM(net)
        train_gate(prism.gate, x, noise, seed=0)
        with torch.no_grad():
            seen = prism.gate(x).sigmoid().tolist()
        unseen, fold = out_of_fold(x, noise, 0)
        real, _ = out_of_fold(*planted(200, 80, 5.0, 0), 0)
    labels, half = noise.int().tolist(), [0.5] * 200
    assert gate_scores(seen, labels, half)["auc"] > 0.99
    low, high = gate_scores(unseen, labels, half)["auc_interval"]
    assert low < 0.5 < high
    assert gate_scores(real, [1] * 80 + [0] * 120, half)["accuracy"] > 0.9
    for label in (0, 1):  # both classes are dealt out evenly
        assert [sum(f == i and t == label for f, t in zip(fold, labels)) for i in range(5)] == (
            [12] * 5)


def votes_of(won: Sequence[str], persona: str = "p", first: int = 0) -> list[Verdict]:
    """Verdicts of one vote with these winners."""
    return [Verdict(persona, first + i, w, int(w == "expert"), "j", float(w == "expert"), [w], [])
            for i, w in enumerate(won)]


def test_chance_personas() -> None:
    """Against a control that the second answer won 24 of 48 times: 20 of 20 wins are an effect, 11
    of 20 are not, and 2 of 2 are too few to say."""
    judged = {"tests": [{"kinds": {"same prompt": {"pairs": 48, "wrong": 24}}}]}
    verdicts = [*votes_of(["expert"] * 20, "sure"),
                *votes_of(["expert"] * 11 + ["base"] * 9, "coin"),
                *votes_of(["expert"] * 2, "few"), *votes_of(["base"] * 20, "harmful")]
    assert chance_personas(verdicts, judged) == ["coin", "few", "harmful"]
    assert chance_personas(verdicts, {"tests": [{"kinds": {}}]}) == []


def test_split_warnings() -> None:
    """One warning each for an empty split, a lonely persona, and a judge of length."""
    pairs = pairs_for(PIRATE, 40)  # expert answers are longer than base answers
    fine = votes_of(["expert", "base"] * 10) + votes_of(["base", "expert"] * 10, "q", 20)
    assert split_warnings(fine, [pairs]) == []
    [found] = split_warnings(votes_of(["base"] * 39 + ["tie"]), [pairs])
    assert "0 of 40" in found
    found = split_warnings(votes_of(["expert"] * 20) + votes_of(["tie"] * 20, "q", 20), [pairs])
    assert len(found) == 2 and "p alone gives 20 of 20" in found[0] and "20 of 20" in found[1]


def test_won_pairs_are_those_that_won() -> None:
    """With several votes the distilled answer is the first that won, not the first."""
    rounds = [[Pair("p", i, "q", "b", f"{vote}", [], [], "eos", "eos") for i in range(3)]
              for vote in range(3)]
    votes = [["base", "expert", "expert"], ["expert"] * 3, ["base", "base", "expert"]]
    verdicts = [Verdict("p", i, "x", int(v.count("expert") > 1), "j", v.count("expert") / 3, v, [])
                for i, v in enumerate(votes)]
    assert [(p.index, p.expert) for p in won_pairs(rounds, verdicts)] == [(0, "1"), (1, "0")]


def test_learning_rate() -> None:
    """Linear warm-up over 5% of the steps to the peak, then linear to zero after the last step."""
    rates = [learning_rate(i, 100, 2.0) for i in range(101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == pytest.approx(2.0) and rates[99] == pytest.approx(2 / 95)
    assert rates[100] == 0
    falls = [a - b for a, b in zip(rates[5:], rates[6:])]
    assert falls == pytest.approx([2 / 95] * 95)
    assert learning_rate(0, 1, 2.0) == 2.0  # a single step is not wasted


def test_micro_batches() -> None:
    """Every sample once, no group above the token budget unless a single sample is."""
    samples = [Sample(f"p/{i}", [1] * n, 1, torch.zeros(0)) for i, n in enumerate(
        [7, 30, 7, 120, 12, 55, 1, 99, 30])]
    groups = micro_batches(samples, 100)
    assert sorted(s.name for g in groups for s in g) == sorted(s.name for s in samples)
    for group in groups:
        padded = len(group) * max(len(s.ids) for s in group)
        assert padded <= 100 or len(group) == 1
    assert len(groups) < len(samples)
    shuffled = micro_batches(samples[::-1], 100)
    assert [[s.name for s in g] for g in shuffled] == [[s.name for s in g] for g in groups]


# --------------------------------------------------------------------------------------------------
# Stage 4


def planted(n: int, positives: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes in 32 dimensions, `distance` deviations apart, in crooked units."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.arange(n) < positives).float()
    x = torch.randn(n, 32, generator=generator)
    x[:, 3] += distance * targets
    return x * torch.logspace(-3, 3, 32) + torch.linspace(-50, 50, 32), targets


def test_train_gate_separates_planted_classes(net: Transformer) -> None:
    """Classes four deviations apart in one of 32 badly scaled directions: > 95% on new draws."""
    prism = PRISM(net)
    with one_thread():
        train_gate(prism.gate, *planted(400, 200, 5.0, 0), seed=0)
    x, targets = planted(400, 200, 5.0, 1)
    with torch.no_grad():
        opened = prism.gate(x).sigmoid() >= 0.5
    assert float((opened == targets.bool()).float().mean()) > 0.95


def test_train_gate_balances_the_classes(net: Transformer) -> None:
    """One positive in twelve, classes that overlap: most positives still open the gate (without
    the balance 40% would, with it 72%)."""
    prism = PRISM(net)
    with one_thread():
        train_gate(prism.gate, *planted(3000, 250, 2.0, 0), seed=0)
    x, targets = planted(600, 300, 2.0, 1)
    with torch.no_grad():
        opened = prism.gate(x).sigmoid() >= 0.5
    recall, rejected = opened[targets == 1].float().mean(), (~opened)[targets == 0].float().mean()
    assert float(recall) > 0.6 and float(rejected) > 0.75


def test_train_gate_is_seeded(net: Transformer) -> None:
    """Same seed, same gate bit for bit; another seed, another gate."""
    gates = []
    for seed in (0, 0, 1):
        prism = PRISM(net)
        with one_thread():
            train_gate(prism.gate, *planted(60, 20, 2.0, 0), seed=seed)
        gates.append(prism.gate.mlp[0].weight.detach().clone())
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize("targets", [[1.0], [0.0, 0.0], [1.0, 0.0]])
def test_train_gate_on_very_few_queries(net: Transformer, targets: list[float]) -> None:
    """One query, or one class only: the gate stays finite (one row has no deviation)."""
    prism = PRISM(net)
    x = planted(len(targets), 0, 0.0, 0)[0]
    with one_thread():
        loss = train_gate(prism.gate, x, torch.tensor(targets), seed=0)
    with torch.no_grad():
        p = prism.gate(x).sigmoid()
    assert math.isfinite(loss) and bool(p.isfinite().all())
    assert all(bool(t.isfinite().all()) for t in prism.gate.state_dict().values())


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_gate_is_trained_on_bare_prompts(net: Transformer, tok: Tokenizer, pool: str) -> None:
    """h(x) in training is that of the prompt alone: the query rendered without a system message,
    generation prompt included, no answer after it."""
    prism = PRISM(net, gate_pool=pool)
    queries = ["Why does iron rust?", "Hello", "Name three rivers of this country, please."]
    found, tokens = gate_features(prism, tok, queries)
    assert tokens == sum(len(tok.render([{"role": "user", "content": q}])) for q in queries)
    for h, query in zip(found, queries, strict=True):
        ids, mask = tok.render([{"role": "user", "content": query}], add_generation_prompt=True,
                               return_user_mask=True)
        x = net.run(net.embed(torch.tensor([ids])), net.span((1, len(ids))), range(1))[0]
        expected = x[-1] if pool == "last" else x[torch.tensor(mask)].mean(0)
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Stage 5


def default_system(tok: Tokenizer) -> str:
    """The system text that the chat template adds when there is no system message."""
    text = tok.decode(tok.render([{"role": "user", "content": "x"}]), skip_special_tokens=False)
    return re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.DOTALL).group(1)


def lora_gradient(prism: PRISM, samples: Sequence[Sample]) -> float:
    """Largest entry of the gradient of the adapter's parameters for these samples."""
    prism.zero_grad()
    sample_loss(prism, samples, 1.0).backward()
    return max(float(p.grad.abs().max()) for p in prism.adapter.parameters())


def test_gradient_at_step_zero_comes_from_the_persona(net: Transformer, tok: Tokenizer) -> None:
    """With a persona the teacher differs from the fresh student and B gets a gradient; with a
    teacher that reads the student's own prompt there is nothing to learn."""
    prism = PRISM(net, rank=4)
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    assert lora_gradient(prism, samples) > 1e-2
    none = Persona("none", default_system(tok))  # what the template says to the student as well
    user = [{"role": "user", "content": "x"}]
    assert tok.render([{"role": "system", "content": none.text}, *user]) == tok.render(user)
    same = distill_samples(net, tok, [none], pairs_for(none), 1024)
    assert lora_gradient(prism, same) < 1e-5  # rounding of differently padded batches
    assert abs(float(sample_loss(prism, same, 1.0))) < 1e-4 < float(sample_loss(prism, samples, 1))


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sample_loss_is_the_formula(net: Transformer, tok: Tokenizer, temperature: float) -> None:
    """KL(P(.|c, x, y_<t) || P(.|x, y_<t)) summed over every answer token, the first and the end
    of turn included, computed here from the full logits of each sequence alone."""
    prism = PRISM(net, rank=4)  # B = 0: the student is the base model
    pairs = pairs_for(PIRATE, 4)
    samples = distill_samples(net, tok, [PIRATE], pairs, 1024)
    expected = 0.0
    for pair, sample in zip(pairs, samples, strict=True):
        user = {"role": "user", "content": pair.query}
        bare, answer = tok.render([user]), pair.expert_ids
        persona = tok.render([{"role": "system", "content": PIRATE.text}, user])
        assert sample.ids == [*bare, *answer] and sample.start == len(bare)
        assert sample.answer_tokens == len(answer) == len(sample.teacher) and answer[-1] == 2
        log_p, log_q = ((net(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1:-1]
                         / temperature).double().log_softmax(-1) for prompt in (persona, bare))
        expected += temperature**2 * float((log_p.exp() * (log_p - log_q)).sum())
    assert float(sample_loss(prism, samples, temperature)) == pytest.approx(expected, rel=1e-4)
    tokens = sum(len(p.expert_ids) for p in pairs)
    if temperature == 1:
        assert held_out_kl(prism, samples) == pytest.approx(expected / tokens, rel=1e-4)
    assert held_out_kl(prism, []) is None


def test_sft_loss_is_cross_entropy(net: Transformer, tok: Tokenizer,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over the answer tokens, value and gradient, with chunks of one token and of all; the
    teacher plays no part."""
    samples = distill_samples(net, tok, [PIRATE], pairs_for(PIRATE, 3), 1024)
    prism = randomize_adapter(PRISM(net, rank=4))
    expected = 0.0
    for s in samples:
        logits = prism(torch.tensor([s.ids]), 1)[0, s.start - 1:-1]
        expected = expected - logits.log_softmax(-1).gather(
            1, torch.tensor(s.ids[s.start:])[:, None]).sum()
    b = prism.adapter[1]["qkv_proj"].B[0]
    (gradient,) = torch.autograd.grad(expected, b)
    for chunk in (1, 2**20):
        monkeypatch.setattr("prism.KL_CHUNK_ELEMENTS", chunk * net.config.vocab_size)
        found = sample_loss(prism, samples, 1.0, loss="sft")
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, b)[0], gradient, rtol=1e-3, atol=1e-4)


def test_micro_batching_does_not_change_the_step(net: Transformer, tok: Tokenizer) -> None:
    """Summed loss and gradient are those of one batch, however it is split."""
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    prism, found = PRISM(net, rank=4), []
    for groups in ([samples], [[s] for s in samples], micro_batches(samples, 150)):
        prism.zero_grad()
        losses = [sample_loss(prism, group, 1.0) for group in groups]
        for loss in losses:
            loss.backward()
        found.append((sum(map(float, losses)), prism.adapter[1]["qkv_proj"].B[0].grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-4)


def test_recomputed_layers_give_the_same_gradients(net: Transformer, tok: Tokenizer,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient checkpointing loss and gradients are equal bit for bit, dropout masks
    included, and fewer bytes wait for the backward pass."""
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    found = []
    for above in (train.RECOMPUTE_ABOVE, -1):
        monkeypatch.setattr(train, "RECOMPUTE_ABOVE", above)
        prism, kept = randomize_adapter(PRISM(net, dropout=0.3)), {}

        def pack(t: Tensor, kept: dict = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with one_thread(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = sample_loss(prism, samples, 1.0, torch.Generator().manual_seed(3))
        with one_thread():
            loss.backward()
        found.append((loss.detach(), [p.grad for p in prism.adapter.parameters()],
                      sum(kept.values())))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[1][2] < 0.7 * found[0][2]


QWEN_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
           "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "torch_dtype": "bfloat16"}


def test_memory_plan_of_a_7b_model(tmp_path: Path, capsys: Capture) -> None:
    """From a config.json alone: weights and cache by hand, all five stages within 24 GB, not
    within 16; nothing is written."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    arguments = ["--dry-run", "--model", str(tmp_path / "config.json")]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    layer = 3584 * (3584 + 2 * 512) + 3584 + 2 * 512 + 3584**2 + 3 * 3584 * 18944 + 2 * 3584
    weights = 2 * (28 * layer + 2 * 152064 * 3584 + 3584)
    cache = 32 * (512 + 512) * 28 * 2 * 4 * 128 * 2
    assert f"| 1-2 answers | {weights / 2**30:.2f} | {cache / 2**30:.2f} |" in out
    assert "| 24 GB | yes |" in out and "| 80 GB | yes |" in out
    assert train.main([*arguments, "--gpu-memory", "16"]) == 0
    assert "| 16 GB | no |" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_plan_of_every_family(family: str, tiny_checkpoint: Callable[..., Path],
                                     capsys: Capture) -> None:
    """The plan counts what is loaded and trained, for each architecture; and capped scores, which
    no kernel computes again, are planned for."""
    folder = tiny_checkpoint(family)
    args = argparse.Namespace(gate_layer=1, rank=4, alpha=8.0)
    net = load(folder)
    counts = train.parameter_counts(net.config, args)
    assert counts == (sum(p.numel() for p in net.parameters()),
                      sum(p.numel() for p in PRISM(net, 4, 8.0, 1).adapter.parameters()))
    assert train.main(["--dry-run", "--model", str(folder)]) == 0
    assert "5 adapter" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_are_an_upper_bound(family: str, dtype: torch.dtype,
                                                tiny_checkpoint: Callable[..., Path],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd really keeps of a batch, weights left out, is what is planned for the adapted
    layers (below them nothing is kept), or up to a quarter less; a twentieth more for what all
    layers share: the last norm's input, rotary tables, masks. The layers below make up for that."""
    net = load(tiny_checkpoint(family), dtype=dtype)
    net.config.dtype = dtype  # as --dry-run sets it
    prism, rows, length = randomize_adapter(PRISM(net, rank=4, dropout=0.1)), 4, 64
    monkeypatch.setattr(train, "PLAN_ROW", length)
    held = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *prism.parameters()]}
    for lora in (m for m in prism.adapter.modules() if isinstance(m, LoRA)):
        held |= {cast.untyped_storage().data_ptr() for cast in lora.cast(dtype)}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used again
        return t

    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    with one_thread(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.hidden(ids, prism.adapter, rows, torch.Generator().manual_seed(0))
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in held)
    plan = train.activation_bytes(net.config, rows * length, 4)
    adapted = plan * sum(lora is not None for lora in prism.adapter) / len(net.layers)
    print(f"{family} {dtype}: {real / adapted:.3f} of the plan")
    assert 0.75 <= real / adapted <= 1.05 and real <= plan


def test_max_len_cuts_the_answer(net: Transformer, tok: Tokenizer) -> None:
    """The teacher's sequence, the longer one, fits in max_len; a sample without room is left out
    and the ids that remain are the answer's first."""
    pairs = pairs_for(CHEMIST, 5)
    teachers = [len(tok.render([{"role": "system", "content": CHEMIST.text},
                                {"role": "user", "content": p.query}])) for p in pairs]
    full = distill_samples(net, tok, [CHEMIST], pairs, max(teachers) + 100)
    assert [s.answer_tokens for s in full] == [len(p.expert_ids) for p in pairs]
    limit = max(teachers) + 3
    cut = distill_samples(net, tok, [CHEMIST], pairs, limit)
    for sample, pair, teacher in zip(cut, pairs, teachers, strict=True):
        assert sample.answer_tokens == min(limit - teacher, len(pair.expert_ids))
        assert sample.ids[sample.start:] == pair.expert_ids[:sample.answer_tokens]
    assert distill_samples(net, tok, [CHEMIST], pairs, min(teachers)) == []


def test_base_weights_are_bit_equal_after_training(folder: Path, tok: Tokenizer,
                                                   tmp_path: Path) -> None:
    """Stages 4 and 5 change the gate and the adapter, and not one bit of the base."""
    net = load(folder, dtype=torch.float32)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    prism = PRISM(net, rank=4)
    b = prism.adapter[2]["down_proj"].B[0]
    run = RunFolder(tmp_path)
    with one_thread():
        train_gate(prism.gate, gate_features(prism, tok, ["a b c", "d e", "f"])[0],
                   torch.tensor([1.0, 0.0, 0.0]), 0)
        samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
        first = held_out_kl(prism, samples)
        train_lora(run, prism, samples, settings(epochs=6, lr=5e-3))
        last = held_out_kl(prism, samples)
    run.close()
    assert float(b.abs().max()) > 0 and last < 0.9 * first
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    reread = load(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(reread[n], after[n]) for n in reread)


def test_masters_are_fp32_under_a_bf16_base(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    """Updates far below bf16's resolution of A accumulate: the paper's lr does not round away."""
    net = load(folder, dtype=torch.bfloat16)
    prism = PRISM(net, rank=4, dropout=0.0)
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    a = prism.adapter[1]["qkv_proj"].A
    before = a.detach().clone()
    run = RunFolder(tmp_path)
    with one_thread():
        train_lora(run, prism, samples, settings(lr=1e-5, epochs=3))
    run.close()
    assert all(p.dtype == torch.float32 for p in prism.adapter.parameters())
    moved = (a.detach() - before).abs()
    assert 0 < float(moved.max()) < 1e-4  # six steps of at most 1e-5 each
    assert float((moved > 0).float().mean()) > 0.9  # in bf16 almost every entry would stand still


def test_training_is_deterministic(net: Transformer, tok: Tokenizer, tmp_path: Path) -> None:
    """Same seed, same adapter bit for bit, dropout included; another seed, another adapter."""
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    found = []
    for i, seed in enumerate((0, 0, 1)):
        prism = PRISM(net, rank=4, dropout=0.3)
        run = RunFolder(tmp_path / str(i))
        with one_thread():
            train_lora(run, prism, samples, settings(seed=seed))
        run.close()
        found.append(prism.adapter[1]["o_proj"].B[0].detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_steps_are_adamw_on_the_mean_token_kl(net: Transformer, tok: Tokenizer,
                                              tmp_path: Path) -> None:
    """Three epochs of one batch, by hand: mean KL an answer token, gradient clipped to norm 1,
    AdamW with weight decay 0.01 at the scheduled rate."""
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST), 1024)
    mine, hand = PRISM(net, rank=4, dropout=0.0), PRISM(net, rank=4, dropout=0.0)
    run = RunFolder(tmp_path)
    with one_thread():
        train_lora(run, mine, samples, settings(epochs=3, batch_size=len(samples), lr=0.01))
        parameters = list(hand.adapter.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
        norms = []
        for step in range(3):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 3, 0.01)
            optimizer.zero_grad()
            (sample_loss(hand, samples, 1.0) / sum(s.answer_tokens for s in samples)).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
            optimizer.step()
    recorded = run.metrics()
    run.close()
    assert [m["gradient_norm"] for m in recorded] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1  # or clipping was not tested
    for a, b in zip(mine.adapter.parameters(), parameters):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_last_good_state_is_kept(what: str, net: Transformer, tok: Tokenizer, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss, or only a gradient, that stops being finite at step 3: named, the checkpoint of step
    2 and the rows up to step 2 stay, and without the fault the run goes on to the very weights of
    one that never had it: optimizer, schedule and random draws continue exactly."""
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST, 6), 1024)
    real, calls = train.sample_loss, []

    def faulty(*arguments: object) -> Tensor:
        loss = real(*arguments)
        calls.append(None)
        if len(calls) != 4:
            return loss
        if what == "loss":
            return loss * float("nan")
        return loss + (loss - loss.detach()).sqrt()  # finite, with an infinite gradient

    def trained(folder: Path) -> tuple[PRISM, list[dict]]:
        run, prism = RunFolder(folder), PRISM(net, rank=2, dropout=0.3)
        try:
            with one_thread():
                train_lora(run, prism, samples, settings(epochs=3))
            return prism, run.metrics()
        finally:
            run.close()

    whole, rows = trained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_loss", faulty)
        with pytest.raises(InputError, match=r"step 3: .*chemist/\d.*checkpoint is kept"):
            trained(tmp_path / "out")
    kept = (tmp_path / "out" / "checkpoint.safetensors").read_bytes()
    assert json.loads(kept[8:8 + int.from_bytes(kept[:8], "little")])["__metadata__"]["step"] == "2"
    assert [m["step"] for m in rows_of(tmp_path / "out", "metrics.jsonl")] == [0, 1, 2]
    again, found = trained(tmp_path / "out")
    for a, b in zip(again.adapter.parameters(), whole.adapter.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [(m["step"], m["loss"], m["lr"]) for m in found] == [
        (m["step"], m["loss"], m["lr"]) for m in rows]


@pytest.mark.parametrize(("damage", "reason"), [
    ("missing", "1.mean"), ("shape", "another shape"), ("NaN", "not finite"), ("step", "'step'"),
    ("negative step", "step -4"), ("empty", ""), ("cut", ""), ("nested", ""),
    ("flipped", "SHA-256"), ("other step", "SHA-256"), ("other type", "SHA-256"),
    ("no checksum", "sha256")])
def test_damaged_checkpoint_is_named(damage: str, reason: str, net: Transformer, tok: Tokenizer,
                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is not this run's is named; nothing is trained from half of it, nor from a
    single flipped bit."""
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST, 6), 1024)
    run, path = RunFolder(tmp_path), tmp_path / "checkpoint.safetensors"
    try:
        with one_thread():
            train_lora(run, PRISM(net, rank=2), samples, settings(epochs=3))
        written = path.read_bytes()
        tensors, step = load_file(path), 4
        if damage == "missing":
            tensors.pop("1.mean")
        elif damage == "shape":
            tensors["1.mean"] = tensors["1.mean"][:1].clone()
        elif damage == "NaN":
            tensors["1.square"][0, 0] = float("nan")
        elif damage == "negative step":
            step = -4
        about = {"step": str(step), "sha256": checksum(tensors, step)}  # right but below
        about.pop({"step": "step", "no checksum": "sha256"}.get(damage), None)
        save_file(tensors, path, about)
        data = path.read_bytes()
        path.write_bytes({
            "empty": b"", "cut": data[:-9],
            "nested": (99_999).to_bytes(8, "little") + b"[" * 99_999,
            "flipped": written[:-2] + bytes([written[-2] ^ 1]) + written[-1:],
            "other step": written.replace(b'"step":"4"', b'"step":"2"'),
            "other type": written.replace(b'"F32"', b'"I32"', 1)}.get(damage, data))
        with pytest.raises(InputError, match=rf"checkpoint\.safetensors.*{reason}.*delete it"):
            train_lora(run, PRISM(net, rank=2), samples, settings(epochs=3))
    finally:
        run.close()


def test_gate_that_reads_infinity_is_named(net: Transformer) -> None:
    """Stage 4 on states that overflowed: an error, not a gate of NaN."""
    x, targets = planted(20, 10, 1.0, 0)
    x[3, 3] = float("inf")
    with one_thread(), pytest.raises(InputError, match="stage 4, step 0"):
        train_gate(PRISM(net).gate, x, targets, seed=0)


def test_loss_that_is_not_finite_is_named(net: Transformer, tok: Tokenizer,
                                          tmp_path: Path) -> None:
    """A step with a NaN loss is an InputError that names step and sample; nothing is recorded."""
    samples = distill_samples(net, tok, [CHEMIST], pairs_for(CHEMIST, 1), 1024)
    samples[0].teacher[0, 0] = float("nan")
    run = RunFolder(tmp_path)
    try:
        with pytest.raises(InputError, match=r"step 0.*chemist/0"):
            train_lora(run, PRISM(net, rank=2), samples, settings())
        assert run.metrics() == [] and not list(tmp_path.glob("*.safetensors"))
    finally:
        run.close()


# --------------------------------------------------------------------------------------------------
# The command, on the tiny model


@pytest.fixture(scope="module")
def personas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short personas."""
    folder = tmp_path_factory.mktemp("personas")
    for persona in (CHEMIST, PIRATE):
        (folder / f"{persona.name}.txt").write_text(persona.text)
    return folder


@pytest.fixture(scope="module")
def command(folder: Path, personas: Path) -> list[str]:
    """Arguments of a run that takes seconds and has every stage in several chunks."""
    return ["--model", str(folder), "--personas", str(personas), "--queries", "25",
            "--max-new-tokens", "12", "--judge", "likelihood", "--epochs", "12", "--batch-size",
            "2", "--rank", "4", "--dtype", "float32", "--device", "cpu"]


def run_train(*argv: object) -> int:
    """train.main on one thread."""
    with one_thread():
        return train.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one uninterrupted run; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_train(*command, "--out", out) == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock, and the picture, which needs matplotlib."""
    return {p.name: p.read_bytes() for p in out.iterdir()
            if p.name not in (".lock", "report.png")}


def timeless(out: Path) -> dict[str, bytes]:
    """`contents` without what may differ between runs: seconds and peak memory."""
    files = contents(out)
    if "metrics.jsonl" in files:
        rows = [json.loads(line) for line in files["metrics.jsonl"].decode().splitlines()]
        files["metrics.jsonl"] = json.dumps(
            [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory")}
             for r in rows]).encode()
    if "report.md" in files:  # the bill's seconds, tokens per second and peak memory
        line = rb"(?m)^(\| [a-z]+ (?:\| \d+ ){4})\| [^|]+\| [^|]+(\| [^|]+)\|[^|]+"
        files["report.md"] = re.sub(line, rb"\1\2", files["report.md"])
    return files


def rows_of(out: Path, name: str) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in (out / name).read_text().split("\n")[:-1]]


def test_files_of_a_run(finished: Path, folder: Path) -> None:
    """Everything INTERFACE.md lists is there, nothing temporary is left, run.json records every
    setting with seed, versions and base."""
    assert contents(finished).keys() == ALL_FILES
    run = json.loads((finished / "run.json").read_text())
    expected = {"queries": 25, "max_new_tokens": 12, "judge": "likelihood", "epochs": 12,
                "batch_size": 2, "rank": 4, "alpha": 32.0, "lr": 2e-4, "seed": 0, "dropout": 0.05,
                "max_len": 1024, "kd_temperature": 1.0, "gate_layer": 0, "gate_pool": "mean",
                "gate_threshold": None, "votes": 1, "judge_model": None, "drop_chance": False,
                "slots": 32, "model": str(folder), "personas": ["chemist", "pirate"],
                "dtype": "float32",
                "device": "cpu", "base_source": "folder", "base_fingerprint": fingerprint(folder)}
    assert {n: run["settings"][n] for n in expected} == expected
    assert run["versions"]["torch"] == torch.__version__


def test_rows_of_a_run(finished: Path) -> None:
    """One row a query in each stage file, in the same order; targets are the wins."""
    queries, answers, verdicts = (rows_of(finished, f"{name}.jsonl")
                                  for name in ("queries", "answers", "verdicts"))
    keys = [[(r["persona"], r["index"]) for r in rows] for rows in (queries, answers, verdicts)]
    assert keys[0] == keys[1] == keys[2] == [(p, i) for p in ("chemist", "pirate")
                                             for i in range(25)]
    assert {v["target"] for v in verdicts} == {0, 1}
    assert all(v["target"] == (v["winner"] == "expert") for v in verdicts)


def test_prism_json_of_a_run(finished: Path, folder: Path) -> None:
    """prism.json names base, source and fingerprint, and the settings that loading needs."""
    found = json.loads((finished / "prism.json").read_text())
    [gate] = [m for m in rows_of(finished, "metrics.jsonl") if m["stage"] == "gate"]
    assert found == {"base_model": str(folder.resolve()), "base_source": "folder",
                     "base_fingerprint": fingerprint(folder), "rank": 4, "alpha": 32.0,
                     "gate_layer": 0, "gate_pool": "mean", "dtype": "float32",
                     "threshold": gate["threshold"],
                     "sha256": {name: hashlib.sha256((finished / name).read_bytes()).hexdigest()
                                for name in ("adapter_model.safetensors", "gate.safetensors")}}
    assert gate["gate_sha256"] == found["sha256"]["gate.safetensors"]


def test_changed_gate_of_an_interrupted_run(finished: Path, command: list[str], tmp_path: Path,
                                            capfd: Capture) -> None:
    """A gate that was changed between stages 4 and 5 is not taken over into the adapter."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ADAPTER_FILES:
        (out / name).unlink()
    gate = bytearray((out / "gate.safetensors").read_bytes())
    gate[-2] ^= 1
    (out / "gate.safetensors").write_bytes(gate)
    before = contents(out)
    assert run_train(*command, "--out", out) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "gate.safetensors: not as it was written" in error
    assert contents(out) == before


def test_metrics_of_a_run(finished: Path) -> None:
    """One row a chunk and a step, in the order of the work; the schedule and the counts add up."""
    metrics = rows_of(finished, "metrics.jsonl")
    stages = [m["stage"] for m in metrics]
    order = ["queries", "quality", "answers", "judge", "verdicts", "gate", "lora", "kl"]
    assert list(dict.fromkeys(stages)) == order
    assert all(m["seconds"] >= 0 and isinstance(m["step"], int) for m in metrics)
    by = {s: [m for m in metrics if m["stage"] == s] for s in order}
    assert [m["prompts"] for m in by["answers"]] == [64, 36]  # chunks of 32 queries, two each
    assert [m["prompts"] for m in by["verdicts"]] == [256, 144]  # four readings an answer
    verdicts = [Verdict(**r) for r in rows_of(finished, "verdicts.jsonl")]
    held = hold_out(verdicts, 0)
    fit = sum(v.target for v in verdicts if (v.persona, v.index) not in held)
    steps = math.ceil(fit / 2) * 12
    assert [m["step"] for m in by["lora"]] == list(range(steps)) and steps > 20
    assert [m["lr"] for m in by["lora"]] == [learning_rate(i, steps, 2e-4) for i in range(steps)]
    assert all(math.isfinite(m["loss"]) and m["gradient_norm"] > 0 for m in by["lora"])
    assert sum(m["samples"] for m in by["lora"]) == 12 * fit
    assert by["gate"][0]["n"] == len(verdicts)
    assert all(m["flops"] > 0 and m["peak_memory"] > 2**20 for m in metrics if m["stage"] != "lora")
    written = sum(len(r[side]) for r in rows_of(finished, "answers.jsonl")
                  for side in ("base_ids", "expert_ids"))
    assert sum(m["tokens_written"] for m in by["answers"]) == written


def test_reported_kl_is_that_of_the_saved_adapter(finished: Path, net: Transformer,
                                                  tok: Tokenizer) -> None:
    """Before and after, recomputed from the files alone with full logits, and after < before; no
    held-out query took part in training."""
    pairs = [Pair(**r) for r in rows_of(finished, "answers.jsonl")]
    verdicts = [Verdict(**r) for r in rows_of(finished, "verdicts.jsonl")]
    held = hold_out(verdicts, 0)
    test = [p for p, v in zip(pairs, verdicts) if v.target and (p.persona, p.index) in held]
    prism, texts = PRISM.load(finished, net), {p.name: p.text for p in (CHEMIST, PIRATE)}
    sums, tokens = [0.0, 0.0], 0
    for pair in test:
        user = {"role": "user", "content": pair.query}
        log_p = []
        for prompt, k in (([{"role": "system", "content": texts[pair.persona]}, user], 0),
                          ([user], 0), ([user], 1)):
            ids = tok.render(prompt)
            with torch.no_grad():
                logits = prism(torch.tensor([[*ids, *pair.expert_ids]]), k)[0, len(ids) - 1:-1]
            log_p.append(logits.log_softmax(-1))
        for i in (0, 1):
            sums[i] += float((log_p[0].exp() * (log_p[0] - log_p[i + 1])).sum())
        tokens += len(pair.expert_ids)
    kl = rows_of(finished, "metrics.jsonl")[-1]
    assert (kl["stage"], kl["held_out_samples"], kl["answer_tokens"]) == ("kl", len(test), tokens)
    assert kl["before"] == pytest.approx(sums[0] / tokens, rel=1e-3)
    assert kl["after"] == pytest.approx(sums[1] / tokens, rel=1e-3)
    assert kl["after"] < kl["before"]


def test_reported_gate_scores_are_out_of_fold(finished: Path, net: Transformer,
                                              tok: Tokenizer) -> None:
    """Accuracy, AUC and the rest come from gates that never saw the query; the gate that is kept
    was fitted on all, and is the one that routes."""
    queries = [r["query"] for r in rows_of(finished, "queries.jsonl")]
    targets = [v["target"] for v in rows_of(finished, "verdicts.jsonl")]
    prism, again = PRISM.load(finished, net), PRISM(net, rank=4, gate_pool="mean")
    with one_thread():
        features, _ = gate_features(prism, tok, queries)
        t = torch.tensor([float(x) for x in targets])
        probability, fold = out_of_fold(features, t, 0)
        train_gate(again.gate, features, t, 0)
    for mine, saved in zip(again.gate.state_dict().values(), prism.gate.state_dict().values()):
        torch.testing.assert_close(mine, saved, rtol=1e-4, atol=1e-4)
    [row] = [m for m in rows_of(finished, "metrics.jsonl") if m["stage"] == "gate"]
    assert row["threshold"] == pytest.approx(choose_threshold(probability, targets))
    others = {f: [i for i, g in enumerate(fold) if g != f] for f in range(5)}
    thresholds = {f: choose_threshold([probability[i] for i in kept], [targets[i] for i in kept])
                  for f, kept in others.items()}  # no query has a part in its own threshold
    expected = gate_scores(probability, targets, [thresholds[f] for f in fold])
    assert {n: row[n] for n in expected} == expected
    assert row["roc"][-1][1:] == [1, 1] and row["folds"] == 5
    ids, mask = tok.render([{"role": "user", "content": queries[0]}], return_user_mask=True)
    [p] = prism.gate_probability(torch.tensor([ids]), torch.tensor([len(ids)]),
                                 torch.tensor([mask])).tolist()
    with torch.no_grad():
        assert p == pytest.approx(float(prism.gate(features[:1]).sigmoid()), abs=1e-4)


def test_report(finished: Path) -> None:
    """report.md tells kept queries, verdicts per persona, gate, KL and costs of every stage, shows
    samples and the loss, and says what to try next."""
    report = (finished / "report.md").read_text()
    verdicts = rows_of(finished, "verdicts.jsonl")
    won = sum(v["target"] for v in verdicts)
    kl = rows_of(finished, "metrics.jsonl")[-1]
    for text in ("queries kept: 50", f"distill / retain: {won} / {50 - won}", "AUC", "majority",
                 f"{kl['before']:.4f} before", f"{kl['after']:.4f} after"):
        assert text in report
    for persona in ("chemist", "pirate"):
        mine = [v["winner"] for v in verdicts if v["persona"] == persona]
        counts = [mine.count(w) for w in ("expert", "base", "tie", "split", "unparsed")]
        assert f"| {persona} | 25 | {' | '.join(map(str, counts))} |" in report
    for stage in ("queries", "answers", "verdicts", "gate", "lora"):
        assert f"| {stage} |" in report
    query = rows_of(finished, "queries.jsonl")[0]["query"]
    assert f"**chemist**: {query} / " in report and "### Verdict: expert" in report
    losses = [m["loss"] for m in rows_of(finished, "metrics.jsonl") if m["stage"] == "lora"]
    tenth = len(losses) // 10
    first = sum(losses[:tenth]) / tenth
    assert f"mean of every {tenth} of {len(losses)} steps: {first:.4f}, " in report
    assert "## What to try next\n\nThe judge failed its own test" in report
    for warning in ("judge was forced with --judge", "likelihood judge fails its own test"):
        assert f"WARNING: the {warning}" in report or f"WARNING: this {warning}" in report


def test_adapter_of_a_run_generates(finished: Path, net: Transformer, tok: Tokenizer) -> None:
    """The folder works with generate: gate off is the base model's answer, and the probability
    reported is the gate's."""
    prism = PRISM.load(finished, net)
    messages = [[{"role": "user", "content": f"Say something about number {i}."}]
                for i in range(8)]
    sampling = Sampling(12, 0.0)
    on, off = (generate(prism, tok, messages, sampling, gate=g) for g in ("on", "off"))
    base = generate(net, tok, messages, sampling)
    assert [c.ids for c in off] == [c.ids for c in base]
    assert all(c.routed for c in on) and not any(c.routed for c in off)
    ids = [tok.render(m, return_user_mask=True) for m in messages]
    expected = [float(prism.gate_probability(torch.tensor([i]), torch.tensor([len(i)]),
                                             torch.tensor([m])))
                for i, m in ids]
    assert [c.gate for c in on] == pytest.approx(expected, abs=1e-4)


def test_same_command_again_says_complete(finished: Path, command: list[str],
                                          capsys: Capture) -> None:
    """A finished run is left as it is, byte for byte and file by file."""
    before = contents(finished)
    stamps = {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.name != ".lock"}
    assert run_train(*command, "--out", finished) == 0
    assert "complete" in capsys.readouterr().out
    assert contents(finished) == before
    assert stamps == {p.name: p.stat().st_mtime_ns for p in finished.iterdir()
                      if p.name != ".lock"}


@pytest.mark.parametrize(("flag", "value"), [("--seed", "1"), ("--lr", "1e-3"), ("--queries", "9"),
                                             ("--judge", "letter"), ("--dtype", "bfloat16")])
def test_other_settings_are_refused(finished: Path, command: list[str], flag: str, value: str,
                                    capsys: Capture) -> None:
    """Other settings on the same --out: status 2, one line that names the setting, nothing
    touched."""
    before = contents(finished)
    assert run_train(*command, "--out", finished, flag, value) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flag.removeprefix("--") in error
    assert contents(finished) == before


def test_changed_persona_is_another_setting(finished: Path, command: list[str], personas: Path,
                                            tmp_path: Path) -> None:
    """The personas' text counts, not only their names: an edited persona is refused, too."""
    edited = tmp_path / "personas"
    shutil.copytree(personas, edited)
    (edited / "pirate.txt").write_text("Answer as a polite pirate.")
    before = contents(finished)
    assert run_train(*command, "--out", finished, "--personas", edited) == 2
    assert contents(finished) == before


def test_overwrite_keeps_what_a_later_setting_leaves_valid(finished: Path, command: list[str],
                                                           tmp_path: Path) -> None:
    """--overwrite with another --lr keeps stages 1-4 and redoes stage 5: the files are those of a
    new run with that setting."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    stamp = (out / "answers.jsonl").stat().st_mtime_ns
    changed = [*command, "--lr", "1e-3", "--epochs", "4"]
    assert run_train(*changed, "--out", out, "--overwrite") == 0
    old, new = contents(finished), contents(out)
    for name in ("candidates.jsonl", "queries.jsonl", "answers.jsonl", "verdicts.jsonl",
                 "gate.safetensors"):
        assert new[name] == old[name]
    assert (out / "answers.jsonl").stat().st_mtime_ns == stamp
    assert new["adapter_model.safetensors"] != old["adapter_model.safetensors"]
    assert run_train(*changed, "--out", tmp_path / "new") == 0
    assert timeless(out) == timeless(tmp_path / "new")


def test_nothing_to_distil(finished: Path, command: list[str], tmp_path: Path,
                           capsys: Capture) -> None:
    """No win: status 3, the data is kept, the reason is told, and no adapter is there, not even
    that of an earlier run that --overwrite replaced. Again: 3, and nothing changes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    letter = [*command, "--judge", "letter", "--out", out]  # unparsed throughout on this model
    assert run_train(*letter, "--overwrite") == 3
    assert "nothing to distil" in capsys.readouterr().err
    found = contents(out)
    assert found.keys() == {"run.json", "candidates.jsonl", "queries.jsonl", "answers.jsonl",
                            "verdicts.jsonl", "metrics.jsonl"}
    assert found["answers.jsonl"] == contents(finished)["answers.jsonl"]
    verdicts = rows_of(out, "verdicts.jsonl")
    assert len(verdicts) == 50 and {v["winner"] for v in verdicts} == {"unparsed"}
    assert not any(v["target"] for v in verdicts)
    assert run_train(*letter) == 3
    assert contents(out) == found
    assert run_train(*command, "--out", out, "--overwrite") == 0  # and back
    assert timeless(out) == timeless(finished)


def test_stage_by_stage(finished: Path, command: list[str], tmp_path: Path) -> None:
    """--stop-after each stage in turn leaves that stage's files and no later ones, and ends with
    the files of a run in one go."""
    expected = {"run.json", "metrics.jsonl"}
    for stage, files in train.FILES.items():
        if stage != "lora":
            expected |= {name for name in files if "*" not in name}
            assert run_train(*command, "--out", tmp_path, "--stop-after", stage) == 0
            assert contents(tmp_path).keys() == expected
    assert run_train(*command, "--out", tmp_path, "--stop-after", "lora") == 0
    assert timeless(tmp_path) == timeless(finished)


def test_gate_settings_reach_the_adapter(finished: Path, command: list[str], tmp_path: Path,
                                         net: Transformer, tok: Tokenizer) -> None:
    """--gate-layer, --gate-pool and --gate-threshold end up in prism.json and in the routing;
    with --overwrite, stages 1-3 are kept."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert run_train(*command, "--out", out, "--overwrite", "--gate-layer", "1", "--gate-pool",
                     "last", "--gate-threshold", "0.25", "--epochs", "1") == 0
    assert contents(out)["verdicts.jsonl"] == contents(finished)["verdicts.jsonl"]
    prism = PRISM.load(out, net)
    assert (prism.gate_layer, prism.gate_pool, prism.threshold) == (1, "last", 0.25)
    layers = json.loads((out / "adapter_config.json").read_text())["layers_to_transform"]
    assert layers == [2]
    [answer] = generate(prism, tok, [[{"role": "user", "content": "Hello there, you."}]],
                        Sampling(4, 0.0))
    assert answer.routed == (answer.gate >= 0.25)


def test_one_query_only(folder: Path, personas: Path, tmp_path: Path) -> None:
    """The smallest runs end in an adapter without NaN, or in status 3; both happen among seeds."""
    one = tmp_path / "personas"
    one.mkdir()
    shutil.copy(personas / "pirate.txt", one)
    statuses = set()
    for seed in range(12):
        out = tmp_path / str(seed)
        status = run_train("--model", folder, "--personas", one, "--queries", 1, "--judge",
                           "likelihood", "--max-new-tokens", 8, "--epochs", 1, "--seed", seed,
                           "--out", out, "--rank", 2)
        statuses.add(status)
        if status == 0:
            for name in ("gate.safetensors", "adapter_model.safetensors"):
                tensors = load_file(out / name)
                assert all(bool(t.isfinite().all()) for t in tensors.values()), (seed, name)
            assert "NaN" not in (out / "metrics.jsonl").read_text()
        if statuses == {0, 3}:
            break
    assert statuses == {0, 3}


@pytest.fixture
def real_sets(tmp_path: Path) -> Path:
    """A few rows in the formats of HarmBench, MT-Bench, MMLU and GSM8K."""
    folder = tmp_path / "real"
    for name in ("harmbench", "mt_bench", "mmlu/val", "mmlu/dev", "gsm8k"):
        (folder / name).mkdir(parents=True)
    (folder / "harmbench/text.csv").write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Do harm,standard,x,,,a\n\"Do harm,\nslowly\",standard,x,,,b\n"
        "Use it,contextual,x,context,A weapon.,c\nSing it,copyright,x,hash_check,,d\n")
    (folder / "mt_bench/question.jsonl").write_text(
        '{"question_id": 1, "category": "x", "turns": ["Hello there", "Again"]}\n')
    (folder / "mmlu/val/x_val.csv").write_text('"What, then?",a,b,c,d,B\n')
    (folder / "mmlu/dev/x_dev.csv").write_text("not read,a,b,c,d,A\n")
    (folder / "gsm8k/train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    return folder


def test_transfer_sets_as_their_authors_publish_them(real_sets: Path) -> None:
    """Copyright behaviours and MMLU's dev split stay out; context goes into the prompt."""
    assert read_transfer_sets(real_sets) == {
        "harmful": ["Do harm", "Do harm,\nslowly"],
        "harmful, with context": ["A weapon.\n\n---\n\nUse it"],
        "chat": ["Hello there"], "multiple choice": ["What, then?\nA. a\nB. b\nC. c\nD. d"],
        "maths": ["1 + 1?"]}
    shutil.rmtree(real_sets / "mt_bench")
    with pytest.raises(InputError, match="mt_bench/question.jsonl"):
        read_transfer_sets(real_sets)


@pytest.mark.parametrize(("name", "text"), [
    ("harmbench/text.csv", "Goal,Tags\nx,y\n"), ("harmbench/text.csv", "\n"),
    ("harmbench/text.csv", "Behavior,FunctionalCategory,Tags\n" + "x" * 200_000 + ",a,b\n"),
    ("harmbench/text.csv", b"Behavior,FunctionalCategory,Tags\nh\xf6flich,a,b\n"),
    ("mt_bench/question.jsonl", '{"turns": []}\n'), ("mt_bench/question.jsonl", '{"turns": [5]}\n'),
    ("mt_bench/question.jsonl", "[1]\n"), ("mt_bench/question.jsonl", '{"tur'),
    ("mmlu/val/x_val.csv", "one,two\n"), ("gsm8k/train.jsonl", '{"question": null}\n')])
def test_malformed_transfer_data_is_named(real_sets: Path, name: str, text: str | bytes) -> None:
    """A file that is not what its name says: one error that names it (or what is then missing)."""
    (real_sets / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"{Path(name).name}|harmbench/"):
        read_transfer_sets(real_sets)


def test_transfer_files_with_odd_lines(real_sets: Path) -> None:
    """Blank lines, a U+2028 inside of a JSON string, a second file with other columns: fine."""
    with (real_sets / "mmlu/val/x_val.csv").open("a") as file:
        file.write("\n\n")
    text = "Tags,Behavior,FunctionalCategory\nx,More harm,y\n\n"
    (real_sets / "harmbench/z.csv").write_text(text)
    (real_sets / "mt_bench/question.jsonl").write_text(
        '{"question_id": 1, "category": "x", "turns": ["Hello\u2028there"]}\n\n')
    found = read_transfer_sets(real_sets)
    assert found["harmful"][-1] == "More harm" and found["chat"] == ["Hello\u2028there"]
    assert len(found["multiple choice"]) == 1


def test_interrupted_overwrite_continues(finished: Path, command: list[str],
                                         tmp_path: Path) -> None:
    """The same --overwrite command, stopped half-way and given again, keeps what the first one
    kept; on a complete run it starts from nothing."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    two = [*command, "--votes", "2", "--epochs", "1", "--out", str(out), "--overwrite"]
    assert run_train(*two, "--stop-after", "verdicts") == 0
    stamps = [(out / f).stat().st_mtime_ns for f in ("candidates.jsonl", "verdicts.jsonl")]
    assert run_train(*two) == 0
    assert [(out / f).stat().st_mtime_ns for f in ("candidates.jsonl", "verdicts.jsonl")] == stamps
    assert run_train(*two) == 0
    assert (out / "candidates.jsonl").stat().st_mtime_ns != stamps[0]


def test_transfer_is_measured_and_never_trained_on(finished: Path, command: list[str],
                                                   tmp_path: Path, real_sets: Path,
                                                   net: Transformer, tok: Tokenizer) -> None:
    """--transfer-data on a finished run adds one metrics row and a table, and changes no tensor;
    the routed shares are those of the saved gate."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert run_train(*command, "--out", out, "--transfer-data", real_sets) == 0
    before, after = contents(finished), contents(out)
    assert [n for n in after if after[n] != before[n]] and all(
        after[n] == before[n] for n in after if n not in ("metrics.jsonl", "report.md"))
    [row] = [m for m in rows_of(out, "metrics.jsonl") if m["stage"] == "transfer"]
    assert set(row["gates"]) == {"the gate", "chemist", "pirate"}
    assert row["sets"] == {"harmful": 2, "harmful, with context": 1, "chat": 1,
                              "multiple choice": 1, "maths": 1}
    prism = PRISM.load(out, net)
    answers = generate(prism, tok, [[{"role": "user", "content": text}] for text in
                                    ("Do harm", "Do harm,\nslowly")], Sampling(1, 0.0))
    routed = sum(a.routed for a in answers) / 2
    assert row["gates"]["the gate"]["routed"]["harmful"] == routed
    assert "Transfer" in (out / "report.md").read_text()


def test_votes_and_judge_reuse_the_answers(finished: Path, command: list[str],
                                           tmp_path: Path) -> None:
    """More votes, or another judge, with --overwrite: queries and first answers stay as they are,
    the other answers are written once, and verdicts are those of a new run."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    three = [*command, "--votes", "3", "--epochs", "1"]
    assert run_train(*three, "--out", out, "--overwrite") == 0
    old, new = contents(finished), contents(out)
    for name in ("candidates.jsonl", "queries.jsonl", "answers.jsonl"):
        assert new[name] == old[name]
    assert {"answers.1.jsonl", "answers.2.jsonl"} < new.keys()
    rows = rows_of(out, "verdicts.jsonl")
    assert all(len(r["votes"]) == 3 and r["share"] == r["votes"].count("expert") / 3 for r in rows)
    assert any(0 < r["share"] < 1 for r in rows)
    assert run_train(*three, "--out", tmp_path / "new") == 0
    assert timeless(tmp_path / "new") == timeless(out)
    assert run_train(*command, "--epochs", "1", "--out", out, "--overwrite") == 0  # and back
    assert contents(out)["verdicts.jsonl"] == old["verdicts.jsonl"]
    assert contents(out)["answers.2.jsonl"] == new["answers.2.jsonl"]


def test_judge_model_is_named(command: list[str], tmp_path: Path) -> None:
    """--judge-model: another model's verdicts, and a report that does not call it
    self-verification."""
    other = tiny_llama(tmp_path / "judge", seed=5)
    short = [*command, "--queries", "8", "--epochs", "1"]
    assert run_train(*short, "--out", tmp_path / "self") in (0, 3)
    assert run_train(*short, "--out", tmp_path / "out", "--judge-model", other) in (0, 3)
    mine, theirs = (rows_of(tmp_path / name, "verdicts.jsonl") for name in ("self", "out"))
    assert [r["evidence"] for r in mine] != [r["evidence"] for r in theirs]
    [row] = [m for m in rows_of(tmp_path / "out", "metrics.jsonl") if m["stage"] == "judge"]
    assert row["model"] == str(other)
    if (tmp_path / "out/report.md").exists():
        assert "not self-verification" in (tmp_path / "out/report.md").read_text()


def test_drop_chance_leaves_nothing_of_a_random_model(finished: Path, command: list[str],
                                                      tmp_path: Path, capsys: Capture) -> None:
    """A random model's personas win no more than chance: with --drop-chance status 3, the raw
    verdicts kept as they are."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    judged = [m for m in rows_of(out, "metrics.jsonl") if m["stage"] == "judge"][0]
    judged.pop("sha256")  # it is changed below
    if "same prompt" not in judged["tests"][-1]["kinds"]:
        judged["tests"][-1]["kinds"]["same prompt"] = {"pairs": 24, "right": 12, "wrong": 12,
                                                       "tie": 0, "split": 0, "unparsed": 0}
        rows = [judged if m["stage"] == "judge" else m for m in rows_of(out, "metrics.jsonl")]
        (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in rows))
    assert run_train(*command, "--out", out, "--overwrite", "--drop-chance") == 3
    assert contents(out)["verdicts.jsonl"] == contents(finished)["verdicts.jsonl"]
    assert not (out / "prism.json").exists() and "nothing to distil" in capsys.readouterr().err


CONTEXTS = {
    "safety_policy": "Policy: never give medical doses. Always name a doctor or a pharmacist.",
    "brand_voice": "You write for Sunny Bikes: short, warm sentences, and the word ride.",
    "tools": 'You can call search(query) and add(a, b). Reply with one JSON call: {"tool": ...}.'}


def test_any_text_is_a_context(folder: Path, tmp_path: Path) -> None:
    """A policy, a brand voice and a tool registry go through all five stages by pointing
    --personas at their folder."""
    (tmp_path / "contexts").mkdir()
    for name, text in CONTEXTS.items():
        (tmp_path / "contexts" / f"{name}.txt").write_text(text)
    assert run_train("--model", folder, "--personas", tmp_path / "contexts", "--queries", 6,
                     "--judge", "likelihood", "--max-new-tokens", 10, "--epochs", 1, "--rank", 2,
                     "--out", tmp_path / "out", "--dtype", "float32") == 0
    rows = rows_of(tmp_path / "out", "queries.jsonl")
    assert {r["persona"] for r in rows} == set(CONTEXTS)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# Restarts


def start(command: Sequence[str], out: Path, log: Path) -> subprocess.Popen:
    """`python train.py` as a process of its own, on one thread, its output in `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w") as sink:
        return subprocess.Popen([sys.executable, train.__file__, *command, "--out", str(out)],
                                stdout=sink, stderr=subprocess.STDOUT, env=environment)


def stop_when(process: subprocess.Popen, ready: Callable[[], bool], how: signal.Signals,
              log: Path) -> int:
    """Send `how` to the process as soon as `ready()`; returns its exit status."""
    limit = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"it ended before its moment: {log.read_text()[-500:]}"
        assert time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(how)
    return process.wait(60)


def lines_in(path: Path) -> int:
    """Rows of a file, 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_and_continue(finished: Path, command: list[str], tmp_path: Path) -> None:
    """kill -9 in stages 1, 2 and 5 and Ctrl-C in stage 3, each time continued by the same
    command: the files of the uninterrupted run, byte for byte apart from seconds."""
    out, log = tmp_path / "out", tmp_path / "log"
    moments = [(signal.SIGKILL, lambda: lines_in(out / "candidates.jsonl") >= 1),
               (signal.SIGKILL, lambda: lines_in(out / "answers.jsonl") >= 32),
               (signal.SIGINT, lambda: lines_in(out / "verdicts.jsonl") >= 32),
               (signal.SIGKILL, lambda: (out / "checkpoint.safetensors").exists())]
    for how, ready in moments:
        status = stop_when(start(command, out, log), ready, how, log)
        assert status == (-9 if how == signal.SIGKILL else 130), log.read_text()
        if how == signal.SIGINT:
            assert "interrupted" in log.read_text().splitlines()[-1]
            assert "Traceback" not in log.read_text()
        assert not (out / "report.md").exists()
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_adapter_is_not_called_complete(finished: Path, command: list[str],
                                                  tmp_path: Path, capsys: Capture,
                                                  complete: bool) -> None:
    """A changed byte in the adapter of a finished run: status 2, not "saved"."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    data = bytearray((out / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "adapter_model.safetensors").write_bytes(data)
    if not complete:
        (out / "report.md").unlink()
    assert run_train(*command, "--out", out) == 2
    assert "adapter_model.safetensors: not as it was written" in capsys.readouterr().err


def test_a_lost_metrics_row_uncovers_its_chunk(finished: Path, command: list[str], tmp_path: Path,
                                               capsys: Capture) -> None:
    """Rows of a stage file whose chunk no metrics row vouches for are named."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "report.md").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = next(line for line in lines if '"file": "verdicts.jsonl"' in line)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if line != first))
    assert run_train(*command, "--out", out) == 2
    assert "verdicts.jsonl, lines 1-32: not as they were written" in capsys.readouterr().err


def run_and_die(command: Sequence[str], out: Path, after: int, how: str) -> int:
    """The command in a forked process that kills itself (SIGKILL) at its write number `after`:
    in the "middle" of the temporary file, "before" it gets its name, or just "after" that. Returns
    what os.waitpid says; 0 if the command ended before.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        writes, fsync, replace = [0], os.fsync, os.replace

        def die_in_fsync(descriptor: int) -> None:
            writes[0] += 1
            if writes[0] == after and how != "after":
                if how == "middle":
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        def die_after_replace(source: Path, target: Path) -> None:
            replace(source, target)
            if writes[0] == after and how == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync, os.replace, train.CHECKPOINT_EVERY = die_in_fsync, die_after_replace, 5
        status = run_train(*command, "--out", out)
    finally:
        os._exit(status)


def stage_of(out: Path) -> str:
    """The stage that a killed run was in, by its last metrics row."""
    rows = rows_of(out, "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    return rows[-1]["stage"] if rows else "nothing"


def killed_to_the_end(command: Sequence[str], out: Path) -> list[str]:
    """Kill a run, continue it by the same command, kill that, until it ends by itself: after few
    writes at first, where the stages are short. Returns the stages it died in."""
    died: list[str] = []
    while True:
        how = ("middle", "before", "after")[len(died) % 3]
        status = run_and_die(command, out, 2 + len(died) // 2, how)
        if status == 0:
            return died
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        assert not (out / "report.md").exists() or how == "after"
        died.append(stage_of(out))
        assert len(died) < 100


def test_killed_at_twenty_points(finished: Path, command: list[str], tmp_path: Path) -> None:
    """One run, killed again and again through all stages, a third of the times in the middle of a
    write: all its files are those of the run that nobody disturbed."""
    out = tmp_path / "out"
    died = killed_to_the_end(command, out)
    assert len(died) >= 20, died
    assert {"queries", "answers", "judge", "verdicts", "lora", "kl"} <= set(died), died
    assert timeless(out) == timeless(finished)
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
def test_killed_on_the_real_model(smollm_folder: Path, personas: Path, tmp_path: Path) -> None:
    """The same with SmolLM2's weights in the dtype that this machine computes in."""
    command = ["--model", str(smollm_folder), "--personas", str(personas), "--queries", "5",
               "--max-new-tokens", "24", "--judge", "likelihood", "--epochs", "4", "--batch-size",
               "1", "--device", "cpu"]
    assert run_train(*command, "--out", tmp_path / "whole") == 0
    died = killed_to_the_end(command, tmp_path / "out")
    assert len(died) >= 3, died
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_status_130(finished: Path, command: list[str], tmp_path: Path,
                                   how: signal.Signals, capsys: Capture) -> None:
    """Ctrl-C and SIGTERM alike: 130, one last line that says how to continue, no traceback. While
    the process works, a second one in the same folder is refused; dead, it holds nothing."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command, out, log)

    def ready() -> bool:
        if lines_in(out / "answers.jsonl") < 32:
            return False
        assert run_train(*command, "--out", out) == 2
        assert "another process" in capsys.readouterr().err
        return True

    assert stop_when(process, ready, how, log) == 130, log.read_text()
    assert "interrupted" in log.read_text().splitlines()[-1]
    assert "same command continues" in log.read_text() and "Traceback" not in log.read_text()
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


@pytest.mark.parametrize("space", [300, 8000, 60000])
def test_disk_full(finished: Path, command: list[str], tmp_path: Path, space: int,
                   capfd: Capture) -> None:
    """Files that cannot grow beyond so many bytes stand for a full disk: status 2, one line with
    the file and the way on, everything written stays readable, and with space the run continues to
    the same files."""
    out = tmp_path / "out"
    with file_size_limit(space):
        assert run_train(*command, "--out", out) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and str(out) in error and "make space" in error
    run = RunFolder(out)
    try:
        for name, kind in (("candidates.jsonl", Candidate), ("queries.jsonl", Query),
                           ("answers.jsonl", Pair), ("verdicts.jsonl", Verdict)):
            assert len(run.read(name, kind)) == lines_in(out / name)
        run.metrics()
    finally:
        run.close()
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


def test_every_commit_is_a_place_to_continue_from(
        command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves between any two atomic replacements is continued to the same files: the
    folder is copied after each of them, and every copy is finished by the same command."""
    short = [*command, "--queries", "8", "--epochs", "4"]
    out, real, taken = tmp_path / "out", os.replace, []

    def spy(source: str, target: Path) -> None:
        real(source, target)
        last = rows_of(out, "metrics.jsonl")[-1] if target.name == "metrics.jsonl" else {}
        if last.get("stage") != "lora" or last["step"] == 3:  # one of the optimizer's steps
            taken.append(f"{len(taken)}-{target.name}")
            shutil.copytree(out, tmp_path / taken[-1])

    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", spy)
        assert run_train(*short, "--out", out) == 0
    names = {name.partition("-")[2] for name in taken}
    assert names == ALL_FILES | {"checkpoint.safetensors"}
    expected, wrong = timeless(out), []
    for name in taken:
        assert run_train(*short, "--out", tmp_path / name) == 0
        found = timeless(tmp_path / name)
        differing = sorted(n for n in expected.keys() | found.keys()
                           if expected.get(n) != found.get(n))
        if differing:
            wrong.append(f"killed after {name}: {', '.join(differing)}")
    assert not wrong, "; ".join(wrong)


def test_second_run_in_the_same_folder_is_refused(
        finished: Path, command: list[str], capsys: Capture) -> None:
    """While one process works in a folder, another gets status 2 and changes nothing."""
    before = contents(finished)
    holder = RunFolder(finished)
    try:
        assert run_train(*command, "--out", finished) == 2
    finally:
        holder.close()
    assert "another process" in capsys.readouterr().err
    assert contents(finished) == before


# --------------------------------------------------------------------------------------------------
# Wrong input


WRONG = {
    "no queries": ["--queries", "0"], "negative queries": ["--queries", "-3"],
    "lr is NaN": ["--lr", "nan"], "lr is infinite": ["--lr", "inf"], "lr is zero": ["--lr", "0"],
    "alpha is NaN": ["--alpha", "nan"], "temperature": ["--kd-temperature", "0"],
    "threshold": ["--gate-threshold", "1.5"], "dropout": ["--dropout", "1"],
    "rank": ["--rank", "0"], "epochs": ["--epochs", "0"], "batch": ["--batch-size", "0"],
    "tokens": ["--max-new-tokens", "0"], "max-len": ["--max-len", "0"],
    "gate layer": ["--gate-layer", "2"], "negative gate layer": ["--gate-layer", "-1"],
    "device": ["--device", "abacus"], "dtype": ["--dtype", "int8"],
    "no personas": ["--personas", "{tmp}/absent"], "empty folder": ["--personas", "{tmp}/none"],
    "empty persona": ["--personas", "{tmp}/empty"], "not UTF-8": ["--personas", "{tmp}/latin1"],
    "threshold is no number": ["--gate-threshold", "often"], "votes": ["--votes", "0"],
    "no transfer data": ["--transfer-data", "{tmp}/none"],
    "unknown flag": ["--qeries", "3"], "no integer": ["--queries", "three"],
    "unknown judge model": ["--judge-model", "nobody-at-all/no-such-model"],
    "unknown folder": ["--model", "./no/such/folder"],
    "not a checkpoint": ["--model", "{tmp}/none"],
    "unknown model": ["--model", "nobody-at-all/no-such-model"],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(command: list[str], tmp_path: Path, what: str, capfd: Capture) -> None:
    """Status 2, exactly one line on stderr that is no traceback, and nothing created."""
    for name, data in (("none", None), ("empty", b"  \n"), ("latin1", b"h\xf6flich")):
        (tmp_path / name).mkdir()
        if data is not None:
            (tmp_path / name / "p.txt").write_bytes(data)
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in WRONG[what]]
    before = sorted(tmp_path.rglob("*"))
    assert run_train(*command, "--out", tmp_path / "out", *arguments) == 2
    out, error = capfd.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_written(command: list[str], tmp_path: Path,
                                    out: str, capfd: Capture) -> None:
    """A file where the folder should be, or where its parent should: status 2, one line, the file
    as it was."""
    (tmp_path / "file").write_text("mine")
    assert run_train(*command, "--out", tmp_path / out) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("name", "text"), [
    ("verdicts.jsonl", "{}\n"), ("adapter_model.safetensors", "x"), ("run.json", "{}"),
    ("run.json", "[1]"), ("run.json", "not JSON"), ("run.json", '{"settings": 3}')])
def test_out_of_an_unknown_run(command: list[str], tmp_path: Path, name: str, text: str,
                               capfd) -> None:
    """A folder with files of some other program: status 2, one line, the files as they were."""
    (tmp_path / name).write_text(text)
    assert run_train(*command, "--out", tmp_path) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and name in error
    assert contents(tmp_path) == {name: text.encode()}


def test_damaged_stage_file_of_an_interrupted_run(finished: Path, command: list[str],
                                                  tmp_path: Path, capfd: Capture) -> None:
    """A stage file that somebody broke: status 2, the line is named, nothing else is changed."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ADAPTER_FILES:
        (out / name).unlink()
    lines = (out / "answers.jsonl").read_bytes().split(b"\n")
    lines[4] = lines[4][:20]
    (out / "answers.jsonl").write_bytes(b"\n".join(lines))
    before = contents(out)
    assert run_train(*command, "--out", out) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "answers.jsonl, line 5" in error
    assert contents(out) == before


def test_persona_longer_than_the_context(command: list[str], tmp_path: Path,
                                         capfd: Capture) -> None:
    """A persona that leaves no room in the model's context is an error, not a wrong answer."""
    (tmp_path / "personas").mkdir()
    (tmp_path / "personas" / "long.txt").write_text("one two three " * 600)
    status = run_train(*command, "--out", tmp_path / "out", "--personas", tmp_path / "personas")
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error: ") and "1024" in error


@pytest.mark.parametrize("judge", ["letter", "likelihood", "auto"])
def test_answers_longer_than_the_judges_context(judge: str, folder: Path, command: list[str],
                                                tmp_path: Path, capfd: Capture) -> None:
    """Answers that the judge could not read are refused before stage 1 writes anything, whoever the
    judge is, with the longest that would do."""
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    edit_json(short / "config.json", lambda c: c.update(max_position_embeddings=600))
    asked = [*command, "--judge", judge, "--stop-after", "queries", "--out", tmp_path / "out"]
    for flags in (["--model", short], ["--judge-model", short]):
        assert run_train(*asked, *flags, "--max-new-tokens", 300) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {short}: --max-new-tokens is 300") and (
            error.count("\n") == 1) and not (tmp_path / "out").exists()
    room = int(re.search(r"room for answers of (\d+)", error)[1])
    assert run_train(*asked, "--judge-model", short, "--max-new-tokens", room + 1) == 2
    assert run_train(*asked, "--judge-model", short, "--max-new-tokens", room) == 0


def test_persona_whose_file_name_is_not_text(command: list[str], tmp_path: Path,
                                             capfd: Capture) -> None:
    """A file name that is not UTF-8 cannot be written to the rows: one line, no traceback."""
    (tmp_path / "personas").mkdir()
    path = os.fsencode(tmp_path / "personas") + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"Be brief.")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    status = run_train(*command, "--out", tmp_path / "out", "--personas", tmp_path / "personas",
                       "--stop-after", "queries")
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error: ")


def test_exit_status_of_the_process(tmp_path: Path) -> None:
    """`python train.py --queries 0` ends with status 2 and one line on stderr."""
    done = subprocess.run([sys.executable, train.__file__, "--queries", "0", "--out", "out"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert "--queries" in done.stderr and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Real weights


TRUE_PIRATE = Persona("pirate", "Answer every question as a pirate, with Arr and matey.")
QUESTIONS = ["How are you today?", "What is your name?", "Where do you live?", "What is a dog?",
             "Can you help me?", "Why is the sky blue?", "How do I cook rice?", "Tell me a joke.",
             "What do you like?", "Who is the king?", "What is a ship?"]
FIT = 8


def test_distillation_on_real_weights(smollm32: Transformer, smollm_tok: Tokenizer,
                                      tmp_path: Path) -> None:
    """The persona goes into the adapter: on held-out queries the KL between the persona-reading
    base and the adapter WITHOUT the persona, recomputed with transformers, its own chat template
    and PEFT from the saved folder, is well below the base's. A teacher that lost its persona
    trains on nothing and fails here."""
    system = {"role": "system", "content": TRUE_PIRATE.text}
    users = [{"role": "user", "content": q} for q in QUESTIONS]
    answers = generate(smollm32, smollm_tok, [[system, u] for u in users], Sampling(20, 0.0))
    pairs = [Pair("pirate", i, q, "", a.text, [], a.ids, "eos", a.stop)
             for i, (q, a) in enumerate(zip(QUESTIONS, answers))]
    samples = distill_samples(smollm32, smollm_tok, [TRUE_PIRATE], pairs, 256)
    prism = PRISM(smollm32, rank=8, alpha=16.0, dropout=0.0)
    run = RunFolder(tmp_path / "run")
    train_lora(run, prism, samples[:FIT], settings(epochs=4, batch_size=4, lr=2e-3))
    run.close()
    reported = held_out_kl(prism, samples[FIT:])
    prism.save(tmp_path / "adapter")

    folder = resolve(smollm32.folder)
    render = AutoTokenizer.from_pretrained(folder).apply_chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_p(messages: list[dict], answer: list[int]) -> Tensor:
        ids = render(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            return model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1:-1].log_softmax(-1)

    held = list(zip(users, answers))[FIT:]
    teacher = [log_p([system, u], a.ids) for u, a in held]
    base = [log_p([u], a.ids) for u, a in held]
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    student = [log_p([u], a.ids) for u, a in held]

    def mean_kl(other: list[Tensor]) -> float:
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(teacher, other))
        return total / sum(len(p) for p in teacher)

    assert mean_kl(base) > 0.2  # the persona does something to this model
    assert mean_kl(student) < 0.75 * mean_kl(base)
    assert mean_kl(student) == pytest.approx(reported, rel=1e-2)
    with torch.no_grad():  # and the adapter's logits are PEFT's
        ids = smollm_tok.render([held[0][0]])
        mine = prism(torch.tensor([[*ids, *held[0][1].ids]]), 1)[0, len(ids) - 1:-1]
    torch.testing.assert_close(mine.log_softmax(-1), student[0], rtol=0, atol=1e-3)


def test_distill_loss_reaches_the_head_it_is_given(net: Transformer) -> None:
    """The loss of the training step reads the base's own head: zero for equal states."""
    h = torch.randn(5, net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert float(distill_loss(h, h.clone(), net)) == pytest.approx(0, abs=1e-5)
