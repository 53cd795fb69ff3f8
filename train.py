"""Run PRISM: stages 1-3 (bootstrap.py), then the gate and the adapter, then a report.

    python train.py --quick

4. `train_gate`: a small MLP learns t(x) from what the gate layer makes of the bare prompt.
5. `train_lora`: on the queries the persona won, the adapter learns to answer WITHOUT the persona
   as the base model answers WITH it: exact forward KL over the whole vocabulary, on the answer's
   own sampled tokens, end of turn included.

A fifth of the queries is held out from stage 5; the gate is scored out of fold and then fitted on
all. Everything under --out can be continued after a kill by running the same command again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm

from support.benchmarks import lettered, read_gsm8k, read_harmbench, read_mmlu, read_mt_bench
from bootstrap import (SCORE_LOGITS, SCORE_TOKENS, SLOTS, LetterJudge, LikelihoodJudge, Pair,
                       Persona, RunFolder, Verdict, answer_room, bill, choose_judge, drop_chance,
                       hidden_states, known_truth, load_personas, peak_memory, persona_hash,
                       split_chunks, total, won_pairs, write_answers, write_queries,
                       write_verdicts)
from generate import derive_seed, pad
from model import Config, Transformer, choose_device, choose_dtype, fingerprint, load
from prism import (ADAPTER_FILE, GATE_FILE, KL_CHUNK_ELEMENTS, PRISM, PRISM_FILE, Gate,
                   answer_loss, distill_loss, gate_loss, read_settings, read_tensors)
from support.distributed import (HEAD_START, broadcast, each, main_first, processes, rank,
                                 sum_gradients, world)
from support.hub import (DEFAULT_MODEL, InputError, Parser, base_source, check_file, exit_status,
                         read_json, resolve, resolve_config, write_file)
from support.report import summarize, table, write_report
from tokenizer import Tokenizer

STAGES = ("queries", "answers", "verdicts", "gate", "lora")
FILES = {"queries": ("candidates.jsonl", "queries.jsonl"),
         "answers": ("answers.jsonl", "answers.[0-9]*.jsonl"),
         "verdicts": ("verdicts.jsonl",), "gate": (GATE_FILE,),
         "lora": ("checkpoint.safetensors", ADAPTER_FILE, "adapter_config.json", PRISM_FILE,
                  "report.png", "report.md")}
# The first stage whose result depends on a setting; what comes before it can be kept.
FIRST_STAGE = {"max_new_tokens": "answers", "judge": "verdicts", "judge_model": "verdicts",
               "judge_fingerprint": "verdicts",
               "votes": "verdicts", "drop_chance": "gate", "gate_layer": "gate",
               "gate_pool": "gate", "gate_threshold": "gate", "rank": "lora", "alpha": "lora",
               "epochs": "lora", "lr": "lora", "batch_size": "lora", "max_len": "lora",
               "kd_temperature": "lora", "dropout": "lora", "loss": "lora"}
PAPER = {"queries": 50, "max_new_tokens": 512, "epochs": 10, "batch_size": 16}
QUICK = {"queries": 8, "max_new_tokens": 96, "epochs": 6, "batch_size": 4}
HELD_OUT = 5  # one query in so many is held out
GATE_FOLDS = 5
GATE_DEPTH = 6  # the gate reads the output of layer (number of layers) // 6, unless told otherwise
TRANSFER_LIMIT = 400  # prompts of each real set that --transfer-data measures
GATE_STEPS, GATE_BATCH, GATE_LR, GATE_DECAY = 300, 64, 1e-3, 0.01
WARMUP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY, CLIP = 0.01, 1.0
PLAN_PROMPT = 512  # tokens of persona and query that --dry-run plans for
PLAN_ROW = 1024  # tokens of a training row it plans for: the default --max-len
TRAIN_TOKENS = 4096  # padded tokens in one micro-batch
RECOMPUTE_ABOVE = 4 * 2**30  # bytes of activations from which layers are computed twice instead
CHECKPOINT_EVERY = 20  # optimizer steps


# --------------------------------------------------------------------------------------------------
# Stage 4: the gate


def hold_out(verdicts: Sequence[Verdict], seed: int) -> set[tuple[str, int]]:
    """The (persona, index) pairs that stage 5 is not fitted on: a fifth of each class, at least one
    where there are two, picked by a hash of their names."""
    held = set()
    for target in (0, 1):
        keys = sorted(((v.persona, v.index) for v in verdicts if v.target == target),
                      key=lambda key: derive_seed(seed, "split", *key))
        count = round(len(keys) / HELD_OUT) or int(len(keys) > 1)
        held.update(keys[:count])
    return held


def gate_features(prism: PRISM, tokenizer: Tokenizer,
                  queries: Sequence[str]) -> tuple[Tensor, int]:
    """h(x) [n, d] of each query, by the very function that routes at inference; and the tokens
    read."""
    parts, tokens, mean = [], 0, prism.gate_pool == "mean"
    for i in range(0, len(queries), GATE_BATCH):
        rendered = [tokenizer.render([{"role": "user", "content": q}], return_user_mask=mean)
                    for q in queries[i:i + GATE_BATCH]]
        ids, lengths = pad([r[0] if mean else r for r in rendered], prism.net.device)
        mask = pad([r[1] for r in rendered], prism.net.device)[0].bool() if mean else None
        with torch.inference_mode():
            parts.append(prism.features(ids, lengths, mask))
        tokens += int(lengths.sum())
    return torch.cat(parts).clone(), tokens


def train_gate(gate: Gate, features: Tensor, targets: Tensor, seed: int,
               silent: bool = False) -> float:
    """Stage 4: fit a gate to targets [n] in [0, 1] by balanced binary cross-entropy.

    Every batch draws both classes (t above one half, or not) equally often: the minority is
    resampled. Returns the mean loss of the last tenth of the steps.
    """
    gate.mean.copy_(features.mean(0))
    gate.deviation.copy_(features.std(0, correction=0).clamp(min=1e-4))
    generator = torch.Generator().manual_seed(derive_seed(seed, "gate"))
    classes = [torch.nonzero((targets > 0.5) == side).flatten().cpu() for side in (False, True)]
    classes = [c for c in classes if len(c)]
    optimizer = torch.optim.AdamW(gate.mlp.parameters(), lr=GATE_LR, weight_decay=GATE_DECAY)
    losses = []
    for _ in tqdm(range(GATE_STEPS), desc="gate", unit="step", dynamic_ncols=True, disable=silent):
        rows = torch.cat([c[torch.randint(len(c), (GATE_BATCH // len(classes),),
                                          generator=generator)] for c in classes])
        rows = rows.to(features.device)
        loss = gate_loss(gate(features[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()  # the only wait for the device
    wrong = [step for step, loss in enumerate(losses) if not math.isfinite(loss)]
    if wrong:
        raise InputError(f"stage 4, step {wrong[0]}: the gate's loss is {losses[wrong[0]]}; what "
                         "it reads is not finite, try --dtype float32")
    tail = losses[-GATE_STEPS // 10:]
    return sum(tail) / len(tail)


def out_of_fold(features: Tensor, targets: Tensor, seed: int) -> tuple[list[float], list[int]]:
    """The probability of every query under a gate fitted without it, and its fold (5-fold
    cross-validation).

    Folds are dealt out within each class, in an order that depends on the seed alone.
    """
    n = len(targets)
    order = sorted(range(n), key=lambda i: (bool(targets[i] > 0.5), derive_seed(seed, "fold", i)))
    fold = torch.empty(n, dtype=torch.long, device=targets.device)
    fold[torch.tensor(order, device=targets.device)] = (
        torch.arange(n, device=targets.device) % GATE_FOLDS)
    probability = torch.full((n,), 0.5, device=targets.device)
    for number in range(GATE_FOLDS):
        held = fold == number
        if held.any() and not held.all():
            gate = Gate(features.shape[1], seed).to(features.device)
            train_gate(gate, features[~held], targets[~held], seed, silent=True)
            with torch.no_grad():
                probability[held] = gate(features[held]).sigmoid()
    return probability.tolist(), fold.tolist()


def gate_scores(probability: Sequence[float], targets: Sequence[int],
                thresholds: Sequence[float]) -> dict:
    """Accuracy at each query's threshold, the majority rate beside it, AUC, confusion matrix."""
    n, positives = len(targets), sum(targets)
    opened = [int(p >= t) for p, t in zip(probability, thresholds)]
    pairs = Counter(zip(targets, opened))
    area, low, high = auc(*by_class(probability, targets))
    return {"n": n, "accuracy": (pairs[0, 0] + pairs[1, 1]) / n if n else None,
            "majority": max(positives, n - positives) / n if n else None,
            "auc": area, "auc_interval": [low, high],
            "confusion": {"true_open": pairs[1, 1], "false_open": pairs[0, 1],
                          "true_closed": pairs[0, 0], "false_closed": pairs[1, 0]}}


