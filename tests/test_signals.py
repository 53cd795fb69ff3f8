"""Which judge, which gate? The comparisons behind the defaults, on the real model (slow).

    python -m pytest -m slow tests/test_signals.py -s

prints the tables of the README. Stages 1 and 2 are written once, to out/signals-*, and used again.
Nothing in here is used by the product; what it found out is in bootstrap.LikelihoodJudge.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Callable, Sequence

import pytest
import torch

import bootstrap
from bootstrap import (
    DEGENERATE,
    ENDING,
    ENDING_FLOOR,
    FLUENCY,
    JUDGE_PROMPT,
    Comparison,
    LetterJudge,
    LikelihoodJudge,
    Pair,
    Persona,
    RunFolder,
    degenerate,
    hidden_states,
    interval,
    known_truth,
    letter_winner,
    load_personas,
    render_query,
    score_winner,
    split_chunks,
    token_log_probabilities,
    write_answers,
    write_queries,
    write_verdicts,
)
from generate import derive_seed
from support.hub import DEFAULT_MODEL
from model import Transformer
from prism import PRISM, Gate
from tokenizer import Tokenizer
from train import (
    auc,
    choose_threshold,
    gate_features,
    out_of_fold,
    read_transfer_sets,
    train_gate,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
QUERIES, SEED = 12, 0
GOALS = {"wrong query": 0.97, "very hot": 0.95, "cut to a third": 0.85, "sentences shuffled": 0.85,
         "wrong but longer": 0.80}
Score = Callable[[Comparison, str], list[float]]


@pytest.fixture(scope="module")
def net(smollm: Transformer) -> Transformer:
    """SmolLM2."""
    smollm.name = DEFAULT_MODEL
    return smollm


@pytest.fixture(scope="module")
def personas() -> list[Persona]:
    """The twelve."""
    return load_personas(ROOT / "personas")


def answers(net: Transformer, tokenizer: Tokenizer, personas: list[Persona], queries: int,
            new_tokens: int, votes: int) -> list[list[Pair]]:
    """Stage 2 on some of stage 1's queries, `votes` times."""
    first = RunFolder(ROOT / "out" / "signals")
    kept = write_queries(first, net, tokenizer, personas, QUERIES, SEED)
    first.close()
    run = RunFolder(ROOT / "out" / f"signals-{new_tokens}")
    try:
        return [write_answers(run, net, tokenizer, personas, kept[::len(kept) // queries],
                              new_tokens, SEED, vote) for vote in range(votes)]
    finally:
        run.close()


def halves(cases: dict[str, list[Comparison]]) -> list[dict[str, list[Comparison]]]:
    """Every pair goes, by its query, to the half that was chosen on or to the one reported."""
    return [{kind: [c for c in asked if derive_seed("half", c.query) % 2 == half]
             for kind, asked in cases.items()} for half in (0, 1)]


def test_judges(net: Transformer, smollm_tok: Tokenizer, personas: list[Persona],
                monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of judges; the product's reaches its goals on the half nothing was chosen on."""
    pairs = answers(net, smollm_tok, personas, 144, 192, 1)[0]
    # Only complete answers: from one that was cut off, its third can hardly be told.
    for name in ("TEST_PAIRS", "WRONG_PAIRS"):
        monkeypatch.setattr(bootstrap, name, sum(p.base_stop == "eos" for p in pairs))
    cases, _ = known_truth(net, smollm_tok, personas, pairs, 192, SEED)
    everything = [c for asked in cases.values() for c in asked]
    keys = list(dict.fromkeys((c.query, c.persona, a) for c in everything
                              for a in (c.expert, c.base)))
    parts: dict = {}
    for some in split_chunks(keys):
        parts |= LikelihoodJudge(net, smollm_tok).parts(some)[0]
    bare: dict = {}
    for some in split_chunks(keys):
        logs, _ = token_log_probabilities(net, [render_query(smollm_tok, q)[0] for q, _, _ in some],
                                          [smollm_tok.encode(a) for _, _, a in some])
        bare |= {(q, a): float(t.mean()) for (q, _, a), t in zip(some, logs)}
    opened = smollm_tok.open_user_turn(None)
    queries = list(dict.fromkeys(q for q, _, _ in keys))
    prior = {q: float(t.mean()) for q, t in zip(queries, token_log_probabilities(
        net, [opened] * len(queries), [smollm_tok.encode(q) for q in queries])[0])}

    def of(c: Comparison, answer: str) -> tuple:
        return parts[c.query, c.persona, answer]

    def guard(c: Comparison, answer: str) -> float:
        return -DEGENERATE * degenerate(c.query, answer)

    def ending(c: Comparison, answer: str, weight: float) -> float:
        return weight * max(of(c, answer)[3], ENDING_FLOOR) if c.ended else 0.0

    judges: dict[str, Score] = {
        "query likelihood, first wording": lambda c, a: [of(c, a)[0]],
        "query likelihood, second wording": lambda c, a: [of(c, a)[1]],
        "both wordings": lambda c, a: [*of(c, a)[:2]],
        "both, averaged": lambda c, a: [sum(of(c, a)[:2]) / 2],
        "both, minus log P(query)": lambda c, a: [q - prior[c.query] for q in of(c, a)[:2]],
        "answer likelihood, bare": lambda c, a: [bare[c.query, a]],
        "answer likelihood, mixture": lambda c, a: [of(c, a)[2]],
        "both + guard": lambda c, a: [q + guard(c, a) for q in of(c, a)[:2]],
    }
    for fluency, end in itertools.product((0.5, 1.0, 2.0), (0.0, 0.05, 0.1, 0.2)):
        judges[f"both + {fluency} mixture + {end} ending + guard"] = (
            lambda c, a, f=fluency, e=end: [q + f * of(c, a)[2] + ending(c, a, e) + guard(c, a)
                                            for q in of(c, a)[:2]])
    print("\n| judge | half | " + " | ".join(cases) + " |")
    for name, score in judges.items():
        for half, split in enumerate(halves(cases)):
            row = []
            for asked in split.values():
                winners = Counter(score_winner(list(zip(score(c, c.expert), score(c, c.base))))
                                  for c in asked)
                row.append(f"{winners['expert'] / max(len(asked), 1):.2f}")
            print(f"| {name} | {'AB'[half]} | " + " | ".join(row) + " |")
    for name, winners in letter_verdicts(net, smollm_tok, cases).items():
        print(f"| {name} | all | " + " | ".join(
            f"{w.count('expert') / len(w):.2f}" for w in winners) + " |")

    judge, report = LikelihoodJudge(net, smollm_tok), halves(cases)[1]
    print(f"\nthe product's judge ({FLUENCY} mixture, {ENDING} ending), half B:")
    for kind, asked in report.items():
        right = [w for w, _ in judge.compare(asked)[0]].count("expert")
        low, high = interval(right, len(asked))
        print(f"  {kind}: {right} of {len(asked)} = {right / len(asked):.2f} "
              f"[{low:.2f}, {high:.2f}], goal {GOALS.get(kind, '-')}")
        if kind in GOALS:
            assert high >= GOALS[kind], kind
        if kind == "same prompt":
            assert low <= 0.5 <= high


def letter_verdicts(net: Transformer, tokenizer: Tokenizer,
                    cases: dict[str, list[Comparison]]) -> dict[str, list[list[str]]]:
    """The letter judge's verdicts, and those of its logit difference averaged over both orders."""
    judge = LetterJudge(net, tokenizer)
    both: dict[str, list[list[str]]] = {"letter, both orders": [], "letter, logits averaged": []}
    for asked in cases.values():
        asked = asked[:24]
        both["letter, both orders"].append([w for w, _ in judge.compare(asked)[0]])
        prompts = [tokenizer.render([{"role": "user", "content": JUDGE_PROMPT.format(
            query=c.query, first=x, second=y)}]) for c in asked
            for x, y in ((c.expert, c.base), (c.base, c.expert))]
        states, _ = hidden_states(net, prompts, [len(p) - 1 for p in prompts])
        a, b = torch.cat([net.head(s).float() for s in states])[:, judge.letters[:2]].T.tolist()
        lead = [x - y for x, y in zip(a, b)]
        both["letter, logits averaged"].append(
            ["expert" if one > two else "base" for one, two in zip(lead[::2], lead[1::2])])
    assert letter_winner("A", "B") == "expert"
    return both


def kappa(a: Sequence[int], b: Sequence[int]) -> float:
    """Cohen's kappa of two labellings."""
    n = len(a)
    agree = sum(x == y for x, y in zip(a, b)) / n
    chance = sum((a.count(t) / n) * (b.count(t) / n) for t in (0, 1))
    return (agree - chance) / (1 - chance)


def test_votes(net: Transformer, smollm_tok: Tokenizer, personas: list[Persona],
               tmp_path: Path) -> None:
    """Agreement of two independent runs' verdicts on the same queries, by the number of votes."""
    judge, votes = LikelihoodJudge(net, smollm_tok), answers(net, smollm_tok, personas, 48, 96, 8)
    run = RunFolder(tmp_path)
    single = [[w for v in write_verdicts(_fresh(run), judge, personas, [pairs]) for w in v.votes]
              for pairs in votes]
    run.close()
    for m in (1, 2, 4):
        runs = [[int(2 * sum(single[first + vote][i] == "expert" for vote in range(m)) > m)
                 for i in range(len(votes[0]))] for first in (0, 4)]
        print(f"votes {m}: kappa {kappa(*runs):.2f}, wins {sum(runs[0])} and {sum(runs[1])} of "
              f"{len(runs[0])}")
        assert -1 <= kappa(*runs) <= 1


def _fresh(run: RunFolder) -> RunFolder:
    """The run folder without verdicts."""
    run.forget(("verdicts",), ("verdicts.jsonl",))
    return run


def test_gates(net: Transformer, smollm_tok: Tokenizer, personas: list[Persona]) -> None:
    """Layer x pooling: which states tell a persona's queries from the others', out of fold and on
    real prompts (only measured). Needs PRISM_TRANSFER_DATA, a folder as for --transfer-data."""
    folder = os.environ.get("PRISM_TRANSFER_DATA")
    if not folder:
        pytest.skip("PRISM_TRANSFER_DATA is not set")
    sets = read_transfer_sets(Path(folder))
    pairs = answers(net, smollm_tok, personas, 144, 192, 1)[0]
    names = ["safety_monitor", "math", "coding", "writing"]
    print("\n| layer | pool | out-of-fold AUC, mean of 4 probes | safety probe, out of fold | "
          "harmful / chat | harmful routed | multiple choice routed | chat routed |")
    for layer, pool in itertools.product((0, 1, 3, 5, 8), ("last", "mean")):
        prism = PRISM(net, gate_layer=layer, gate_pool=pool)
        features, _ = gate_features(prism, smollm_tok, [p.query for p in pairs])
        real = {k: gate_features(prism, smollm_tok, v)[0] for k, v in sets.items()}
        areas = {}
        for name in names:
            targets = torch.tensor([float(p.persona == name) for p in pairs])
            out, _ = out_of_fold(features, targets, SEED)
            areas[name] = auc([p for p, t in zip(out, targets) if t],
                              [p for p, t in zip(out, targets) if not t])[0]
            if name == "safety_monitor":
                gate = Gate(features.shape[1], SEED)
                train_gate(gate, features, targets, SEED, silent=True)
                threshold = choose_threshold(out, targets.int().tolist())
                with torch.no_grad():
                    p = {k: gate(h).sigmoid().tolist() for k, h in real.items()}
        routed = {k: sum(x >= threshold for x in v) / len(v) for k, v in p.items()}
        print(f"| {layer} | {pool} | {sum(areas.values()) / len(areas):.2f} | "
              f"{areas['safety_monitor']:.2f} | {auc(p['harmful'], p['chat'])[0]:.2f} | "
              f"{routed['harmful']:.2f} | {routed['multiple choice']:.2f} | {routed['chat']:.2f} |",
              flush=True)
        assert sum(areas.values()) / len(areas) > 0.6
