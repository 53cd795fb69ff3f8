"""Every statistic of the project in one place: intervals, tests, thresholds.

Plain functions of numbers, each with its source and a worked example (run as doctests).
"""

import math
from collections import Counter
from typing import Sequence

import numpy as np

RESAMPLES = 2000  # of a bootstrap interval
MIDDLE = 2.5, 97.5  # the percentiles between which 95% are
Z95 = 1.959964  # the normal quantile of a two-sided 95% interval
# The two shares that a sequential test tells apart, and the `evidence` at which it ends. With 4
# pairs at a time and 60 at most, a judge that is right on 0.9 fails one test in 300, and one that
# is right on 0.6 passes one in 118 (tests/test_stats.py).
LOW_SHARE, HIGH_SHARE = 0.6, 0.9
PASS, FAIL = 4.4, -5.0


def interval(hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (1927), which unlike the normal one stays within [0, 1].

    >>> [round(x, 2) for x in interval(24, 24)]
    [0.86, 1.0]
    """
    if not n:
        return 0.0, 1.0
    share, z = hits / n, Z95**2 / n
    middle = share + z / 2
    half = Z95 * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return max((middle - half) / (1 + z), 0.0), min((middle + half) / (1 + z), 1.0)


def log_likelihood_ratio(right: int, wrong: int) -> float:
    """Log-likelihood ratio of HIGH_SHARE against LOW_SHARE after so many hits and misses: asked on
    while it is between FAIL and PASS, this is Wald's sequential probability ratio test (1945), the
    test that needs the fewest samples.

    >>> round(log_likelihood_ratio(12, 0), 2), round(log_likelihood_ratio(0, 4), 2)
    (4.87, -5.55)
    """
    return (right * math.log(HIGH_SHARE / LOW_SHARE)
            + wrong * math.log((1 - HIGH_SHARE) / (1 - LOW_SHARE)))


def auc(positive: Sequence[float], negative: Sequence[float]) -> tuple:
    """Area under the ROC curve and its 95% interval (Hanley and McNeil 1982); None without both
    classes.

    >>> [round(x, 2) for x in auc([0.9, 0.8], [0.7, 0.1])]
    [1.0, 0.63, 1.0]
    """
    m, n = len(positive), len(negative)
    if not (m and n):
        return None, None, None
    wins = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    area = wins / (m * n)
    a = (wins + 0.5) / (m * n + 1)  # the formula's variance is 0 at 0 and 1, however few there are
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (m - 1) * (q1 - a**2) + (n - 1) * (q2 - a**2)) / (m * n)
    half = Z95 * math.sqrt(max(variance, 0.0))
    return area, max(area - half, 0.0), min(area + half, 1.0)


def by_class(scores: Sequence[float], labels: Sequence[int]) -> tuple[list[float], list[float]]:
    """The scores of the positive and of the negative items.

    >>> by_class([0.1, 0.9], [0, 1])
    ([0.9], [0.1])
    """
    return ([s for s, label in zip(scores, labels) if label],
            [s for s, label in zip(scores, labels) if not label])


def youden_threshold(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The threshold whose true-positive rate exceeds its false-positive rate most (Youden 1950),
    halfway to the next lower score; 0.5 where the AUC cannot be told from chance.

    >>> youden_threshold([0.9] * 20 + [0.1] * 20, [1] * 20 + [0] * 20)
    0.5
    """
    positive, negative = by_class(scores, labels)
    _, low, _ = auc(positive, negative)
    if low is None or low <= 0.5:
        return 0.5

    def excess(threshold: float) -> float:
        """True-positive less false-positive rate."""
        hits = sum(s >= threshold for s in positive) / len(positive)
        return hits - sum(s >= threshold for s in negative) / len(negative)

    best = max(sorted(set(scores), reverse=True), key=excess)
    below = max((s for s in scores if s < best), default=0.0)
    return (best + below) / 2


def decision_scores(scores: Sequence[float], decisions: Sequence[bool],
                    labels: Sequence[int]) -> dict:
    """Accuracy of yes-or-no decisions, the majority's rate beside it, the AUC of the scores behind
    them, and the confusion matrix of an open (yes) or closed gate.

    >>> decision_scores([0.9, 0.2], [True, True], [1, 0])["confusion"]["false_open"]
    1
    """
    n, positives = len(labels), sum(labels)
    cells = Counter(zip(map(bool, labels), map(bool, decisions)))
    area, low, high = auc(*by_class(scores, labels))
    return {"n": n, "accuracy": (cells[True, True] + cells[False, False]) / n if n else None,
            "majority": max(positives, n - positives) / n if n else None,
            "auc": area, "auc_interval": [low, high],
            "confusion": {"true_open": cells[True, True], "false_open": cells[False, True],
                          "true_closed": cells[False, False], "false_closed": cells[True, False]}}


def shrunken_rates(hits: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The rates of groups, each shrunk towards that of all groups the more the fewer it counts: the
    posterior means of a beta-binomial whose prior fits the spread between groups (its intraclass
    correlation by moments: Fleiss, Statistical Methods for Rates and Proportions, 1981).

    >>> [round(rate, 2) for rate in shrunken_rates([9, 5, 1], [10, 10, 10])]
    [0.86, 0.5, 0.14]
    >>> [round(rate, 2) for rate in shrunken_rates([5, 6], [10, 10])]  # no spread beyond chance
    [0.55, 0.55]
    """
    n, groups = sum(counts), len(counts)
    overall = sum(hits) / n
    rates = [hit / count for hit, count in zip(hits, counts)]
    between = sum(c * (rate - overall) ** 2 for c, rate in zip(counts, rates)) / max(groups - 1, 1)
    within = sum(c * rate * (1 - rate) for c, rate in zip(counts, rates)) / max(n - groups, 1)
    size = (n - sum(c * c for c in counts) / n) / max(groups - 1, 1)  # of a group, on average
    if between <= within:
        return [overall] * groups
    correlation = (between - within) / (between + (size - 1) * within)
    prior = max(1 / correlation - 1, 1.0)  # worth so many counts
    return [(hit + prior * overall) / (c + prior) for hit, c in zip(hits, counts)]


def calibrated_log_loss(probabilities: Sequence[float], labels: Sequence[float]) -> np.ndarray:
    """The negative log-likelihood of each label, in nats, under the probabilities once their logits
    z are made a z + b with the best a >= 0 and b (Platt 1999): what a ranking says about labels,
    whatever its confidence. Fitted by Newton's method.

    >>> loss = calibrated_log_loss([0.9, 0.8, 0.2, 0.1] * 9, [1, 0, 1, 0] * 9)
    >>> round(float(loss.mean()), 2)  # hardly anything
    0.67
    >>> round(float(calibrated_log_loss([0.1, 0.9] * 9, [1, 0] * 9).mean()), 3)  # the wrong way
    0.693
    """
    z = np.clip(np.array(probabilities, dtype=float), 1e-6, 1 - 1e-6)
    X, y = np.stack((np.log(z / (1 - z)), np.ones(len(z)))), np.array(labels, dtype=float)
    weights, ridge = np.zeros(2), 1e-3 * np.eye(2)
    for _ in range(25):
        p = 1 / (1 + np.exp(-(weights @ X)))
        hessian = (X * (p * (1 - p))) @ X.T + ridge
        weights += np.linalg.solve(hessian, X @ (y - p) - ridge @ weights)
    p = 1 / (1 + np.exp(-(weights @ X))) if weights[0] > 0 else np.full(len(y), y.mean())
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def upper_quantile(scores: Sequence[float], share: float) -> float:
    """The lowest threshold that at most `share` of the scores reach; 0 if these are too few to tell
    so small a share.

    >>> upper_quantile([0.1, 0.2, 0.3, 0.4], 0.5), upper_quantile([0.1, 0.2], 0.4)
    (0.25, 0.0)
    """
    order = sorted(scores, reverse=True)
    allowed = int(share * len(scores))
    if allowed in (0, len(scores)):
        return 0.0
    return (order[allowed - 1] + order[allowed]) / 2


def bootstrap_ratio(above: Sequence[float],
                    below: Sequence[float]) -> tuple[float, list[float]] | None:
    """The ratio of the means of two paired samples and its 95% percentile bootstrap interval (Efron
    1979): over ones, the mean. None where the mean below cannot be told from 0.

    >>> bootstrap_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    (0.5, [0.5, 0.5])
    """
    pairs, rng = np.array([above, below]).T, np.random.default_rng(0)
    n = len(pairs)
    means = np.stack([pairs[rng.integers(n, size=n)].mean(0) for _ in range(RESAMPLES)])
    over, under = means.T
    low, high = np.percentile(under, MIDDLE)
    if low <= 0 <= high:
        return None
    kept = under != 0
    ratios = over[kept] / under[kept]
    return float(pairs[:, 0].mean() / pairs[:, 1].mean()), np.percentile(ratios, MIDDLE).tolist()


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation (of ranks: Spearman's); None for fewer than three points or a constant.

    >>> pearson([1, 2, 3], [3, 2, 1])
    -1.0
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return round(float(np.corrcoef(x, y)[0, 1]), 12)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties share their mean rank.

    >>> ranks([0.5, 0.1, 0.5])
    [2.5, 1.0, 2.5]
    """
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
