"""support/estimate.py, time: what a run says beforehand of its cost, against bills of real runs."""

from __future__ import annotations

import pytest

from model import Transformer
from prism import PRISM
from queries import Query
from support.estimate import announce, expected_flops
from support.runs import RunFolder

QUICK = {"personas": ["coding", "math", "safety_monitor", "writing"], "queries": 10,
         "max_new_tokens": 64, "judge": "auto", "epochs": 4}


def test_quick_is_estimated_as_it_is_billed(smollm: Transformer) -> None:
    """The time that a newcomer is told would be wrong by more than a half: `--quick` was billed
    22.1 and 23.6 TFLOP, of these 6 for stage 1."""
    prism = PRISM(smollm)
    whole = sum(expected_flops(prism, QUICK).values())
    assert 22.8e12 / 1.25 < whole < 22.8e12 * 1.25
    brought = sum(expected_flops(prism, QUICK, 40).values())
    assert 3e12 < whole - brought < 8e12
    assert sum(expected_flops(prism, QUICK | {"judge": "none"}).values()) < 0.8 * whole


@pytest.mark.parametrize(("count", "said"), [(0, "10 queries each, "), (2, " 2 queries, ")])
def test_queries_that_are_there(count: int, said: str, net: Transformer, run: RunFolder,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody's own queries would be counted as those that stage 1 writes."""
    run.write("queries.jsonl", [Query("math", i, "Why?") for i in range(count)])
    settings = QUICK | {"base_source": "folder", "model": "m", "device": "cpu", "dtype": "float32"}
    announce(PRISM(net), settings, run)
    assert said in capsys.readouterr().err
