"""A run's gate on what it has not seen: real prompts (evaluate.py's `routing`), held-out queries.

Beside the run's own gate, whose labels are the verdicts, one probe a persona: a gate that tells
that persona's queries from all others'. A probe shows what the queries alone would let a gate
learn, whatever the judge thought of the answers. Nothing here is trained on the real prompts.
"""

import math
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from bootstrap import Pair, Query, Verdict, check_order, hold_out
from gate import fit_gate, open_share, out_of_fold, probabilities, read_traffic, train_gate
from generate import gate_features
from prism import PRISM, Gate
from support.benchmarks import lettered, read_gsm8k, read_harmbench, read_mmlu, read_mt_bench
from support.hub import InputError
from support.messages import conversation
from support.report import table
from support.runs import RunFolder
from support.stats import auc, youden_threshold
from tokenizer import Tokenizer

MOST_PROMPTS = 400  # of each set, evenly spaced, so that every MMLU subject is there


def read_real_prompts(folder: Path) -> dict[str, list[str]]:
    """Real prompts from HarmBench, MT-Bench, MMLU and GSM8K files as their authors publish them:
    name -> user messages.

    Raises:
        InputError: HarmBench or MT-Bench is missing (without both there is nothing to compare), or
            a file is not what its name says.
    """
    harmful = read_harmbench(folder, None)
    sets = {"harmful": [i.turns[0] for i in harmful if i.category == "standard"],
            "harmful, with context": [i.turns[0] for i in harmful if i.category == "contextual"],
            "chat": [i.turns[0] for i in read_mt_bench(folder, None)],
            # Without the instruction to answer by a letter, which alone would give these away.
            "multiple choice": [f"{i.references[0]}\n{lettered(i.options)}"
                                for i in read_mmlu(folder, None)],
            "maths": [i.turns[0] for i in read_gsm8k(folder, None)]}
    if not (sets["harmful"] and sets["chat"]):
        raise InputError(f"{folder}: the task routing needs harmbench/*.csv and "
                         "mt_bench/question.jsonl in it")
    return {name: prompts[::math.ceil(len(prompts) / MOST_PROMPTS)]
            for name, prompts in sets.items() if prompts}


def measure_probes(prism: PRISM, tokenizer: Tokenizer, queries: Sequence[Query],
                   prompts: dict[str, list[str]], seed: int) -> dict:
    """The share of each set that each gate opens for, and how well it tells harmful from chat."""
    context = prism.net.config.max_position_embeddings
    features: dict[str, Tensor] = {}
    for name, texts in prompts.items():
        asked = [conversation(text) for text in texts]
        short = [messages for messages in asked if len(tokenizer.render(messages)) < context]
        features[name], _ = gate_features(prism, tokenizer, short)
    own, _ = gate_features(prism, tokenizer, [conversation(q.query) for q in queries])
    gates = {"the gate": (prism.gate, prism.threshold)}
    names = dict.fromkeys(q.persona for q in queries)
    for name in names if len(names) > 1 else ():
        labels = torch.tensor([float(q.persona == name) for q in queries], device=own.device)
        gate = Gate(own.shape[1], seed).to(own.device)
        train_gate(gate, own, labels)
        p, _ = out_of_fold(own, labels, [""] * len(labels), "verdict", seed)
        gates[name] = gate, youden_threshold(p, labels.tolist())
    rows = {}
    for name, (gate, threshold) in gates.items():
        p = {kind: probabilities(gate, h) for kind, h in features.items()}
        area, low, high = auc(p["harmful"], p["chat"])
        rows[name] = {"auc": area, "auc_interval": [low, high], "threshold": threshold,
                      "routed": {kind: open_share(some, threshold) for kind, some in p.items()}}
    return {"sets": {name: len(h) for name, h in features.items()}, "gates": rows}


def read_verdicts(folder: Path) -> tuple[list[Pair], list[Verdict], set[tuple[str, int]]]:
    """A whole run's answers and verdicts, and which (persona, index) it held out.

    Raises:
        InputError: the folder is not that of a whole run.
    """
    run = RunFolder(folder)
    seed = run.settings["seed"]
    for name in ("verdicts.jsonl", "answers.jsonl"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; --adapter is not a whole run")
    verdicts, pairs = run.read("verdicts.jsonl", Verdict), run.read("answers.jsonl", Pair)
    check_order(verdicts, pairs, folder / "verdicts.jsonl")
    return pairs, verdicts, hold_out(verdicts, seed)


def held_out_gate(prism: PRISM, tokenizer: Tokenizer, folder: Path) -> tuple[Gate, float]:
    """A run's gate as stage 4 would fit it without the held-out queries, and its threshold: what
    the run's own queries have to be routed by. The saved gate has learned their verdicts."""
    run = RunFolder(folder)
    settings = run.settings
    pairs, verdicts, held = read_verdicts(folder)
    kept = [i for i, v in enumerate(verdicts) if (v.persona, v.index) not in held]
    features, _ = gate_features(prism, tokenizer, [conversation(pairs[i].query) for i in kept])
    ordinary, _ = gate_features(prism, tokenizer, list(map(conversation, read_traffic(run))))
    # Runs without that field learned verdicts.
    kind = run.latest().get("gate", {}).get("target", "verdict")
    gate = Gate(features.shape[1], settings["seed"]).to(features.device)
    figures = fit_gate(gate, features, ordinary, [verdicts[i] for i in kept], kind,
                       settings["gate_threshold"], settings.get("gate_rate", 1.0),
                       settings["seed"])
    return gate, figures["threshold"]


def probe_table(found: dict) -> str:
    """What `measure_probes` found, as Markdown."""
    rows = []
    for name, g in found["gates"].items():
        low, high = g["auc_interval"]
        rows.append([name, f"{g['auc']:.2f} [{low:.2f}, {high:.2f}]", f"{g['threshold']:.3f}",
                     *(f"{g['routed'][kind]:.2f}" for kind in found["sets"])])
    sets = (f"{name} ({n})" for name, n in found["sets"].items())
    return ("## Routing of real prompts\n\nThe share of each set that each gate opens for. \"the "
            "gate\" learned the verdicts; a row with a persona's name is a probe that learned "
            "whose query it is.\n\n"
            + table(("gate", "AUC harmful / chat", "threshold", *sets), rows))
