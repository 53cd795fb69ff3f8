"""Run PRISM: stages 1-3 (bootstrap.py), then the gate and the adapter, then a report.

    python train.py --quick

4. `train_gate`: a small MLP learns t(x) from what the gate layer makes of the bare prompt.
5. `train_lora`: on the queries the persona won, the adapter learns to answer WITHOUT the persona
   as the base model answers WITH it: exact forward KL over the whole vocabulary, on the answer's
   own sampled tokens, end of turn included.

One split of the queries into fit and held-out serves both stages. Everything under --out can be
continued after a kill by running the same command again.
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
from typing import Sequence

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm

from bootstrap import (LetterJudge, LikelihoodJudge, Pair, Persona, Query, RunFolder, Verdict,
                       choose_judge, hidden_states, load_personas, write_answers, write_queries,
                       write_verdicts)
from generate import derive_seed, pad
from hub import DEFAULT_MODEL, InputError, base_source, exit_status, read_json, resolve, write_file
from model import Transformer, choose_device, choose_dtype, fingerprint, load
from prism import ADAPTER_FILE, GATE_FILE, PRISM, PRISM_FILE, distill_loss, gate_loss
from tokenizer import Tokenizer

STAGES = ("queries", "answers", "verdicts", "gate", "lora")
FILES = {"queries": ("candidates.jsonl", "queries.jsonl"), "answers": ("answers.jsonl",),
         "verdicts": ("verdicts.jsonl",), "gate": (GATE_FILE,),
         "lora": ("checkpoint.safetensors", ADAPTER_FILE, "adapter_config.json", PRISM_FILE,
                  "report.md")}
# The first stage whose result depends on a setting; what comes before it can be kept.
FIRST_STAGE = {"max_new_tokens": "answers", "judge": "verdicts", "gate_layer": "gate",
               "gate_pool": "gate", "gate_threshold": "gate", "rank": "lora", "alpha": "lora",
               "epochs": "lora", "lr": "lora", "batch_size": "lora", "max_len": "lora",
               "kd_temperature": "lora", "dropout": "lora"}
PAPER = {"queries": 50, "max_new_tokens": 512, "epochs": 10, "batch_size": 16}
QUICK = {"queries": 8, "max_new_tokens": 96, "epochs": 6, "batch_size": 4}
HELD_OUT = 5  # one query in so many is held out
GATE_STEPS, GATE_BATCH, GATE_LR, GATE_DECAY = 300, 64, 1e-3, 0.01
WARMUP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY, CLIP = 0.01, 1.0
TRAIN_TOKENS = 4096  # padded tokens in one micro-batch
CHECKPOINT_EVERY = 20  # optimizer steps


# --------------------------------------------------------------------------------------------------
# Stage 4: the gate


def hold_out(verdicts: Sequence[Verdict], seed: int) -> set[tuple[str, int]]:
    """The (persona, index) pairs that neither stage 4 nor stage 5 is fitted on: a fifth of each
    class, at least one where there are two, picked by a hash of their names."""
    held = set()
    for target in (0, 1):
        keys = sorted(((v.persona, v.index) for v in verdicts if v.target == target),
                      key=lambda key: derive_seed(seed, "split", *key))
        count = round(len(keys) / HELD_OUT) or int(len(keys) > 1)
        held.update(keys[:count])
    return held


def gate_features(prism: PRISM, tokenizer: Tokenizer, queries: Sequence[str]) -> Tensor:
    """h(x) [n, d] of each query, by the very function that routes at inference."""
    mean = prism.gate_pool == "mean"
    parts = []
    for i in range(0, len(queries), GATE_BATCH):
        rendered = [tokenizer.render([{"role": "user", "content": q}], return_user_mask=mean)
                    for q in queries[i:i + GATE_BATCH]]
        ids, lengths = pad([r[0] if mean else r for r in rendered], prism.net.device)
        mask = pad([r[1] for r in rendered], prism.net.device)[0].bool() if mean else None
        with torch.inference_mode():
            parts.append(prism.features(ids, lengths, mask))
    return torch.cat(parts).clone()


def train_gate(prism: PRISM, features: Tensor, targets: Tensor, seed: int) -> float:
    """Stage 4: fit prism.gate to targets [n] in {0, 1} by balanced binary cross-entropy.

    Every batch draws both classes equally often (the minority is resampled). Returns the mean loss
    of the last tenth of the steps.
    """
    gate = prism.gate
    gate.mean.copy_(features.mean(0))
    gate.deviation.copy_(features.std(0, correction=0).clamp(min=1e-4))
    generator = torch.Generator().manual_seed(derive_seed(seed, "gate"))
    classes = [torch.nonzero(targets == t).flatten().cpu() for t in (0, 1)]
    classes = [c for c in classes if len(c)]
    optimizer = torch.optim.AdamW(gate.mlp.parameters(), lr=GATE_LR, weight_decay=GATE_DECAY)
    losses = []
    for _ in tqdm(range(GATE_STEPS), desc="gate", unit="step", dynamic_ncols=True):
        rows = torch.cat([c[torch.randint(len(c), (GATE_BATCH // len(classes),),
                                          generator=generator)] for c in classes])
        rows = rows.to(features.device)
        loss = gate_loss(gate(features[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-GATE_STEPS // 10:]
    return sum(tail) / len(tail)


def gate_scores(probability: Sequence[float], targets: Sequence[int], threshold: float) -> dict:
    """Accuracy at the threshold, the majority rate beside it, AUC and the confusion matrix."""
    n, positives = len(targets), sum(targets)
    opened = [int(p >= threshold) for p in probability]
    pairs = Counter(zip(targets, opened))
    wins = sum((p > q) + 0.5 * (p == q) for p, t in zip(probability, targets) if t
               for q, u in zip(probability, targets) if not u)
    ranked = positives * (n - positives)
    return {"n": n, "accuracy": (pairs[0, 0] + pairs[1, 1]) / n if n else None,
            "majority": max(positives, n - positives) / n if n else None,
            "auc": wins / ranked if ranked else None,
            "confusion": {"true_open": pairs[1, 1], "false_open": pairs[0, 1],
                          "true_closed": pairs[0, 0], "false_closed": pairs[1, 0]}}


def run_gate(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, pairs: Sequence[Pair],
             verdicts: Sequence[Verdict], held: set, args: argparse.Namespace) -> dict:
    """Stage 4 as a resumable step: fit on the fit queries, score on the held-out ones."""
    done = [m for m in run.metrics() if m["stage"] == "gate"]
    prism.threshold = args.gate_threshold
    if done and (run.path / GATE_FILE).exists():
        prism.load_gate(run.path)
        return done[0]
    begun = time.perf_counter()
    features = gate_features(prism, tokenizer, [p.query for p in pairs])
    targets = torch.tensor([float(v.target) for v in verdicts], device=features.device)
    is_held = torch.tensor([(v.persona, v.index) in held for v in verdicts],
                           device=features.device)
    loss = train_gate(prism, features[~is_held], targets[~is_held], args.seed)
    with torch.no_grad():
        probability = prism.gate(features[is_held]).sigmoid().tolist()
    scores = gate_scores(probability, targets[is_held].int().tolist(), prism.threshold)
    run.record("gate", 0, loss=loss, prompts=len(pairs), **scores,
               seconds=round(time.perf_counter() - begun, 3))
    prism.save_gate(run.path)
    return run.metrics()[-1]


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
    rows = [[*t, *a] for t, a in zip(teachers, answers)]
    states = hidden_states(net, rows, [len(t) - 1 for t in teachers])
    # inference tensors cannot take part in autograd, hence the clone
    return [Sample(f"{p.persona}/{p.index}", [*s, *a], len(s), h[:-1].clone())
            for p, s, a, h in zip(pairs, students, answers, states) if a]


def sample_loss(prism: PRISM, samples: Sequence[Sample], temperature: float,
                generator: torch.Generator | None = None) -> Tensor:
    """Summed KL of a micro-batch: the student reads the bare prompt, all rows gated."""
    ids, _ = pad([s.ids for s in samples], prism.net.device)
    hidden = prism.net.hidden(ids, prism.adapter, len(samples), generator)
    student = torch.cat([hidden[i, s.start - 1:len(s.ids) - 1] for i, s in enumerate(samples)])
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
    tokens = sum(s.answer_tokens for s in samples)
    total = sum(float(sample_loss(prism, group, 1.0)) for group in micro_batches(samples))
    return total / tokens if tokens else None


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first steps, then linear decay to zero after the last."""
    warmup = max(1, round(WARMUP * total))
    return peak * min((step + 1) / warmup, (total - step) / max(total - warmup, 1))


