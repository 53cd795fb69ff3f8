"""support/stats.py: intervals, AUC, the sequential test; by hand, and against published figures."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from judge import MOST_PAIRS, PAIRS_AT_ONCE, Comparison, ask_until_decided
from support.stats import (FAIL, PASS, auc, bootstrap_ratio, decision_scores, interval,
                           log_likelihood_ratio, youden_threshold)


@pytest.mark.parametrize(("hits", "n", "expected"), [
    (5, 10, (0.2366, 0.7634)), (0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (1, 1, (0.2065, 1)),
    (81, 263, (0.2553, 0.3662)), (0, 0, (0, 1))])
def test_interval_is_wilsons(hits: int, n: int, expected: tuple[float, float]) -> None:
    """An interval would not be Newcombe's (1998, table I: 81 of 263) or that worked out by hand."""
    assert interval(hits, n) == pytest.approx(expected, abs=1e-4)


def passes(share: float) -> tuple[float, float]:
    """How often a judge passes that is right on this share of the pairs, and how many it is asked
    on average: exactly, as numbers of hits with their probabilities."""
    passed, pairs, undecided = 0.0, 0.0, {0: 1.0}
    for asked in range(PAIRS_AT_ONCE, MOST_PAIRS + 1, PAIRS_AT_ONCE):
        pairs += PAIRS_AT_ONCE * sum(undecided.values())
        chances: Counter[int] = Counter()
        for right, chance in undecided.items():
            for hits in range(PAIRS_AT_ONCE + 1):
                misses = PAIRS_AT_ONCE - hits
                chances[right + hits] += chance * (
                    math.comb(PAIRS_AT_ONCE, hits) * share**hits * (1 - share) ** misses)
        found = {right: log_likelihood_ratio(right, asked - right) for right in chances}
        passed += sum(chance for right, chance in chances.items() if found[right] >= PASS)
        undecided = {r: chance for r, chance in chances.items() if FAIL < found[r] < PASS}
    return passed + sum(chance for right, chance in undecided.items()
                        if log_likelihood_ratio(right, MOST_PAIRS - right) > 0), pairs


def test_errors_of_the_sequential_test() -> None:
    """More than one good judge (right on 0.9 of both kinds that decide) of a hundred would be
    refused, or more than one poor judge (0.6) pass even one kind; or they be asked for long. The
    shares are those that support/stats.py gives."""
    (good, pairs), (poor, more_pairs) = passes(0.9), passes(0.6)
    assert 1 - good**2 <= 0.01 and 1 - good == pytest.approx(1 / 300, rel=0.03)
    assert poor <= 0.01 and poor == pytest.approx(1 / 118, rel=0.03)
    assert pairs < 25 and more_pairs < 25  # that is why it is sequential
    assert passes(0.5)[0] <= 0.001 >= passes(0.3)[0]  # worse ones pass still less


def test_judges_are_asked_by_that_test() -> None:
    """The error rates above would be those of another rule than the judges'."""
    generator = np.random.default_rng(0)

    def guess(asked: list[Comparison]) -> tuple[list, dict]:
        hits = generator.random(len(asked)) < 0.75
        return [("expert" if hit else "base", []) for hit in hits], {"prompts": len(asked)}

    judge, share, found = SimpleNamespace(name="guess", compare=guess), passes(0.75), []
    for _ in range(1000):
        supply = iter([Comparison("q", "", "right", "wrong")] * (2 * MOST_PAIRS))
        counts, cost = ask_until_decided(judge, supply)
        assert counts["pairs"] == counts["right"] + counts["wrong"] == cost["prompts"]
        found.append((counts["passed"], counts["pairs"]))
    passed, pairs = np.mean(found, axis=0)
    assert passed == pytest.approx(share[0], abs=0.05) and pairs == pytest.approx(share[1], rel=0.1)


def test_auc_and_its_interval_by_hand() -> None:
    """The interval would not be Hanley and McNeil's (3 of 4 won pairs, the variance at 3.5 of 5),
    perfect scores of very few queries would be certainty, or a tie not half a win."""
    area, low, high = auc([0.9, 0.4], [0.5, 0.1])
    a = 3.5 / 5
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    variance = (a * (1 - a) + (q1 - a**2) + (q2 - a**2)) / 4
    assert area == 0.75
    assert low == pytest.approx(max(0.75 - 1.96 * variance**0.5, 0), abs=1e-4)
    assert high == min(0.75 + 1.96 * variance**0.5, 1.0)
    area, low, high = auc([0.6], [0.4])
    assert area == high == 1 and low < 0.5
    area, low, _ = auc([1.0] * 40, [0.0] * 40)
    assert area == 1 and low > 0.95
    assert auc([0.3], [0.3])[0] == 0.5
    assert auc([], [0.5]) == (None, None, None)


def test_auc_of_two_normals() -> None:
    """Phi(1 / sqrt(2)) = 0.760, the AUC of two normal classes one deviation apart, would be inside
    the interval in more or less than about 95 of 100 draws."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(100):
        area, low, high = auc(list(generator.normal(1, 1, 40)), list(generator.normal(0, 1, 40)))
        covered += low <= 0.760 <= high
    assert 90 <= covered <= 99


def test_bootstrap_of_many_values_is_the_normal_interval() -> None:
    """The interval of 400 values' mean would not be near 1.96 standard errors to each side."""
    values = np.random.default_rng(0).normal(0.3, 1, 400)
    mean, (low, high) = bootstrap_ratio(values, [1.0] * len(values))
    half = 1.96 * values.std() / 400**0.5
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.07)


def test_threshold_of_youden() -> None:
    """The threshold would not be halfway below the point farthest from the diagonal, or, where
    classes cannot be told apart, not one half."""
    high, low = [0.7 + i / 100 for i in range(20)], [0.1 + i / 100 for i in range(20)]
    assert youden_threshold(high + low, [1] * 20 + [0] * 20) == pytest.approx((0.7 + 0.29) / 2)
    assert youden_threshold(low + high, [1] * 20 + [0] * 20) == 0.5  # worse than chance
    assert youden_threshold(high, [1, 0] * 10) == 0.5  # no better than chance
    assert youden_threshold(high, [1] * 20) == youden_threshold([], []) == 0.5


def test_decision_scores_by_hand() -> None:
    """A score would not be that worked out by hand, or be invented where there is none: one class
    only has no AUC, and no query at all no accuracy."""
    scores = [0.9, 0.4, 0.4, 0.2, 0.5]
    found = decision_scores(scores, [s >= 0.5 for s in scores], [1, 1, 0, 0, 0])
    # positives 0.9 and 0.4 against 0.4, 0.2, 0.5: three wins; then a tie, a win and a loss
    assert found["auc"] == pytest.approx((3 + 0.5 + 1 + 0) / 6)
    assert found["accuracy"] == found["majority"] == pytest.approx(3 / 5) and found["n"] == 5
    assert found["confusion"] == {"true_open": 1, "false_open": 1, "true_closed": 2,
                                  "false_closed": 1}
    one = decision_scores([0.9, 0.1], [True, False], [1, 1])
    assert one["auc"] is None and one["accuracy"] == 0.5 and one["majority"] == 1
    none = decision_scores([], [], [])
    assert (none["n"], none["auc"], none["accuracy"], none["majority"]) == (0, None, None, None)