def by_class(probability: Sequence[float],
             targets: Sequence[int]) -> tuple[list[float], list[float]]:
    """The probabilities of the positive and of the negative queries."""
    return ([p for p, t in zip(probability, targets) if t],
            [p for p, t in zip(probability, targets) if not t])


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple:
    """Area under the ROC curve and its 95% interval (Hanley and McNeil 1982); None without both
    classes."""
    m, n = len(positive), len(negative)
    if not (m and n):
        return None, None, None
    wins = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    area = wins / (m * n)
    a = (wins + 0.5) / (m * n + 1)  # the formula's variance is 0 at 0 and 1, however few there are
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (m - 1) * (q1 - a**2) + (n - 1) * (q2 - a**2)) / (m * n)
    half = 1.96 * math.sqrt(max(variance, 0.0))
    return area, max(area - half, 0.0), min(area + half, 1.0)


def roc(probability: Sequence[float], targets: Sequence[int]) -> list[list[float]]:
    """[threshold, false-open rate, true-open rate] at every distinct probability, from the top."""
    yes, no = max(sum(targets), 1), max(len(targets) - sum(targets), 1)
    return [[p, sum(q >= p and not t for q, t in zip(probability, targets)) / no,
             sum(q >= p and t for q, t in zip(probability, targets)) / yes]
            for p in sorted(set(probability), reverse=True)]


def choose_threshold(probability: Sequence[float], targets: Sequence[int]) -> float:
    """The threshold whose true-open rate exceeds its false-open rate most (Youden's J), halfway to
    the next lower probability; 0.5 where the AUC cannot be told from chance."""
    area, low, _ = auc(*by_class(probability, targets))
    if area is None or low <= 0.5:
        return 0.5
    points = roc(probability, targets)
    best = max(range(len(points)), key=lambda i: points[i][2] - points[i][1])
    below = points[best + 1][0] if best + 1 < len(points) else 0.0
    return (points[best][0] + below) / 2


