"""Stage 4: from the bare query alone, the gate learns where the context helps.

A verdict is a noisy label. So there are two targets: the paper's t(x), and the win rate of the
persona that the query was written for, which is known far better than any single verdict, and is
what intent-based routing needs. `auto` takes the latter, unless the former predicts verdicts better
out of fold by more than a standard error.

How often the gate would open for nothing is seen on ordinary traffic: user turns that the model
writes with no context at all (Magpie, arXiv 2406.08464). They limit the threshold. Where contexts
are named contrast..., or every verdict was a win, they are also negatives to learn from. Mixed
with the noisy verdicts of many personas they hurt: the gate learned to open for whatever differs.
"""

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from bootstrap import Pair, Verdict
from engine import Request
from generate import gate_features
from model import Transformer
from prism import PRISM, Gate, gate_loss
from queries import write_messages
from sampling import derive_seed
from support.distributed import progress_bar
from support.hub import InputError
from support.messages import conversation
from support.personas import is_contrast
from support.runs import RunFolder, cost_of, spent_since
from support.stats import (calibrated_log_loss, decision_scores, shrunken_rates, upper_quantile,
                           youden_threshold)
from support.words import clean_query
from tokenizer import Tokenizer

GATE_FOLDS = 5
GATE_STEPS = 50  # of all queries at once; with 300 a gate learns the noise of single verdicts
GATE_OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.01}
MOST_TRAFFIC = 200  # messages of ordinary traffic; no more than there are queries
# Everything above that decides a gate: a run notices when it is changed.
GATE_RULES = (GATE_FOLDS, GATE_STEPS, GATE_OPTIMIZER, MOST_TRAFFIC)


@dataclass(frozen=True)
class Traffic:
    """Row of traffic.jsonl: a message that a user writes with no system prompt."""

    query: str


def run_gate(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, pairs: Sequence[Pair],
             verdicts: Sequence[Verdict], args: argparse.Namespace) -> None:
    """Stage 4 as a resumable step: score the gate out of fold, then fit one on all queries."""
    done = run.latest().get("gate")
    if done and (run.path / "gate.safetensors").exists():
        prism.load_gate(run.path, done["threshold"])
        return
    run.note_source("gate")
    traffic = write_traffic(run, prism.net, tokenizer, min(len(pairs), MOST_TRAFFIC), args.seed)
    begun = time.perf_counter()
    queries, read = gate_features(prism, tokenizer, [conversation(p.query) for p in pairs])
    ordinary, read_too = gate_features(prism, tokenizer, [conversation(t) for t in traffic])
    figures = fit_gate(prism.gate, queries, ordinary, verdicts, args.gate_target,
                       args.gate_threshold, args.gate_rate, args.seed)
    prism.threshold = figures["threshold"]
    prism.save_gate(run.path)
    cost = cost_of(prism.net, len(pairs) + len(traffic), read + read_too)
    cost["flops"] = cost["flops"] * (prism.gate_layer + 1) // len(prism.net.layers)
    run.record("gate", 0, **figures, folds=GATE_FOLDS, traffic=len(traffic), queries=len(pairs),
               **cost, **spent_since(begun))


def fit_gate(gate: Gate, queries: Tensor, ordinary: Tensor, verdicts: Sequence[Verdict],
             target: str, threshold: float | None, rate: float, seed: int) -> dict:
    """Choose the target and the threshold out of fold, then train a gate on all queries.

    Args:
        queries, ordinary: [n, d] and [m, d] features of the queries and of ordinary traffic.
        verdicts: the n on these queries.
        target: "verdict", "intent", or "auto" (`choose_target`).
        threshold, rate: see `choose_thresholds`.

    Returns:
        The threshold, the target, and figures of how well the gate does out of fold.
    """
    labels = torch.tensor([float(v.target) for v in verdicts], device=queries.device)
    features, labels, personas = with_traffic(queries, labels, [v.persona for v in verdicts],
                                              ordinary)
    scored, losses = {}, {}
    for kind in ("verdict", "intent") if target == "auto" else (target,):
        scored[kind] = out_of_fold(features, labels, personas, kind, seed)
        losses[kind] = calibrated_log_loss(scored[kind][0], labels.tolist())
    if target == "auto":
        target = choose_target(losses)

    targets = gate_targets(labels, personas, target)
    loss = train_gate(gate, features, targets)
    probability, fold = scored[target]
    if len(features) > len(queries):  # the gate has learned from the traffic: out of fold, too
        traffic = probability[len(queries):]
    else:
        traffic = probabilities(gate, ordinary)
    thresholds = choose_thresholds(probability, targets, fold, traffic, threshold, rate)
    opened = [p >= thresholds[f] for p, f in zip(probability, fold)]
    return {"threshold": thresholds[None], "target": target, "loss": loss,
            "log_losses": {kind: float(values.mean()) for kind, values in losses.items()},
            "traffic_opened": open_share(traffic, thresholds[None]),
            **decision_scores(probability, opened, labels.tolist())}


def write_traffic(run: RunFolder, net: Transformer, tokenizer: Tokenizer, wanted: int,
                  seed: int) -> list[str]:
    """At most `wanted` different messages of ordinary traffic. Where traffic.jsonl is there, it is
    used as it is, whoever wrote it: real prompts do better."""
    if (run.path / "traffic.jsonl").exists():
        return read_traffic(run)
    begun = time.perf_counter()
    turn = tokenizer.open_user_turn(None)
    asked = [Request(turn, derive_seed(seed, "traffic", i), prefix=len(turn) - 1)
             for i in range(2 * wanted)]
    said, cost = write_messages(net, tokenizer, asked, "continue", "ordinary traffic")
    written = [clean_query(message.text) for message in said if message.stop == "eos"]
    messages = [text for text in dict.fromkeys(written) if text][:wanted]
    run.record("traffic", 0, **cost, **spent_since(begun))
    run.write("traffic.jsonl", map(Traffic, messages))
    return messages


