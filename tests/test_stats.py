"""support/stats.py: intervals, AUC, the sequential test; figures by hand and by simulation."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from tqdm import tqdm

from judge import MOST_PAIRS, PAIRS_AT_ONCE, Comparison, ask_until_decided
from support import stats
from support.stats import (auc, decision_scores, evidence, interval, roc, sequential_test,
                           youden_threshold)

JUDGES = 20_000


def test_the_worked_examples_are_true() -> None:
    """A docstring's example would not give what it says."""
    found = doctest.testmod(stats)
    assert found.failed == 0 and found.attempted >= 7


@pytest.mark.parametrize(("hits", "n", "expected"), [
    (5, 10, (0.2366, 0.7634)), (0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (1, 1, (0.2065, 1)),
    (81, 263, (0.2553, 0.3662)), (0, 0, (0, 1))])
def test_interval_is_wilsons(hits: int, n: int, expected: tuple[float, float]) -> None:
    """An interval would not be the one published or worked out by hand (81 of 263: Newcombe 1998,
    table I)."""
    assert interval(hits, n) == pytest.approx(expected, abs=1e-4)


def decisions(hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each judge passes, given hits [judges, MOST_PAIRS], and after how many pairs: asked
    PAIRS_AT_ONCE at a time until `sequential_test` decides, else by the sign of the evidence."""
    said = {None: 0, True: 1, False: -1}
    table = np.array([[said[sequential_test(right, wrong)] for wrong in range(MOST_PAIRS + 1)]
                      for right in range(MOST_PAIRS + 1)])
    asked = np.arange(PAIRS_AT_ONCE, MOST_PAIRS + 1, PAIRS_AT_ONCE)
    right = hits.cumsum(1)[:, asked - 1]  # [judges, times asked]
    found = table[right, asked - right]
    first = (found != 0).argmax(1)
    result = found[np.arange(len(hits)), first]
    ends = np.array([evidence(int(n), MOST_PAIRS - int(n)) > 0 for n in right[:, -1]])
    return np.where(result == 0, ends, result > 0), np.where(result == 0, MOST_PAIRS, asked[first])


def simulated(share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`decisions` on JUDGES that are right on a share of the pairs."""
    draws = np.random.default_rng(seed).random((JUDGES, MOST_PAIRS))
    return decisions(draws < share)


class Scripted:
    """A judge whose verdicts are written down."""

    name = "scripted"

    def __init__(self, hits: np.ndarray):
        self.hits, self.asked = hits, 0

    def compare(self, asked: list[Comparison]) -> tuple[list, dict]:
        """The next verdicts."""
        some = self.hits[self.asked:self.asked + len(asked)]
        self.asked += len(asked)
        return [("expert" if hit else "base", []) for hit in some], {"prompts": len(asked)}


def test_the_simulation_decides_as_the_judges_test_does() -> None:
    """If not, the error rates below would be those of another rule: 300 judges of all qualities."""
    generator = np.random.default_rng(1)
    hits = generator.random((300, MOST_PAIRS)) < generator.uniform(0.4, 1, (300, 1))
    passed, pairs = decisions(hits)
    assert 0 < passed.mean() < 1 and pairs.min() == PAIRS_AT_ONCE and pairs.max() == MOST_PAIRS
    for row, expected, n in zip(hits, passed, pairs):
        supply = iter([Comparison("q", "", "right", "wrong")] * (2 * MOST_PAIRS))
        with tqdm(total=1, disable=True) as bar:
            found, cost = ask_until_decided(Scripted(row), supply, False, bar)
        assert (found["passed"], found["pairs"]) == (expected, n)
        assert cost["prompts"] == n and found["right"] + found["wrong"] == n


def test_good_judges_are_refused_in_at_most_one_of_a_hundred() -> None:
    """More would be refused that are right on 0.9 of both kinds that decide."""
    (first, pairs), (second, _) = simulated(0.9), simulated(0.9, 1)
    assert (~(first & second)).mean() <= 0.01
    assert (~first).mean() == pytest.approx(1 / 300, abs=0.0015)  # as support/stats.py says
    assert pairs.mean() < 25  # and that is why it is sequential


def test_poor_judges_are_trusted_in_at_most_one_of_a_hundred() -> None:
    """A judge that is right on 0.6 only would pass even one kind more often."""
    passed, pairs = simulated(0.6)
    assert passed.mean() <= 0.01
    assert passed.mean() == pytest.approx(1 / 118, abs=0.0025)
    assert pairs.mean() < 25
    for share in (0.5, 0.3):  # and worse ones still less
        assert simulated(share)[0].mean() <= 0.001


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
    for _ in range(200):
        area, low, high = auc(list(generator.normal(1, 1, 40)), list(generator.normal(0, 1, 40)))
        covered += low <= 0.760 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_roc_and_threshold() -> None:
    """A corner of the curve would be wrong; or the threshold not halfway below the point farthest
    from the diagonal, or, where classes cannot be told apart, not one half."""
    probability, targets = [0.9, 0.8, 0.7, 0.3, 0.2, 0.1], [1, 1, 0, 1, 0, 0]
    assert roc(probability, targets) == [
        [0.9, 0, 1 / 3], [0.8, 0, 2 / 3], [0.7, 1 / 3, 2 / 3], [0.3, 1 / 3, 1],
        [0.2, 2 / 3, 1], [0.1, 1, 1]]
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
