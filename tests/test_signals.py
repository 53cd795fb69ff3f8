"""Which judge? The comparisons behind the defaults, on the real model (slow).

    python -m pytest -m slow tests/test_signals.py -s

prints the tables of the documentation. Stages 1 and 2 are written once, to out/signals-*, and used
again. Nothing in here is used by the product; what it found out is in judge.LikelihoodJudge.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Callable

import pytest

from bootstrap import Pair, write_answers
from engine import derive_seed, token_log_probabilities
from judge import (ENDING, ENDING_FLOOR, FLUENCY, MOST_PAIRS, Comparison, KnownPairs, LetterJudge,
                   LikelihoodJudge, Parts, conversation, degenerate, examine_judge, score_winner)
from model import Transformer
from queries import write_queries
from support.hub import DEFAULT_MODEL
from support.personas import load_personas
from support.runs import RunFolder, split_chunks
from tokenizer import Tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
QUERIES, SEED = 12, 0
Score = Callable[[Comparison, str], list[float]]


@pytest.fixture(scope="module")
def net(smollm: Transformer) -> Transformer:
    """SmolLM2."""
    smollm.name = DEFAULT_MODEL
    return smollm


@pytest.fixture(scope="module")
def pairs(net: Transformer, smollm_tok: Tokenizer) -> list[Pair]:
    """Stage 2 on stage 1's queries for the twelve personas."""
    run, personas = RunFolder(ROOT / "out" / "signals-192"), load_personas(ROOT / "personas")
    try:
        queries = write_queries(run, net, smollm_tok, personas, QUERIES, SEED)
        return write_answers(run, net, smollm_tok, personas, queries, 192, SEED)
    finally:
        run.close()


def test_judges(net: Transformer, smollm_tok: Tokenizer, pairs: list[Pair]) -> None:
    """The table of judges by kind of known pairs, every pair, by its query, in half A (chosen on)
    or B (reported); the product's judge is right on 0.9 of the wrong queries of half B."""
    known = KnownPairs(net, smollm_tok, pairs, 192, SEED)
    cases = {kind: list(itertools.islice(known.of_kind(kind), MOST_PAIRS)) for kind in known.kinds}
    keys = list(dict.fromkeys((c.query, c.context, answer) for asked in cases.values()
                              for c in asked for answer in (c.expert, c.base)))
    parts: dict[tuple, Parts] = {}
    bare: dict[tuple, float] = {}
    for some in split_chunks(keys):
        parts |= LikelihoodJudge(net, smollm_tok).read(some)[0]
        logs, _ = token_log_probabilities(
            net, [smollm_tok.render(conversation(q)) for q, _, _ in some],
            [smollm_tok.encode(a) for _, _, a in some])
        bare |= {key: float(t.mean()) if len(t) else 0.0 for key, t in zip(some, logs)}

    def of(c: Comparison, answer: str) -> Parts:
        return parts[c.query, c.context, answer]

    def product(c: Comparison, answer: str, fluency: float, ending: float) -> list[float]:
        p = of(c, answer)
        extra = fluency * p.fluency - 1000 * degenerate(c.query, answer)
        extra += ending * max(p.ending, ENDING_FLOOR) if c.ended else 0
        return [score + extra for score in p.inverse]

    judges: dict[str, Score] = {
        "query likelihood, first wording": lambda c, a: of(c, a).inverse[:1],
        "query likelihood, second wording": lambda c, a: of(c, a).inverse[1:],
        "both wordings": lambda c, a: of(c, a).inverse,
        "answer likelihood, bare": lambda c, a: [bare[c.query, c.context, a]],
        "answer likelihood, mixture": lambda c, a: [of(c, a).fluency]}
    for fluency, ending in itertools.product((0.0, 0.5, 1.0, 2.0), (0.0, 0.1, 0.2)):
        judges[f"both + {fluency} mixture + {ending} ending + rule"] = (
            lambda c, a, f=fluency, e=ending: product(c, a, f, e))
    print("\n| judge | half | " + " | ".join(cases) + " |")
    shares: dict[tuple[str, int], list[float]] = {}
    for (name, score), half in itertools.product(judges.items(), (0, 1)):
        row = []
        for asked in cases.values():
            some = [c for c in asked if derive_seed("half", c.query) % 2 == half]
            winners = Counter(score_winner(list(zip(score(c, c.expert), score(c, c.base))))
                              for c in some)
            row.append(winners["expert"] / max(len(some), 1))
        shares[name, half] = row
        print(f"| {name} | {'AB'[half]} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    for kind in (LetterJudge, LikelihoodJudge):
        report = examine_judge(kind(net, smollm_tok), known, to_the_end=True)
        print(f"| {kind.name}, as it is tested | all | " + " | ".join(
            f"{k['right'] / k['pairs']:.2f}" for k in report["kinds"].values()) + " |")
        assert report["trusted"] is (kind is LikelihoodJudge)  # at this size
    name = f"both + {FLUENCY} mixture + {ENDING} ending + rule"
    assert shares[name, 1][0] >= 0.85 and shares[name, 1][1] == 1