def read_traffic(run: RunFolder) -> list[str]:
    """The messages in traffic.jsonl."""
    return [row.query for row in run.read("traffic.jsonl", Traffic)]


def gate_targets(labels: Tensor, personas: Sequence[str], kind: str) -> Tensor:
    """What a gate has to predict for each query [n]: its t(x), or for "intent" the win rate of its
    persona, shrunk towards that of all."""
    if kind == "verdict":
        return labels
    wins, counts = Counter(), Counter(personas)
    for name, label in zip(personas, labels.tolist()):
        wins[name] += label
    rates = shrunken_rates([wins[name] for name in counts], list(counts.values()))
    rate = dict(zip(counts, rates))
    return torch.tensor([rate[name] for name in personas], device=labels.device)


def choose_target(losses: dict[str, np.ndarray]) -> str:
    """Of both targets, given the log losses [n] of held-out verdicts under each: intent, unless
    verdicts are better by more than a standard error (the rule of Breiman et al. 1984)."""
    gain = losses["intent"] - losses["verdict"]
    return "verdict" if gain.mean() > gain.std() / math.sqrt(len(gain)) else "intent"


def with_traffic(queries: Tensor, labels: Tensor, personas: list[str],
                 ordinary: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Features, verdicts and personas to learn from. Ordinary traffic is added as a contrast where
    there are contrast contexts, or nothing but wins, as after --judge none without such contexts.
    """
    if not (any(map(is_contrast, personas)) or labels.all()):
        return queries, labels, personas
    lost, nobody = labels.new_zeros(len(ordinary)), ["ordinary traffic"] * len(ordinary)
    return torch.cat((queries, ordinary)), torch.cat((labels, lost)), personas + nobody


def train_gate(gate: Gate, features: Tensor, targets: Tensor) -> float:
    """Fit a gate to features [n, d] and targets [n] in [0, 1]; returns the last loss."""
    gate.mean.copy_(features.mean(0))
    gate.deviation.copy_(features.std(0, correction=0).clamp(min=1e-4))
    optimizer = torch.optim.AdamW(gate.mlp.parameters(), **GATE_OPTIMIZER)
    for _ in range(GATE_STEPS):
        loss = gate_loss(gate(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = float(loss.detach())  # the only wait for the device
    if not math.isfinite(last):
        raise InputError("stage 4: the gate's loss is not finite; try --dtype float32")
    return last


def out_of_fold(features: Tensor, labels: Tensor, personas: Sequence[str], kind: str,
                seed: int) -> tuple[list[float], list[int]]:
    """The probability of every query under a gate fitted without it, and its fold (5-fold
    cross-validation). Folds are dealt out within each class, in an order that depends on the seed
    alone."""
    targets, probability, fold = labels.tolist(), [0.5] * len(labels), [0] * len(labels)
    order = sorted(range(len(fold)),
                   key=lambda i: (bool(targets[i]), derive_seed(seed, "fold", i)))
    for place, i in enumerate(order):
        fold[i] = place % GATE_FOLDS
    for number in progress_bar(f"gate, out of fold ({kind})", "fold", range(GATE_FOLDS)):
        known = [i for i, f in enumerate(fold) if f != number]
        held = [i for i, f in enumerate(fold) if f == number]
        if known and held:
            gate = Gate(features.shape[1], seed).to(features.device)
            names = [personas[i] for i in known]
            train_gate(gate, features[known], gate_targets(labels[known], names, kind))
            for i, p in zip(held, probabilities(gate, features[held])):
                probability[i] = p
    return probability, fold


def choose_thresholds(probability: Sequence[float], targets: Tensor, fold: Sequence[int],
                      traffic: Sequence[float], fixed: float | None,
                      rate: float) -> dict[int | None, float]:
    """The threshold for the queries of each fold, chosen without them, and under None that of the
    run.

    A `fixed` one is taken as it is. Else it is the one that best separates the queries whose target
    is above average from the rest (`youden_threshold`): wins from losses, or personas with a high
    win rate from the others. But it is never so low that more than `rate` of the traffic opens the
    gate.

    Args:
        probability, fold: what `out_of_fold` gives.
        targets: [n], what the gate learned.
        traffic: the probabilities of ordinary traffic.
    """
    if fixed is not None:
        return dict.fromkeys((*fold, None), fixed)
    wanted = (targets > targets.mean()).tolist()
    lowest, thresholds = upper_quantile(traffic, rate), {}
    for left_out in (*set(fold), None):
        others = [i for i, f in enumerate(fold) if f != left_out]
        best = youden_threshold([probability[i] for i in others], [wanted[i] for i in others])
        thresholds[left_out] = max(best, lowest)
    return thresholds


@torch.no_grad()
def probabilities(gate: Gate, features: Tensor) -> list[float]:
    """A gate's probabilities [n] of features [n, d]."""
    return gate(features).sigmoid().tolist()


def open_share(probability: Sequence[float], threshold: float) -> float | None:
    """The share of texts for which a gate opens, by their probabilities; None of none."""
    if not probability:
        return None
    return sum(p >= threshold for p in probability) / len(probability)