def gate_bill(prism: PRISM, prompts: int, tokens: int) -> dict:
    """What it cost to read the gate's features: only the layers up to it ran."""
    row = bill(prism.net, prompts, tokens)
    return row | {"flops": row["flops"] * (prism.gate_layer + 1) // len(prism.net.layers)}


def run_gate(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, pairs: Sequence[Pair],
             verdicts: Sequence[Verdict], args: argparse.Namespace) -> None:
    """Stage 4 as a resumable step: score the gate out of fold, then fit the one that is kept on all
    queries."""
    done = [m for m in run.metrics() if m["stage"] == "gate"]
    if done and (run.path / GATE_FILE).exists():
        prism.load_gate(run.path, done[0].get("gate_sha256"))
        prism.threshold = done[0]["threshold"]
        return
    begun = time.perf_counter()
    features, tokens = gate_features(prism, tokenizer, [p.query for p in pairs])
    # The share of votes is a soft target; with one vote it is t(x) itself.
    targets = torch.tensor([float(v.share) for v in verdicts], device=features.device)
    labels = [v.target for v in verdicts]
    probability, fold = out_of_fold(features, targets, args.seed)

    def chosen(left_out: int | None) -> float:
        """The threshold from all queries outside of a fold."""
        kept = [i for i, f in enumerate(fold) if f != left_out]
        return args.gate_threshold if args.gate_threshold is not None else choose_threshold(
            [probability[i] for i in kept], [labels[i] for i in kept])

    # A query's decision is scored at a threshold that it had no part in; the pooled one routes.
    by_fold = {f: chosen(f) for f in set(fold)}
    prism.threshold = chosen(None)
    loss = train_gate(prism.gate, features, targets, args.seed)
    run.record("gate", 0, loss=loss, folds=GATE_FOLDS, threshold=prism.threshold,
               gate_sha256=prism.save_gate(run.path),
               **gate_scores(probability, labels, [by_fold[f] for f in fold]),
               roc=roc(probability, labels),
               **gate_bill(prism, len(pairs), tokens),
               seconds=round(time.perf_counter() - begun, 3), peak_memory=peak_memory())


# --------------------------------------------------------------------------------------------------
# How the gate treats real prompts


def read_transfer_sets(folder: Path) -> dict[str, list[str]]:
    """Real prompts from HarmBench, MT-Bench, MMLU and GSM8K files as their authors publish them:
    name -> user messages, at most TRANSFER_LIMIT each.

    Raises:
        InputError: HarmBench or MT-Bench is missing (without both there is nothing to compare), or
            a file is not what its name says.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--transfer-data)")
    harmful = read_harmbench(folder, None)
    sets = {name: [i.turns[0] for i in harmful if i.category == kind] for name, kind in (
        ("harmful", "standard"), ("harmful, with context", "contextual"))}
    sets["chat"] = [i.turns[0] for i in read_mt_bench(folder, None)]
    # Without the instruction to answer by a letter, which alone would give these away.
    sets["multiple choice"] = [f"{i.references[0]}\n{lettered(i.options)}"
                               for i in read_mmlu(folder, None)]
    sets["maths"] = [i.turns[0] for i in read_gsm8k(folder, None)]
    if not (sets["harmful"] and sets["chat"]):
        raise InputError(f"{folder}: --transfer-data needs harmbench/*.csv and "
                         "mt_bench/question.jsonl in it")
    # evenly spaced, so that every MMLU subject is there
    return {name: prompts[::math.ceil(len(prompts) / TRANSFER_LIMIT)]
            for name, prompts in sets.items() if prompts}


def lacks_transfer(run: RunFolder, args: argparse.Namespace) -> bool:
    """Whether --transfer-data asks for a measurement that the run does not have."""
    done = [m["data"] for m in run.metrics() if m["stage"] == "transfer"]
    return args.transfer_data is not None and done != [str(args.transfer_data)]


def run_transfer(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, pairs: Sequence[Pair],
                 args: argparse.Namespace) -> None:
    """Measure, never train: what the gate does with real prompts that nothing here has seen.

    Beside the run's own gate, whose labels are the verdicts, one probe a persona: a gate that tells
    that persona's queries from all others'. A probe shows what the queries alone would let a gate
    learn, whatever the judge thought of the answers.
    """
    begun, context = time.perf_counter(), prism.net.config.max_position_embeddings
    sets = {name: [p for p in prompts if len(tokenizer.render(
        [{"role": "user", "content": p}])) < context]
        for name, prompts in read_transfer_sets(args.transfer_data).items()}
    real, read = {}, 0
    for name, prompts in sets.items():
        real[name], tokens = gate_features(prism, tokenizer, prompts)
        read += tokens
    features, tokens = gate_features(prism, tokenizer, [p.query for p in pairs])
    names = list(dict.fromkeys(p.persona for p in pairs))
    gates = {"the gate": (prism.gate, prism.threshold)}
    for name in names if len(names) > 1 else ():
        targets = torch.tensor([float(p.persona == name) for p in pairs], device=features.device)
        threshold = choose_threshold(out_of_fold(features, targets, args.seed)[0],
                                     targets.int().tolist())
        probe = Gate(features.shape[1], args.seed).to(features.device)
        train_gate(probe, features, targets, args.seed, silent=True)
        gates[name] = probe, threshold
    rows = {}
    for name, (gate, threshold) in gates.items():
        with torch.no_grad():
            p = {kind: gate(h).sigmoid().tolist() for kind, h in real.items()}
        area, low, high = auc(p["harmful"], p["chat"])
        rows[name] = {"auc": area, "auc_interval": [low, high], "threshold": threshold,
                      "routed": {k: sum(x >= threshold for x in v) / len(v) for k, v in p.items()}}
    run.record("transfer", 0, data=str(args.transfer_data),
               sets={k: len(v) for k, v in sets.items()}, gates=rows,
               **gate_bill(prism, sum(map(len, sets.values())) + len(pairs), read + tokens),
               seconds=round(time.perf_counter() - begun, 3))


# --------------------------------------------------------------------------------------------------
# Stage 5: the adapter


@dataclass
class Sample:
    """One distillation sample: the bare prompt and answer ids, where the answer starts, and the
    teacher's post-norm hidden states [n, d] at the positions that predict the n answer tokens."""

    name: str
    ids: list[int]
    start: int
    teacher: Tensor

    @property
    def answer_tokens(self) -> int:
        """Number of answer tokens n."""
        return len(self.ids) - self.start


def distill_samples(net: Transformer, tokenizer: Tokenizer, personas: Sequence[Persona],
                    pairs: Sequence[Pair], max_len: int) -> list[Sample]:
    """Pair every won query with its teacher: the base weights READING the persona.

    The teacher's hidden states are exact (the head's own input) and take 2 d bytes a token; its
    logits would take 2 V. Answers are cut so that the longer, teacher's sequence fits in max_len.
    """
    texts = {p.name: p.text for p in personas}
    students, teachers, answers = [], [], []
    for pair in pairs:
        user = {"role": "user", "content": pair.query}
        students.append(tokenizer.render([user]))
        teachers.append(tokenizer.render([{"role": "system", "content": texts[pair.persona]},
                                          user]))
        answers.append(pair.expert_ids[:max(max_len - len(teachers[-1]), 0)])
    states = teacher_states(net, teachers, answers)
    return [Sample(f"{p.persona}/{p.index}", [*s, *a], len(s), h)
            for p, s, a, h in zip(pairs, students, answers, states) if a]


def teacher_states(net: Transformer, prompts: Sequence[list[int]],
                   answers: Sequence[list[int]]) -> list[Tensor]:
    """The states [n, d] from which the base predicts each answer's n tokens after its prompt.

    Chunks are dealt out to the processes and then shown to all: who trains on what differs from
    epoch to epoch.
    """
    chunks = split_chunks(list(zip(prompts, answers)))
    states: list[Tensor] = []
    found = {}
    for i in range(rank(), len(chunks), world()):
        mine, _ = hidden_states(net, [[*p, *a] for p, a in chunks[i]],
                                [len(p) - 1 for p, _ in chunks[i]])
        found[i] = torch.cat([h[:-1] for h in mine]).cpu()  # off the device as soon as possible
    for i, chunk in enumerate(chunks):
        sizes = [len(a) for _, a in chunk]
        empty = torch.empty(sum(sizes), net.config.hidden_size, dtype=net.dtype)
        states += broadcast(found.get(i, empty), i % world()).split(sizes)
    return states


def activation_bytes(config: Config, tokens: int, rank: int) -> int:
    """At most what `tokens` leave behind for the backward pass, if every layer is adapted.

    In the model's dtype: the inputs of the projections (of `down_proj` its two halves), queries and
    keys, the whole qkv they came from, and LoRA's h with its dropout mask. In fp32: what goes into
    each norm, also those of queries and keys, the norms' factors and attention's normalisers. Where
    scores are capped, these too (no kernel computes them again), in rows of PLAN_ROW tokens.
    """
    size, heads, kv_heads = config.dtype.itemsize, config.num_heads, config.num_kv_heads
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    norms = len([name for name in config.norms if name])
    per_layer = size * (2 * config.hidden_size + 2 * config.intermediate_size + 3 * (q + kv)
                        + 14 * rank)  # p * rank wide for p = 3, 1, 2, 1 stacked ones; h and mask
    per_layer += 4 * (norms * (config.hidden_size + 1) + heads)
    if config.qk_norm:
        per_layer += 4 * (q + kv + heads + kv_heads)
    if config.attention_cap is not None:  # fp32 after tanh and after softmax, and rounded
        per_layer += heads * PLAN_ROW * (8 + size)
    return tokens * config.num_layers * per_layer


def sample_loss(prism: PRISM, samples: Sequence[Sample], temperature: float,
                generator: torch.Generator | None = None, loss: str = "kl") -> Tensor:
    """Summed loss of a micro-batch: the student reads the bare prompt, all rows gated. "kl" is
    PRISM's; "sft" is the cross-entropy of the won answers, the paper's baseline."""
    ids, _ = pad([s.ids for s in samples], prism.net.device)
    recompute = activation_bytes(prism.net.config, TRAIN_TOKENS, prism.rank) > RECOMPUTE_ABOVE
    hidden = prism.net.hidden(ids, prism.adapter, len(samples), generator, recompute)
    student = torch.cat([hidden[i, s.start - 1:len(s.ids) - 1] for i, s in enumerate(samples)])
    if loss == "sft":
        answers = [i for s in samples for i in s.ids[s.start:]]
        return answer_loss(student, torch.tensor(answers, device=student.device), prism.net)
    teacher = torch.cat([s.teacher for s in samples]).to(prism.net.device)
    return distill_loss(student, teacher, prism.net, temperature)


def micro_batches(samples: Sequence[Sample], tokens: int = TRAIN_TOKENS) -> list[list[Sample]]:
    """Split samples, by length, into groups of at most `tokens` padded tokens."""
    groups: list[list[Sample]] = []
    for s in sorted(samples, key=lambda s: (len(s.ids), s.name)):
        if groups and (len(groups[-1]) + 1) * len(s.ids) <= tokens:
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


@torch.no_grad()
def held_out_kl(prism: PRISM, samples: Sequence[Sample]) -> float | None:
    """Mean forward KL to the teacher, nats per answer token, at temperature 1, no dropout."""
    tokens, groups = sum(s.answer_tokens for s in samples), micro_batches(samples)
    summed = sum(each(lambda: sum(float(sample_loss(prism, group, 1.0))
                                  for group in groups[rank()::world()])))
    return summed / tokens if tokens else None


def batch_gradient(prism: PRISM, batch: Sequence[Sample], step: int,
                   args: argparse.Namespace) -> float:
    """Add the gradient of a batch's loss to A and B: the summed token loss over the answer tokens
    of the whole batch, however it is split into micro-batches and processes. Returns that loss."""
    tokens, summed = sum(s.answer_tokens for s in batch), 0.0
    mine = sorted(batch, key=lambda s: (len(s.ids), s.name))[rank()::world()]
    for number, group in enumerate(micro_batches(mine)):
        generator = torch.Generator(prism.net.device).manual_seed(
            derive_seed(args.seed, "dropout", step, number * world() + rank()))
        loss = sample_loss(prism, group, args.kd_temperature, generator, args.loss)
        loss.backward()
        summed += loss.item()
    sum_gradients(prism.adapter.parameters())
    for p in prism.adapter.parameters():
        if p.grad is not None:
            p.grad.div_(tokens)  # only here, in fp32: in fp16 a gradient this small would be 0
    return sum(each(lambda: summed)) / tokens


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first steps, then linear decay to zero after the last."""
    warmup = max(1, round(WARMUP * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def train_lora(run: RunFolder, prism: PRISM, samples: Sequence[Sample],
               args: argparse.Namespace) -> None:
    """Stage 5: distil the persona's answers into prism.adapter, from the last checkpoint on.

    A, B and the optimizer are fp32, and the same in every process.

    Raises:
        InputError: a loss or gradient that is not finite; the last checkpoint is kept.
    """
    parameters = list(prism.adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY)
    per_epoch = math.ceil(len(samples) / args.batch_size)
    steps = per_epoch * args.epochs
    first = load_checkpoint(run.path, prism, optimizer)
    bar = tqdm(total=steps, initial=first, desc="lora", unit="step", dynamic_ncols=True,
               disable=not run.writes)
    for step in range(first, steps):
        begun = time.perf_counter()
        epoch, at = divmod(step, per_epoch)
        order = sorted(samples, key=lambda s: derive_seed(args.seed, "epoch", epoch, s.name))
        batch = order[at * args.batch_size:(at + 1) * args.batch_size]
        tokens = sum(s.answer_tokens for s in batch)
        loss = batch_gradient(prism, batch, step, args)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(f"stage 5, step {step}: loss {loss}, gradient norm {norm} "
                             f"on {', '.join(s.name for s in batch)}; try a lower --lr or "
                             "--dtype float32 (the last checkpoint is kept)")
        rate = learning_rate(step, steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        run.record("lora", step, loss=loss, gradient_norm=norm, lr=rate,
                   samples=len(batch), answer_tokens=tokens,
                   # forward and back to the input, and three products with the head a token; the
                   # frozen weights get no gradient
                   flops=prism.net.flops(2 * sum(len(s.ids) for s in batch), 3 * tokens),
                   seconds=round(time.perf_counter() - begun, 3))
        bar.update()
        bar.set_postfix({args.loss: f"{loss:.4f}"})
        if run.writes and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
            save_checkpoint(run.path, prism, optimizer, step + 1)
    bar.close()


def save_checkpoint(folder: Path, prism: PRISM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Adapter, both AdamW moments and the step, with a checksum. There is no random state to keep:
    every draw is seeded by the step it belongs to."""
    tensors = {}
    for i, p in enumerate(prism.adapter.parameters()):
        state = optimizer.state[p]
        tensors |= {f"{i}.value": p, f"{i}.mean": state["exp_avg"], f"{i}.square":
                    state["exp_avg_sq"]}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    about = {"step": str(step), "sha256": checksum(tensors, step)}
    write_file(folder / "checkpoint.safetensors", to_safetensors(tensors, about))


def checksum(tensors: dict[str, Tensor], step: int) -> str:
    """SHA-256 of a checkpoint: of the file as it is without this very entry."""
    return hashlib.sha256(to_safetensors(tensors, {"step": str(step)})).hexdigest()


def load_checkpoint(folder: Path, prism: PRISM, optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_checkpoint` wrote and return its step; 0 if there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    check_file(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        about = json.loads(data[8:8 + length])["__metadata__"]
        step, tensors = int(about["step"]), parse_safetensors(data)
        for i, p in enumerate(prism.adapter.parameters()):
            for name in (f"{i}.value", f"{i}.mean", f"{i}.square"):
                if tensors[name].shape != p.shape or not bool(tensors[name].isfinite().all()):
                    raise ValueError(f"{name} is of another shape, or not finite")
        if step < 1:
            raise ValueError(f"step {step}")
        if about["sha256"] != checksum(tensors, step):
            raise ValueError("its SHA-256 is another")
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{path}: not a checkpoint of this run ({error}); delete it and stage 5 "
                         "starts again") from None
    with torch.no_grad():
        for i, p in enumerate(prism.adapter.parameters()):
            p.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {"step": torch.tensor(float(step)),
                                  "exp_avg": tensors[f"{i}.mean"].to(p.device),
                                  "exp_avg_sq": tensors[f"{i}.square"].to(p.device)}
    return step


def check_adapter(folder: Path) -> None:
    """InputError if a run's adapter is not as it was written; a run may have ended without one."""
    if (folder / PRISM_FILE).exists():
        read_tensors(folder / ADAPTER_FILE, read_settings(folder)["sha256"].get(ADAPTER_FILE))


def run_lora(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: Sequence[Persona],
             won: Sequence[Pair], held: set, args: argparse.Namespace) -> None:
    """Stage 5 as a resumable step: cache the teacher, train, measure the held-out KL."""
    done = [m for m in run.metrics() if m["stage"] == "kl"]
    if done and (run.path / PRISM_FILE).exists():  # the last file that `save` writes
        (run.path / "checkpoint.safetensors").unlink(missing_ok=True)
        check_adapter(run.path)
        return
    begun = time.perf_counter()
    samples = distill_samples(prism.net, tokenizer, personas, won, args.max_len)
    names = {f"{persona}/{index}" for persona, index in held}
    fit = [s for s in samples if s.name not in names]
    test = [s for s in samples if s.name in names]
    if not fit:
        raise InputError(f"no answer fits in --max-len {args.max_len} beside its persona; raise it")
    before = held_out_kl(prism, test)  # B is zero: this is the base model
    around = time.perf_counter() - begun
    train_lora(run, prism, fit, args)
    begun = time.perf_counter()
    after = held_out_kl(prism, test)
    if not run.writes:
        return
    steps = [m for m in run.metrics() if m["stage"] == "lora"]
    run.record("kl", 0, held_out_samples=len(test), before=before, after=after,
               answer_tokens=sum(s.answer_tokens for s in test),
               prompts=len(samples), tokens_trained=sum(m["answer_tokens"] for m in steps),
               flops=sum(m["flops"] for m in steps),
               # an interrupted run's steps count as well
               seconds=round(around + time.perf_counter() - begun
                             + sum(m["seconds"] for m in steps), 3), peak_memory=peak_memory())
    prism.save(run.path)
    (run.path / "checkpoint.safetensors").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# --dry-run


def parameter_counts(config: Config, args: argparse.Namespace) -> tuple[int, int]:
    """Numbers of the base and of the adapter, from their shapes: nothing is loaded."""
    with torch.device("meta"):
        net = Transformer(config)
    gate_layer = config.num_layers // GATE_DEPTH if args.gate_layer is None else args.gate_layer
    adapter = PRISM(net, args.rank, args.alpha, gate_layer).adapter
    return tuple(sum(p.numel() for p in part.parameters()) for part in (net, adapter))


def memory_plan(config: Config, counts: tuple[int, int], rank: int, new_tokens: int,
                slots: int = SLOTS,
                train_tokens: int = TRAIN_TOKENS) -> dict[str, dict[str, int]]:
    """Stage -> part -> bytes on the device; `counts` as of `parameter_counts`."""
    size, d, wide = config.dtype.itemsize, config.hidden_size, config.intermediate_size
    weights, trained = counts[0] * size, counts[1]
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size  # keys and values
    reading = (4 * d + 3 * wide) * size  # what one layer holds of a token while it computes
    if config.attention_cap is not None:  # its scores, three times in fp32
        reading += config.num_heads * PLAN_PROMPT * 12
    activations = activation_bytes(config, train_tokens, rank)
    if activations > RECOMPUTE_ABOVE:  # every layer's input, and all of one layer
        activations = (config.num_layers * train_tokens * d * size
                       + activations // config.num_layers)
    logits = 3 * 4 * config.vocab_size  # fp32 logits of a row, probabilities, running sums
    return {
        "1-2 answers": {"weights": weights,
                        "KV slots": slots * (PLAN_PROMPT + new_tokens) * token,
                        "reading prompts": slots * PLAN_PROMPT * (reading + token),
                        "sampling": slots * logits},
        "3 verdicts": {"weights": weights, "scoring batch": SCORE_TOKENS * (reading + 3 * token),
                       "logits": 3 * 4 * SCORE_LOGITS},
        "4 gate": {"weights": weights, "reading prompts": GATE_BATCH * PLAN_PROMPT * reading},
        # fp32 master, gradient and two moments, and the cast copy
        "5 adapter": {"weights": weights, "LoRA and optimizer": trained * (16 + size),
                      "activations": activations,
                      "loss chunk": KL_CHUNK_ELEMENTS * (3 * 4 + 2 * size)}}  # on a GPU


def dry_run(args: argparse.Namespace) -> int:
    """Print the memory plan for --model (an id, a folder, or a config.json)."""
    path = resolve_config(args.model)
    config = Config.from_json(read_json(path), str(path))
    config.dtype = choose_dtype("bfloat16" if args.dtype == "auto" else args.dtype,
                                torch.device("cpu"))
    sizes = config, parameter_counts(config, args), args.rank, args.max_new_tokens
    plan = memory_plan(*sizes)
    parts = list(dict.fromkeys(part for stage in plan.values() for part in stage))
    print(f"{path}: {SLOTS} slots, {TRAIN_TOKENS} training tokens a micro-batch, GiB:\n")
    print(table(("stage", *parts, "sum"), [
        [name, *(f"{stage[p] / 2**30:.2f}" if p in stage else "" for p in parts),
         f"{sum(stage.values()) / 2**30:.2f}"] for name, stage in plan.items()]))

    def largest(stage: str, name: str, limit: float) -> int | str:
        fitting = [n for n in (2**i for i in range(17)) if sum(memory_plan(
            *sizes, **{name: n})[stage].values()) <= limit]
        return max(fitting, default="does not fit")

    print("\nWhether it fits, and the most that would, with 1 GiB left to the driver:\n")
    rows = []
    for gigabytes in [args.gpu_memory] if args.gpu_memory else [24, 40, 80]:
        limit = (gigabytes - 1) * 2**30
        fits = all(sum(stage.values()) <= limit for stage in plan.values())
        rows.append([f"{gigabytes:g} GB", "yes" if fits else "no",
                     largest("1-2 answers", "slots", limit),
                     largest("5 adapter", "train_tokens", limit)])
    print(table(("GPU", "all five stages fit", "most slots", "most training tokens"), rows))
    return 0


# --------------------------------------------------------------------------------------------------
# The command


def parser() -> argparse.ArgumentParser:
    """The command line of train.py. Defaults that --quick changes are filled in by `check`."""
    p = Parser(
        description="Run PRISM on a base model: write queries, answer them with and without each "
        "persona, self-verify, train the gate, distil the adapter. Exit status 0 done, 2 wrong "
        "input, 3 nothing to distil, 130 interrupted; the same command continues.")

    def add(group, name: str, default: object, text: str, **kwargs: object) -> None:
        shown = f"{text} (default: {PAPER[default]}; --quick: {QUICK[default]})" if (
            isinstance(default, str) and default in PAPER) else f"{text} (default: {default})"
        default = None if isinstance(default, str) and default in PAPER else default
        kind = {"type": type(default) if default is not None else int}
        group.add_argument(name, default=default, help=shown, **(kind | kwargs))

    run = p.add_argument_group("run")
    add(run, "--model", DEFAULT_MODEL, "model id or checkpoint folder")
    run.add_argument("--personas", type=Path, default=Path(__file__).parent / "personas",
                     help="folder of *.txt contexts (default: personas/ beside train.py)")
    run.add_argument("--out", type=Path, help="output folder (default: out/<model-slug>)")
    run.add_argument("--quick", action="store_true",
                     help="the whole method in minutes: fewer, shorter samples; other flags win")
    add(run, "--seed", 0, "seed of every random draw")
    add(run, "--device", "auto", "auto, cpu, cuda, ...")
    add(run, "--dtype", "auto", "auto, bfloat16, float32, float16")
    run.add_argument("--stop-after", choices=STAGES, help="end after this stage")
    run.add_argument("--dry-run", action="store_true",
                     help="print the memory plan of --model (or of a config.json) and end")
    run.add_argument("--gpu-memory", type=float, metavar="GB", help="plan for a GPU of this size")
    run.add_argument("--overwrite", action="store_true",
                     help="drop the results that other settings make invalid (all of a "
                     "complete run, if none differ)")
    data = p.add_argument_group("stages 1-3: the data")
    add(data, "--queries", "queries", "queries a persona")
    add(data, "--max-new-tokens", "max_new_tokens", "longest answer, in tokens")
    add(data, "--judge", "auto", "which judge; auto tests them first",
        choices=("auto", "letter", "likelihood"))
    data.add_argument("--judge-model", metavar="ID|DIR", help="judge with another model, which is "
                      "then no self-verification (default: the model itself)")
    add(data, "--votes", 1, "answer pairs a query; t(x) by majority, the share trains the gate")
    data.add_argument("--drop-chance", action="store_true", help="personas whose wins cannot be "
                      "told from chance contribute nothing (small runs lack the power)")
    gate = p.add_argument_group("stage 4: the gate")
    gate.add_argument("--gate-layer", type=int, help="decoder layer whose output the gate reads; "
                      "no layer up to it has an adapter (paper: 0; default: a sixth of the layers)")
    add(gate, "--gate-pool", "mean", "last prompt token (the paper), or mean over the user's text",
        choices=("last", "mean"))
    gate.add_argument("--gate-threshold", type=threshold, metavar="auto|P", help="probability from "
                      "which the adapter answers (paper: 0.5; default: auto, from the ROC curve)")
    gate.add_argument("--transfer-data", type=Path, metavar="DIR", help="measure the gate on real "
                      "prompts: harmbench/, mt_bench/, mmlu/, gsm8k/ as their authors publish them")
    lora = p.add_argument_group("stage 5: the adapter")
    add(lora, "--rank", 16, "LoRA rank")
    add(lora, "--alpha", 32.0, "LoRA alpha; the update is scaled by alpha / rank")
    add(lora, "--epochs", "epochs", "passes over the distill set")
    add(lora, "--lr", 2e-4, "peak learning rate")
    add(lora, "--batch-size", "batch_size", "samples in an optimizer step")
    add(lora, "--max-len", 1024, "longest training sequence, in tokens, persona included")
    add(lora, "--loss", "kl", "kl: distil the teacher's distributions (PRISM); sft: cross-entropy "
        "on the won answers, the baseline that evaluate.py --sft-adapter compares with",
        choices=("kl", "sft"))
    add(lora, "--kd-temperature", 1.0, "distillation temperature")
    add(lora, "--dropout", 0.05, "dropout on the LoRA branch")
    return p


def threshold(text: str) -> float | None:
    """--gate-threshold: "auto" is None."""
    return None if text == "auto" else float(text)


def check(args: argparse.Namespace) -> None:
    """Fill in what --quick decides and refuse values out of range."""
    for name, value in (QUICK if args.quick else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, low, high in (("queries", 1, 1e6), ("max_new_tokens", 1, 1e6), ("epochs", 1, 1e5),
                            ("batch_size", 1, 1e5), ("rank", 1, 1e4), ("max_len", 8, 1e7),
                            ("alpha", 1e-9, 1e9), ("lr", 1e-12, 1e3), ("dropout", 0, 0.99),
                            ("kd_temperature", 1e-3, 1e3), ("gate_threshold", 0, 1),
                            ("votes", 1, 1000), ("gpu_memory", 1, 1e5),
                            ("seed", -2**63, 2**63 - 1)):  # what torch takes
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be in "
                             f"[{low:g}, {high:g}]")
    if args.transfer_data:
        read_transfer_sets(args.transfer_data)
    if args.out is None:
        args.out = Path("out") / args.model.rstrip("/").split("/")[-1].lower()


def check_judge(args: argparse.Namespace, folder: Path, personas: Sequence[Persona]) -> str | None:
    """Refuse a judge that could not read the answers: after the stages before it, it would cost
    hours. Returns the fingerprint of --judge-model."""
    judging = resolve(args.judge_model) if args.judge_model else folder
    config = Config.from_json(read_json(judging / "config.json"), str(judging))
    context = config.max_position_embeddings
    room = answer_room(Tokenizer(judging), personas, args.judge, context)
    if args.max_new_tokens > room:
        left = f"room for answers of {room}" if room > 0 else "no room for an answer"
        raise InputError(f"{judging}: --max-new-tokens is {args.max_new_tokens}, but in a context "
                         f"of {context} tokens, beside the persona and the question, a judge has "
                         f"{left}; use fewer, shorter personas, or a --judge-model with a longer "
                         "context")
    return fingerprint(judging) if args.judge_model else None


def begin(run: RunFolder, settings: dict, overwrite: bool) -> None:
    """Compare the settings with those of an earlier run in this folder; record them.

    With `overwrite`, the results from the first stage that a changed setting touches are dropped.

    Raises:
        InputError: other settings without `overwrite`, or files of an unknown run.
    """
    path = run.path / "run.json"
    old = read_json(path).get("settings", {}) if path.exists() else None
    if old is not None and (not isinstance(old, dict) or not old):
        raise InputError(f"{path}: not a run's settings; choose another --out")
    known = [path.name for files in FILES.values() for f in files for path in run.path.glob(f)]
    if old is None and known and not overwrite:
        raise InputError(f"{run.path}: holds {known[0]} but no run.json; choose another --out, or "
                         "--overwrite")
    run.metrics()  # a damaged one is named before anything is written
    changed = [n for n in settings if old is not None and old.get(n) != settings[n]]
    if changed and not overwrite:
        n = changed[0]
        raise InputError(f"{run.path}: an earlier run has {n} = {old.get(n)}, now it is "
                         f"{settings[n]}; choose another --out, or --overwrite")
    if overwrite and (changed or old is None or (path.parent / "report.md").exists()):
        # Nothing changed and no report: an interrupted --overwrite, which goes on.
        first = min((STAGES.index(FIRST_STAGE.get(n, "queries")) for n in changed), default=0)
        run.forget(STAGES[first:], [f for s in STAGES[first:] for f in FILES[s]])
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "processes": world(), "threads": torch.get_num_threads()}
    text = json.dumps({"settings": settings, "versions": versions}, indent=1) + "\n"
    if run.writes and not (path.exists() and path.read_text(encoding="utf-8") == text):
        write_file(path, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Check everything that is cheap to check, then run."""
    with processes(choose_device(args.device)) as device:
        check(args)
        if args.dry_run:
            return dry_run(args) if rank() == 0 else 0
        return run_all(args, device)


def run_all(args: argparse.Namespace, device: torch.device) -> int:
    """Load the model, then run the stages in the locked output folder; returns the exit status."""
    personas = load_personas(args.personas)
    args.persona_names = [p.name for p in personas]
    dtype = choose_dtype(args.dtype, device)
    with main_first():  # it may have to fetch them
        folder = resolve(args.model)
        judge_fingerprint = check_judge(args, folder, personas)
    loaded: list = []  # `each` lets a process that cannot load end all, but hands on JSON only
    each(lambda: loaded.extend((load(folder, device, dtype), Tokenizer(folder))))
    net, tokenizer = loaded
    net.name = args.model
    if args.gate_layer is None:
        args.gate_layer = len(net.layers) // GATE_DEPTH
    prism = PRISM(net, args.rank, args.alpha, args.gate_layer, args.gate_pool, args.dropout,
                  args.seed)
    settings = {n: getattr(args, n) for n in (
        "model", "queries", "max_new_tokens", "judge", "judge_model", "votes", "drop_chance",
        "gate_layer", "gate_pool", "gate_threshold", "rank", "alpha", "epochs", "lr", "batch_size",
        "max_len", "kd_temperature", "dropout", "loss", "seed")}
    settings |= {"personas": [p.name for p in personas],
                 "personas_sha256": persona_hash(personas),
                 "base_source": base_source(folder, args.model),
                 "base_fingerprint": fingerprint(folder), "device": device.type,
                 "dtype": str(dtype).removeprefix("torch."), "slots": SLOTS,
                 "judge_fingerprint": judge_fingerprint}
    with main_first():
        run = RunFolder(args.out)
    try:
        with main_first():
            begin(run, settings, args.overwrite)
            # report.md is the last file a run writes
            complete = (run.path / "report.md").exists() and not lacks_transfer(run, args)
            if not complete:
                (run.path / "report.md").unlink(missing_ok=True)
        if complete:
            check_adapter(run.path)
            tell(run, f"{run.path}: complete already; --overwrite runs it again")
            return 0
        source = " (its 4-bit release)" if settings["base_source"].startswith("gguf") else ""
        several = f", {world()} processes" if world() > 1 else ""
        tell(run, f"{args.model}{source} on {device.type} in {settings['dtype']}{several}, "
             f"{len(personas)} personas, {args.queries} queries each, to {run.path}", sys.stderr)
        status = stages(run, prism, tokenizer, personas, args)
    finally:
        run.close()
    if run.writes:
        print(f"\n{summarize(run, args)}\n\nsaved in {run.path}")
    if status == 3:
        reason = ("no persona's wins can be told from chance" if args.drop_chance else
                  "the persona won no query")
        tell(run, f"nothing to distil: {reason}, so there is no adapter; the data is "
             "kept. Try more --queries, other personas, or a larger model.", sys.stderr)
    if status and not run.writes:
        time.sleep(HEAD_START)
    return status


def tell(run: RunFolder, text: str, file: TextIO | None = None) -> None:
    """Print a line, unless another process does."""
    if run.writes:
        print(text, file=file)


def stages(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: Sequence[Persona],
           args: argparse.Namespace) -> int:
    """The five stages in order; each takes up where it was left. Returns the exit status."""
    net, stop = prism.net, args.stop_after
    queries = write_queries(run, net, tokenizer, personas, args.queries, args.seed)
    if not queries:
        raise InputError("no candidate became a query (too short, no request, cut off, or likelier "
                         f"under another persona: see {run.path / 'candidates.jsonl'}); try more "
                         "--queries, other personas or a larger model")
    if stop == "queries":
        return 0
    votes = [write_answers(run, net, tokenizer, personas, queries, args.max_new_tokens, args.seed,
                           vote) for vote in range(args.votes)]
    pairs = votes[0]
    if stop == "answers":
        return 0
    verdicts = run_verdicts(run, net, tokenizer, personas, votes, args)
    if stop == "verdicts":
        return 0
    if args.drop_chance:
        judged = next(m for m in run.metrics() if m["stage"] == "judge")
        verdicts = drop_chance(verdicts, judged)
    won = won_pairs(votes, verdicts)
    if not won:
        return 3
    with main_first():  # the others load what it trained
        run_gate(run, prism, tokenizer, pairs, verdicts, args)
        if lacks_transfer(run, args):
            run_transfer(run, prism, tokenizer, pairs, args)
    if stop == "gate":
        return 0
    run_lora(run, prism, tokenizer, personas, won, hold_out(verdicts, args.seed), args)
    if not run.writes:
        return 0
    write_report(run, args)
    return 0


def run_verdicts(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                 personas: Sequence[Persona], votes: Sequence[Sequence[Pair]],
                 args: argparse.Namespace) -> list[Verdict]:
    """Stage 3 as a resumable step; only while it has work is a --judge-model in memory."""
    done = run.read("verdicts.jsonl", Verdict)
    if len(done) == len(votes[0]) and any(m["stage"] == "judge" for m in run.metrics()):
        return done
    with main_first():
        judge = pick_judge(run, net, tokenizer, personas, votes[0], args)
    return write_verdicts(run, judge, personas, votes)


def pick_judge(run: RunFolder, net: Transformer, tokenizer: Tokenizer, personas: Sequence[Persona],
               pairs: Sequence[Pair],
               args: argparse.Namespace) -> LetterJudge | LikelihoodJudge:
    """The judge that an earlier attempt chose, or the one that passes the self-test now."""
    judging = net, tokenizer
    if args.judge_model:
        folder = resolve(args.judge_model)
        judging = load(folder, net.device, net.dtype), Tokenizer(folder)
    done = [m for m in run.metrics() if m["stage"] == "judge"]
    if done:
        kinds = {kind.name: kind for kind in (LetterJudge, LikelihoodJudge)}
        return kinds[done[0]["chosen"]](*judging)
    print("testing the judge on pairs whose truth is known ...", file=sys.stderr)
    begun = time.perf_counter()
    cases, cost = known_truth(net, tokenizer, personas, pairs, args.max_new_tokens, args.seed)
    judge, tests = choose_judge(args.judge, *judging, cases)
    run.record("judge", 0, chosen=judge.name, forced=args.judge != "auto",
               model=args.judge_model, tests=tests,
               **total([cost, *(t.pop("bill") for t in tests)]),
               seconds=round(time.perf_counter() - begun, 3), peak_memory=peak_memory())
    return judge


if __name__ == "__main__":
    sys.exit(main())
