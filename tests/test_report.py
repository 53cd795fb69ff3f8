"""support/report.py: what a run says about itself follows from its files alone."""

import json
from pathlib import Path

import pytest
from tiny_run import QUERIES, contents, pair, rows_of, verdict, write_rows

from bootstrap import Pair, Verdict
from support.report import (adapter_section, cost_section, gate_section, judge_section, quoted,
                            split_warnings, style_trial, summarize, verdicts_section)
from support.runs import WITHIN, RunFolder


def verdicts(winners: list[str], persona: str = "p", first: int = 0) -> list[Verdict]:
    """Verdicts with these winners."""
    return [verdict(first + i, w, persona) for i, w in enumerate(winners)]


@pytest.fixture
def last(finished: Path) -> dict[str, dict]:
    """The last metrics row of each stage."""
    return {m["stage"]: m for m in rows_of(finished, "metrics.jsonl")}


def test_report_of_a_run(finished: Path, last: dict[str, dict]) -> None:
    """report.md would lack queries, verdicts per persona, gate, KL, a stage's cost, or samples."""
    report, n = (finished / "report.md").read_text(), QUERIES
    judged, kl, tried = rows_of(finished, "verdicts.jsonl"), last["kl"], last["style"]
    won = sum(v["target"] for v in judged)
    query = rows_of(finished, "queries.jsonl")[0]["query"]
    for text in (f"queries: {2 * n} (wanted {n} for each of 2 personas)",
                 f"distill / retain: {won} / {2 * n - won}", "AUC",
                 "majority", f"{kl['before']:.4f} before", f"{kl['after']:.4f} after",
                 "WARNING: this judge was forced with --judge",
                 "WARNING: the likelihood judge fails its own test",
                 f"Written in the style {tried['chosen']}: ", "(chance 0.50)",
                 f"**chemist**: {query} / ", "### Verdict: expert"):
        assert text in report
    for name, counts in tried["styles"].items():
        assert f"| {name} | {counts['candidates']} | " in report
    for persona in ("chemist", "pirate"):
        mine = [v["winner"] for v in judged if v["persona"] == persona]
        counts = [mine.count(w) for w in ("expert", "base", "tie", "split", "unparsed")]
        assert f"| {persona} | {n} | {' | '.join(map(str, counts))} |" in report
    for stage in ("queries", "answers", "verdicts", "gate", "lora"):
        assert f"| {stage} |" in report


def test_card_tells_what_was_made(finished: Path, last: dict[str, dict]) -> None:
    """The hub would not know the base, or a reader the contexts, the figures or the warnings."""
    _, front, text = (finished / "README.md").read_text().split("---\n", 2)
    base = json.loads((finished / "prism.json").read_text())["base_model"]
    assert f"base_model: {base}\n" in front and "library_name: peft" in front
    won = sum(row["target"] for row in rows_of(finished, "verdicts.jsonl"))
    kl, report = last["kl"], (finished / "report.md").read_text().splitlines()
    warnings = [line for line in report if line.startswith("- WARNING")]
    assert warnings
    for words in ("chemist, pirate", last["judge"]["chosen"], f"| {last['gate']['n']}, {won} |",
                  f"| {kl['before']:.4f}, {kl['after']:.4f} |",
                  f"| {kl['tokens_with']:.0f}, {kl['tokens_without']:.0f} |", *warnings):
        assert words in text


def test_the_trial_of_styles() -> None:
    """A share would be of another number than it says."""
    tables = {"instruct": {"candidates": 24, "complete": 24, "distinct": 16, "identifiable": 12},
              "continue": {"candidates": 24, "complete": 6, "distinct": 0, "identifiable": 0}}
    assert style_trial({"styles": tables, "chance": 0.25})[1].splitlines()[2:] == [
        "| instruct | 24 | 1.00 [0.86, 1.00] | 0.67 [0.47, 0.82] | 12 | 0.75 [0.51, 0.90] |",
        "| continue | 24 | 0.25 [0.12, 0.45] | 0.00 [0.00, 0.14] | 0 | - |"]


def test_the_bill_is_the_sum_of_the_metrics() -> None:
    """A stage's cost with a row left out, or one counted twice, would be a wrong bill."""
    metrics = [{"stage": stage, "step": 0, "flops": 2e12 * 3**i, "seconds": 60.0 * 3**i,
                "prompts": 3**i, "tokens_read": 7 * 3**i, "tokens_written": 5 * 3**i,
                "tokens_trained": 8 * 3**i, "peak_memory": 2**30 * i}
               for i, stage in enumerate(("queries", "quality", "answers", "lora", "kl", "lora"))]
    metrics.append({"stage": "verdicts", "step": 0})
    _, found, [table] = cost_section(metrics)
    assert found == ["cost: 364.0 min, 728.00 TFLOP"]
    assert table.splitlines()[2:] == [
        "| queries | 4 | 28 | 20 | 32 | 240.0 | 0 | 8.00 | 1.00 |",
        "| answers | 9 | 63 | 45 | 72 | 540.0 | 0 | 18.00 | 2.00 |",
        "| verdicts | 0 | 0 | 0 | 0 | 0.0 | - | 0.00 | 0.00 |",
        "| lora | 351 | 2457 | 1755 | 2808 | 21060.0 | 0 | 702.00 | 5.00 |"]


