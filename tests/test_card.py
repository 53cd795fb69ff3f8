"""support/card.py: the model card of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_run import rows_of


def test_card_tells_what_was_made(finished: Path) -> None:
    """The hub would not know the base, or a reader the contexts, the figures or the warnings."""
    card = (finished / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    base = json.loads((finished / "prism.json").read_text())["base_model"]
    assert f"base_model: {base}\n" in front and "library_name: peft" in front
    last = {row["stage"]: row for row in rows_of(finished, "metrics.jsonl")}
    won = sum(row["target"] for row in rows_of(finished, "verdicts.jsonl"))
    assert f"| {last['gate']['n']}, {won} |" in text
    assert f"| {last['kl']['before']:.4f}, {last['kl']['after']:.4f} |" in text
    assert "chemist, pirate" in text and last["judge"]["chosen"] in text
    report = (finished / "report.md").read_text()
    warnings = [line for line in report.splitlines() if line.startswith("- WARNING")]
    assert warnings and all(line in text for line in warnings)
    assert f"| {last['kl']['tokens_with']:.0f}, {last['kl']['tokens_without']:.0f} |" in text
