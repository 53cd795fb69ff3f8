"""A planted truth, end to end on SmolLM2's real weights: examples/voice, shortened.

Real verdicts are noisy, so the machinery is proved where a rule can see the truth: a context with a
voice of its own beside one that has none. On held-out queries the gate must open for the shop's
only, the adapter must speak as the prompt does, and where the gate stays closed nothing may change.
"""

import json
import shutil
import statistics
from pathlib import Path

import pytest

import evaluate
import train
from support.stats import auc

pytestmark = pytest.mark.slow  # it needs real training: minutes

VOICE = Path(train.__file__).parent / "examples" / "voice"
COMMON = ["--personas", str(VOICE), "--judge", str(VOICE / "judge.py"), "--max-new-tokens", "20"]


def test_planted_truth(tmp_path: Path) -> None:
    """The shop's queries would not be answered in its voice, or others not be the base model's."""
    shutil.copy(VOICE / "queries.jsonl", tmp_path)
    assert train.main([*COMMON, "--epochs", "3", "--batch-size", "4", "--lr", "1e-3", "--out",
                       str(tmp_path)]) == 0
    assert evaluate.main([*COMMON, "--adapter", str(tmp_path), "--tasks", "own", "--strategies",
                          "expert,ungated,prism"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval/items.jsonl").read_text().splitlines()]
    prism = [r for r in rows if r["strategy"] == "prism"]
    opened = {r["id"] for r in prism if r["routed"]}
    shop = {r["id"] for r in prism if r["category"] == "shop"}

    def shown(strategy: str) -> float:
        return statistics.fmean(r["scores"]["rule"] for r in rows
                                if r["strategy"] == strategy and r["id"] in opened & shop)

    others = len(prism) - len(shop)
    print(f"{len(opened & shop)} of {len(shop)} shop queries opened, {len(opened - shop)} of "
          f"{others} others; the voice by base {shown('base'):.2f}, prompt "
          f"{shown('expert'):.2f}, adapter {shown('prism'):.2f}")
    area, *_ = auc([r["gate"] for r in prism if r["id"] in shop],
                   [r["gate"] for r in prism if r["id"] not in shop])
    assert area >= 0.9
    assert len(opened & shop) >= 0.6 * len(shop) and len(opened - shop) <= 0.25 * others
    assert shown("expert") >= 0.6 and shown("base") <= 0.2  # the voice is the context's
    assert shown("prism") >= 0.8 * shown("expert")
    # Closed means the base model, whatever the adapter would have said.
    assert all(r["scores"]["changed"] == 0 for r in prism if not r["routed"])
    assert any(r["scores"]["changed"] for r in rows
               if r["strategy"] == "ungated" and r["id"] not in opened)