def train_lora(run: RunFolder, prism: PRISM, samples: Sequence[Sample],
               args: argparse.Namespace) -> None:
    """Stage 5: distil the persona's answers into prism.adapter, from the last checkpoint on.

    The loss of a step is the summed token KL over the answer tokens of its whole batch, however it
    is split into micro-batches. A, B and the optimizer are fp32.

    Raises:
        InputError: a loss or gradient that is not finite; the last checkpoint is kept.
    """
    parameters = list(prism.adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY)
    per_epoch = math.ceil(len(samples) / args.batch_size)
    total = per_epoch * args.epochs
    first = load_checkpoint(run.path, prism, optimizer)
    bar = tqdm(total=total, initial=first, desc="lora", unit="step", dynamic_ncols=True)
    for step in range(first, total):
        begun = time.perf_counter()
        epoch, at = divmod(step, per_epoch)
        order = sorted(samples, key=lambda s: derive_seed(args.seed, "epoch", epoch, s.name))
        batch = order[at * args.batch_size:(at + 1) * args.batch_size]
        tokens = sum(s.answer_tokens for s in batch)
        summed = 0.0
        for number, group in enumerate(micro_batches(batch)):
            generator = torch.Generator(prism.net.device).manual_seed(
                derive_seed(args.seed, "dropout", step, number))
            loss = sample_loss(prism, group, args.kd_temperature, generator)
            (loss / tokens).backward()
            summed += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        if not (math.isfinite(summed) and math.isfinite(norm)):
            raise InputError(f"stage 5, step {step}: loss {summed / tokens}, gradient norm {norm} "
                             f"on {', '.join(s.name for s in batch)}; try a lower --lr or "
                             "--dtype float32 (the last checkpoint is kept)")
        rate = learning_rate(step, total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        run.record("lora", step, loss=summed / tokens, gradient_norm=norm, lr=rate,
                   samples=len(batch), answer_tokens=tokens,
                   seconds=round(time.perf_counter() - begun, 3))
        bar.update()
        bar.set_postfix(kl=f"{summed / tokens:.4f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < total:
            save_checkpoint(run.path, prism, optimizer, step + 1)
    bar.close()


def save_checkpoint(folder: Path, prism: PRISM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Adapter, both AdamW moments and the step. There is no random state to keep: every draw is
    seeded by the step it belongs to."""
    tensors = {}
    for i, p in enumerate(prism.adapter.parameters()):
        state = optimizer.state[p]
        tensors |= {f"{i}.value": p, f"{i}.mean": state["exp_avg"], f"{i}.square":
                    state["exp_avg_sq"]}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_file(folder / "checkpoint.safetensors", to_safetensors(tensors, {"step": str(step)}))


def load_checkpoint(folder: Path, prism: PRISM, optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_checkpoint` wrote and return its step; 0 if there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    step = int(json.loads(data[8:8 + length])["__metadata__"]["step"])
    tensors = parse_safetensors(data)
    with torch.no_grad():
        for i, p in enumerate(prism.adapter.parameters()):
            p.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {"step": torch.tensor(float(step)),
                                  "exp_avg": tensors[f"{i}.mean"].to(p.device),
                                  "exp_avg_sq": tensors[f"{i}.square"].to(p.device)}
    return step


def run_lora(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: Sequence[Persona],
             won: Sequence[Pair], held: set, args: argparse.Namespace) -> dict:
    """Stage 5 as a resumable step: cache the teacher, train, measure the held-out KL."""
    begun = time.perf_counter()
    samples = distill_samples(prism.net, tokenizer, personas, won, args.max_len)
    names = {f"{persona}/{index}" for persona, index in held}
    fit = [s for s in samples if s.name not in names]
    test = [s for s in samples if s.name in names]
    if not fit:
        raise InputError(f"no answer fits in --max-len {args.max_len} beside its persona; raise it")
    before = held_out_kl(prism, test)  # B is zero: this is the base model
    train_lora(run, prism, fit, args)
    after = held_out_kl(prism, test)
    steps = [m for m in run.metrics() if m["stage"] == "lora"]
    run.record("kl", 0, held_out_samples=len(test), before=before, after=after,
               answer_tokens=sum(s.answer_tokens for s in test),
               tokens_trained=sum(m["answer_tokens"] for m in steps),
               seconds=round(time.perf_counter() - begun, 3))
    prism.save(run.path)
    (run.path / "checkpoint.safetensors").unlink(missing_ok=True)
    return run.metrics()[-1]


# --------------------------------------------------------------------------------------------------
# What a run says at its end


def stage_costs(metrics: Sequence[dict]) -> list[dict]:
    """Seconds, tokens read and tokens written of each stage, summed over its metrics rows."""
    costs = []
    for stage in ("queries", "answers", "judge", "verdicts", "gate", "kl"):
        rows = [m for m in metrics if m["stage"] == stage]
        if rows:
            total = {f: sum(m.get(f, 0) for m in rows) for f in
                     ("seconds", "prompts", "tokens_read", "tokens_written", "tokens_trained")}
            costs.append({"stage": "lora" if stage == "kl" else stage, **total})
    return costs


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def verdict_table(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> str:
    """Verdicts, and the mean length of both answers in tokens, per persona."""
    rows = []
    for name in dict.fromkeys(v.persona for v in verdicts):
        counts = Counter(v.winner for v in verdicts if v.persona == name)
        mine = [p for p in pairs if p.persona == name]
        rows.append([name, len(mine), *(counts[w] for w in
                                        ("expert", "base", "tie", "split", "unparsed")),
                     round(sum(len(p.base_ids) for p in mine) / len(mine)),
                     round(sum(len(p.expert_ids) for p in mine) / len(mine))])
    return table(("persona", "queries", "expert", "base", "tie", "split", "unparsed",
                  "tokens base", "tokens expert"), rows)


def summarize(run: RunFolder, args: argparse.Namespace) -> str:
    """The summary of everything under the run folder, from its files alone (Markdown)."""
    metrics = run.metrics()
    last = {m["stage"]: m for m in metrics}
    pairs, verdicts = run.read("answers.jsonl", Pair), run.read("verdicts.jsonl", Verdict)
    kept = Counter(q.persona for q in run.read("queries.jsonl", Query))
    parts = [f"queries kept: {sum(kept.values())} (wanted {args.queries} for each of "
             f"{args.personas_found} personas)"]
    short = [f"{name} {n}" for name, n in kept.items() if n < args.queries]
    if short:
        parts.append("fewer than wanted, the rest malformed or duplicates: " + ", ".join(short))
    if "judge" in last:
        tests = "; ".join(f"{t['judge']} {t['right']} of {t['pairs']}"
                          for t in last["judge"]["tests"])
        parts.append(f"judge: {last['judge']['chosen']} (right on answers to a wrong query: "
                     f"{tests})")
    if verdicts:
        targets = Counter(v.target for v in verdicts)
        parts += [verdict_table(verdicts, pairs),
                  f"distill / retain: {targets[1]} / {targets[0]}"]
    if "gate" in last:
        g = last["gate"]
        parts.append(f"gate on {g['n']} held-out queries: accuracy {number(g['accuracy'])} "
                     f"(majority {number(g['majority'])}), AUC {number(g['auc'])}")
    if "kl" in last:
        k = last["kl"]
        parts.append(f"forward KL to the persona teacher on {k['held_out_samples']} held-out "
                     f"queries, nats per token: {number(k['before'], 4)} before, "
                     f"{number(k['after'], 4)} after")
    parts.append(table(("stage", "seconds", "prompts", "tokens read", "written", "trained"),
                       [[c["stage"], f"{c['seconds']:.1f}", *(c[f] for f in (
                           "prompts", "tokens_read", "tokens_written", "tokens_trained"))]
                        for c in stage_costs(metrics)]))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------
# The command


def parser() -> argparse.ArgumentParser:
    """The command line of train.py. Defaults that --quick changes are filled in by `check`."""
    p = argparse.ArgumentParser(
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
    run.add_argument("--overwrite", action="store_true",
                     help="drop the results that other settings make invalid (all, if none differ)")
    data = p.add_argument_group("stages 1-3: the data")
    add(data, "--queries", "queries", "queries a persona")
    add(data, "--max-new-tokens", "max_new_tokens", "longest answer, in tokens")
    add(data, "--judge", "auto", "which judge; auto tests them first",
        choices=("auto", "letter", "likelihood"))
    gate = p.add_argument_group("stage 4: the gate")
    add(gate, "--gate-layer", 0, "decoder layer whose output the gate reads")
    add(gate, "--gate-pool", "last", "last prompt token, or mean over the user's text",
        choices=("last", "mean"))
    add(gate, "--gate-threshold", 0.5, "probability from which the adapter answers")
    lora = p.add_argument_group("stage 5: the adapter")
    add(lora, "--rank", 16, "LoRA rank")
    add(lora, "--alpha", 32.0, "LoRA alpha; the update is scaled by alpha / rank")
    add(lora, "--epochs", "epochs", "passes over the distill set")
    add(lora, "--lr", 2e-4, "peak learning rate")
    add(lora, "--batch-size", "batch_size", "samples in an optimizer step")
    add(lora, "--max-len", 1024, "longest training sequence, in tokens, persona included")
    add(lora, "--kd-temperature", 1.0, "distillation temperature")
    add(lora, "--dropout", 0.05, "dropout on the LoRA branch")
    return p


def check(args: argparse.Namespace) -> None:
    """Fill in what --quick decides and refuse values out of range."""
    for name, value in (QUICK if args.quick else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, low, high in (("queries", 1, 1e6), ("max_new_tokens", 1, 1e6), ("epochs", 1, 1e5),
                            ("batch_size", 1, 1e5), ("rank", 1, 1e4), ("max_len", 8, 1e7),
                            ("alpha", 1e-9, 1e9), ("lr", 1e-12, 1e3), ("dropout", 0, 0.99),
                            ("kd_temperature", 1e-3, 1e3), ("gate_threshold", 0, 1)):
        if not low <= getattr(args, name) <= high:  # also refuses NaN
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be in "
                             f"[{low:g}, {high:g}]")
    if args.out is None:
        args.out = Path("out") / args.model.rstrip("/").split("/")[-1].lower()


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
    known = [f for files in FILES.values() for f in files if (run.path / f).exists()]
    if old is None and known and not overwrite:
        raise InputError(f"{run.path}: holds {known[0]} but no run.json; choose another --out, or "
                         "--overwrite")
    changed = [n for n in settings if old is not None and old.get(n) != settings[n]]
    if changed and not overwrite:
        n = changed[0]
        raise InputError(f"{run.path}: an earlier run has {n} = {old.get(n)}, now it is "
                         f"{settings[n]}; choose another --out, or --overwrite")
    if overwrite:
        first = min((STAGES.index(FIRST_STAGE.get(n, "queries")) for n in changed), default=0)
        run.forget(STAGES[first:], [f for s in STAGES[first:] for f in FILES[s]])
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "threads": torch.get_num_threads()}
    if settings != old:
        write_file(path, json.dumps({"settings": settings, "versions": versions}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    """Check everything first, then run the stages in the locked output folder."""
    check(args)
    personas = load_personas(args.personas)
    args.personas_found = len(personas)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = resolve(args.model)
    net, tokenizer = load(folder, device, dtype), Tokenizer(folder)
    net.name = args.model
    prism = PRISM(net, args.rank, args.alpha, args.gate_layer, args.gate_pool, args.dropout,
                  args.seed)
    texts = "\0".join(f"{p.name}\0{p.text}" for p in personas)
    settings = {n: getattr(args, n) for n in (
        "model", "queries", "max_new_tokens", "judge", "gate_layer", "gate_pool", "gate_threshold",
        "rank", "alpha", "epochs", "lr", "batch_size", "max_len", "kd_temperature", "dropout",
        "seed")}
    settings |= {"personas": [p.name for p in personas],
                 "personas_sha256": hashlib.sha256(texts.encode()).hexdigest(),
                 "base_source": base_source(folder, args.model),
                 "base_fingerprint": fingerprint(folder), "device": device.type,
                 "dtype": str(dtype).removeprefix("torch.")}
    run = RunFolder(args.out)
    try:
        begin(run, settings, args.overwrite)
        if (run.path / "report.md").exists():  # the last file a run writes
            print(f"{run.path}: complete already; --overwrite runs it again")
            return 0
        status = stages(run, prism, tokenizer, personas, args)
    finally:
        run.close()
    print(f"\n{summarize(run, args)}\n\nsaved in {run.path}")
    if status == 3:
        print("nothing to distil: the persona won no query, so there is no adapter; the data is "
              "kept. Try more --queries, other personas, or a larger model.", file=sys.stderr)
    return status


def stages(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: Sequence[Persona],
           args: argparse.Namespace) -> int:
    """The five stages in order; each takes up where it was left. Returns the exit status."""
    net, stop = prism.net, args.stop_after
    queries = write_queries(run, net, tokenizer, personas, args.queries, args.seed)
    if stop == "queries":
        return 0
    pairs = write_answers(run, net, tokenizer, personas, queries, args.max_new_tokens, args.seed)
    if stop == "answers":
        return 0
    verdicts = write_verdicts(run, pick_judge(run, net, tokenizer, pairs, args.judge), pairs)
    if stop == "verdicts":
        return 0
    won = [p for p, v in zip(pairs, verdicts) if v.target]
    if not won:
        return 3
    held = hold_out(verdicts, args.seed)
    run_gate(run, prism, tokenizer, pairs, verdicts, held, args)
    if stop == "gate":
        return 0
    run_lora(run, prism, tokenizer, personas, won, held, args)
    write_file(run.path / "report.md", f"# PRISM run: {args.model}\n\n{summarize(run, args)}\n")
    return 0


def pick_judge(run: RunFolder, net: Transformer, tokenizer: Tokenizer, pairs: Sequence[Pair],
               name: str) -> LetterJudge | LikelihoodJudge:
    """The judge that an earlier attempt chose, or the one that passes the self-test now."""
    done = [m for m in run.metrics() if m["stage"] == "judge"]
    if done:
        kinds = {kind.name: kind for kind in (LetterJudge, LikelihoodJudge)}
        return kinds[done[0]["chosen"]](net, tokenizer)
    begun = time.perf_counter()
    judge, tests = choose_judge(name, net, tokenizer, pairs)
    run.record("judge", 0, chosen=judge.name, tests=tests,
               seconds=round(time.perf_counter() - begun, 3))
    return judge


if __name__ == "__main__":
    sys.exit(main())
