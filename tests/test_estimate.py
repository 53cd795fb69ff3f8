"""support/estimate.py: what a run says beforehand of its cost, against bills of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import Transformer
from prism import PRISM
from support.estimate import expected_flops, written_queries

QUICK = {"personas": ["coding", "math", "safety_monitor", "writing"], "queries": 10,
         "query_style": "auto", "max_new_tokens": 64, "judge": "auto", "epochs": 4}


def test_quick_is_estimated_as_it_is_billed(smollm: Transformer) -> None:
    """The time that a newcomer is told would be wrong by more than a half: `--quick` was billed
    22.1 and 23.6 TFLOP, of these 6 for stage 1."""
    prism = PRISM(smollm)
    whole = sum(expected_flops(prism, QUICK).values())
    assert 22.8e12 / 1.25 < whole < 22.8e12 * 1.25
    brought = sum(expected_flops(prism, QUICK, 40).values())
    assert 3e12 < whole - brought < 8e12
    assert sum(expected_flops(prism, QUICK | {"judge": "none"}).values()) < 0.8 * whole


@pytest.mark.parametrize(("content", "count"), [(None, None), ("", 0), ('{"a": 1}\n{"a": 2}\n', 2)])
def test_queries_that_are_there(content: str | None, count: int | None, tmp_path: Path) -> None:
    """Somebody's own queries would be counted as those that stage 1 writes."""
    if content is not None:
        (tmp_path / "queries.jsonl").write_text(content)
    assert written_queries(tmp_path) == count