def test_summary_of_queries_that_somebody_brought(out: Path) -> None:
    """Queries that stage 1 did not write, without a quality row, would have no summary."""
    write_rows(out, "metrics.jsonl", [m for m in rows_of(out, "metrics.jsonl")
                                      if WITHIN.get(m["stage"]) != "queries" != m["stage"]])
    before = contents(out)
    run = RunFolder(out)
    found, _ = summarize(run)
    assert found[0] == f"{2 * QUERIES} queries, not written by stage 1"
    assert "cost: " in found[-1] and contents(out) == before


def test_split_warnings() -> None:
    """An empty split, a lonely persona or a judge of length would have no warning."""
    pairs = [Pair("p", i, "q", "b", "e", [5, 2], [5, 6, 2], "eos", "eos") for i in range(40)]
    fine = verdicts(["expert", "base"] * 10) + verdicts(["base", "expert"] * 10, "q", 20)
    assert split_warnings(fine, pairs) == []
    [found] = split_warnings(verdicts(["base"] * 39 + ["tie"]), pairs)
    assert "0 of 40" in found
    found = split_warnings(verdicts(["expert"] * 20) + verdicts(["tie"] * 20, "q", 20), pairs)
    assert len(found) == 2 and "p alone gives 20 of 20" in found[0] and "20 of 20" in found[1]


def test_personas_that_win_no_more_than_they_lose() -> None:
    """20 wins of 20 are an effect, 11 of 20 are not, 2 of 2 are too few to say, and ties do not
    count: a persona of the first kind would be called chance, or the others an effect."""
    said = [*verdicts(["expert"] * 20, "sure"), *verdicts(["expert"] * 11 + ["base"] * 9, "coin"),
             *verdicts(["expert"] * 2, "few"), *verdicts(["base"] * 20, "harmful"),
             *verdicts(["expert"] * 20 + ["tie"] * 40 + ["split"] * 9, "rarely"),
             *verdicts(["unparsed"] * 9, "mute")]
    _, [*_, found], _ = verdicts_section(said, [pair(0)] * len(said))
    assert found == "wins cannot be told from losses (95%): coin, few, harmful, mute"


@pytest.mark.parametrize(("change", "said"), [
    ({}, []), ({"model": "other/model"}, []), ({"forced": True}, ["forced with --judge"]),
    ({"trusted": False}, ["fails its own test"]),
    ({"blind_to_refusals": True}, ["blind to refusals"])])
def test_what_is_wrong_with_a_judge_is_a_warning(change: dict, said: list[str]) -> None:
    """A warning would be missing or too much; the share of A would lack its interval; or another
    model's verdicts would be called self-verification."""
    row = {"pairs": 12, "right": 12, "wrong": 0, "tie": 0, "split": 0, "unparsed": 0,
           "letters": 24, "A": 12}
    test = {"judge": "letter", "trusted": True, "blind_to_refusals": False,
            "kinds": {"wrong query": row}} | change
    judged = {"chosen": "letter", "forced": False, "tests": [test]} | change
    _, found, details = judge_section(judged)
    warnings = [line for line in found if line.startswith("WARNING")]
    assert len(warnings) == len(said) and all(s in w for s, w in zip(said, warnings))
    assert ("| letter | wrong query | 12 | 1.00 [0.76, 1.00] | 0 | 0 | 0 | 0 | 0.50 ["
            in details[-1])
    outside = " of other/model: an outside judge, so this is not self-verification"
    assert found[0] == "judge: letter" + (outside if "model" in change else "")


@pytest.mark.parametrize(("stage", "change", "words", "said"), [
    ("gate", {"auc_interval": [0.45, 0.9]}, "told from chance", True),
    ("gate", {"auc_interval": [0.55, 0.9]}, "told from chance", False),
    ("gate", {"auc_interval": [None, None]}, "told from chance", False),
    ("kl", {"before": 1.0, "after": 0.61}, "More queries", True),
    ("kl", {"before": 1.0, "after": 0.59}, "More queries", False)])
def test_what_is_weak_is_told(stage: str, change: dict, words: str, said: bool,
                              last: dict[str, dict]) -> None:
    """A gate that may be chance, or an adapter that hardly learned its teacher, would pass without
    a word; or good ones would not."""
    make = {"gate": gate_section, "kl": adapter_section}[stage]
    _, found, details = make(last[stage] | change)
    assert any(words in line for line in [*found, *details]) is said


def test_quoted_answers_are_one_line() -> None:
    """An answer would open a heading of its own in report.md, or fill a page of it."""
    assert quoted("a\n\n# b") == "a # b"
    assert quoted("x" * 700) == "x" * 600 + " ..."
