"""gate.py: what the gate learns, how it is scored, and when it opens."""

from pathlib import Path

import pytest
import torch
from support.messages import conversation
from tiny import one_thread
from tiny_run import rows_of, run_train, verdict, write_rows
from torch import Tensor

import gate
from bootstrap import Verdict
from gate import (choose_target, choose_thresholds, fit_gate, gate_targets, open_share, out_of_fold,
                  probabilities, read_traffic, train_gate, with_traffic)
from generate import gate_features
from model import Transformer
from prism import PRISM, Gate
from queries import Query
from support.hub import InputError
from support.runs import RunFolder
from support.stats import (auc, by_class, calibrated_log_loss, decision_scores, upper_quantile,
                           youden_threshold)
from tokenizer import Tokenizer


def planted(n: int, positives: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes in 32 dimensions, `distance` deviations apart, in crooked units."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.arange(n) < positives).float()
    x = torch.randn(n, 32, generator=generator)
    x[:, 3] += distance * targets
    return x * torch.logspace(-3, 3, 32) + torch.linspace(-50, 50, 32), targets


def fitted(x: Tensor, targets: Tensor) -> Gate:
    """A gate that learned these targets."""
    made = Gate(x.shape[1])
    with one_thread():
        train_gate(made, x, targets)
    return made


def test_out_of_fold_never_saw_the_query() -> None:
    """A gate would be scored on what it was fitted on: on labels that nothing can predict it looks
    perfect there, and is at chance out of fold; labels that can be predicted stay so."""
    x = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    noise = (torch.arange(120) % 2).float()
    seen = fitted(x, noise)(x).sigmoid().tolist()
    with one_thread():
        unseen, fold = out_of_fold(x, noise, [""] * 120, "verdict", 0)
        real, _ = out_of_fold(*planted(200, 80, 5.0, 0), [""] * 200, "verdict", 0)
    labels = noise.int().tolist()
    assert auc(*by_class(seen, labels))[0] > 0.95
    _, low, high = auc(*by_class(unseen, labels))
    assert low < 0.5 < high
    assert sum((p >= 0.5) == (i < 80) for i, p in enumerate(real)) > 0.85 * 200
    for label in (0, 1):  # both classes are dealt out evenly
        assert [sum(f == i and t == label for f, t in zip(fold, labels)) for i in range(5)] == (
            [12] * 5)


def test_a_personas_rate_leaves_out_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The win rate that a gate learns would count the very verdicts that it is scored on."""
    counted = []
    monkeypatch.setattr(gate, "gate_targets", lambda labels, personas, kind: counted.append(
        sorted(zip(personas, labels.tolist()))) or labels)
    names, labels = [chr(97 + i) for i in range(20)], torch.arange(20.0) / 20
    with one_thread():
        _, fold = out_of_fold(torch.eye(20), labels, names, "intent", 0)
    rows = list(zip(names, labels.tolist(), fold))
    assert counted == [[(n, t) for n, t, f in rows if f != number] for number in range(5)]


def test_train_gate_balances_the_classes() -> None:
    """One positive query in twelve: most would not open the gate (40% unbalanced, 72% balanced)."""
    made = fitted(*planted(3000, 250, 2.0, 0))
    x, targets = planted(600, 300, 2.0, 1)
    with torch.no_grad():
        opened = made(x).sigmoid() >= 0.5
    recall, rejected = opened[targets == 1].float().mean(), (~opened)[targets == 0].float().mean()
    assert float(recall) > 0.6 and float(rejected) > 0.75


def test_gate_that_reads_infinity_is_named() -> None:
    """States that overflowed would make a gate of NaN."""
    x, targets = planted(20, 10, 1.0, 0)
    x[3, 3] = float("inf")
    with pytest.raises(InputError, match="stage 4: the gate's loss"):
        fitted(x, targets)


def test_intent_is_the_personas_rate() -> None:
    """A query's target would be another persona's rate, or not shrunk towards that of all."""
    labels = torch.tensor([1.0] * 9 + [0.0] + [1.0] + [0.0] * 9)
    names = ["a"] * 10 + ["b"] * 10
    targets = gate_targets(labels, names, "intent")
    assert len(set(targets.tolist())) == 2
    assert 0.8 < float(targets[0]) < 0.9 and 0.1 < float(targets[-1]) < 0.2
    assert torch.equal(gate_targets(labels, names, "verdict"), labels)


def test_traffic_stands_in_for_losses() -> None:
    """A gate that has seen nothing but wins would open for everything; traffic would not count as
    one more contrast; or it would be taken for losses where personas have real ones."""
    x, targets = planted(120, 60, 5.0, 0)
    won, ordinary = x[targets == 1], x[targets == 0]
    features, labels, names = with_traffic(won, torch.ones(60), ["a"] * 60, ordinary)
    assert labels.tolist() == [1.0] * 60 + [0.0] * 60 and len(names) == len(features) == 120
    made = fitted(features, gate_targets(labels, names, "intent"))
    assert open_share(probabilities(made, won), 0.5) > 0.95
    assert open_share(probabilities(made, ordinary), 0.5) < 0.05
    assert with_traffic(x, targets, ["a"] * 120, ordinary)[0] is x
    assert len(with_traffic(x, targets, ["a"] * 60 + ["contrast_b"] * 60, ordinary)[0]) == 180


def world(per_persona: int, rates: float, query: float, seed: int) -> tuple:
    """Queries of twelve personas whose win probability is planted, one noisy verdict each: logit =
    the persona's (spread over +-`rates`) + `query` * z, z being a direction of the features.

    Returns features, verdicts, personas; and features and probabilities of unseen queries.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 48, generator=generator) * 0.65
    direction = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    logit = torch.linspace(-rates, rates, 12)[torch.randperm(12, generator=generator)]

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        who = torch.arange(12).repeat_interleave(n)
        z = torch.randn(len(who), generator=generator)
        x = centres[who] + torch.randn(len(who), 48, generator=generator)
        return x + 3 * z[:, None] * direction, torch.sigmoid(logit[who] + query * z), who

    x, p, who = draw(per_persona)
    unseen, truth, _ = draw(100)
    return x, torch.bernoulli(p, generator=generator), [str(int(w)) for w in who], unseen, truth


def youden(score: Tensor, truth: Tensor) -> float:
    """The best true-positive minus false-positive rate of any threshold on a score, in expectation
    over verdicts of probability `truth`."""
    p = truth[score.argsort(descending=True)]
    return float((p.cumsum(0) / p.sum() - (1 - p).cumsum(0) / (1 - p).sum()).max())


def regrets(per_persona: int, rates: float, query: float, seed: int) -> dict[str, float]:
    """What routing by each target's gate, and by that which `auto` takes, loses of the best."""
    x, labels, names, unseen, truth = world(per_persona, rates, query, seed)
    best, lost, losses = youden(truth, truth), {}, {}
    for kind in ("verdict", "intent"):
        score = fitted(x, gate_targets(labels, names, kind))(unseen).detach()
        with one_thread():
            probability, _ = out_of_fold(x, labels, names, kind, seed)
        lost[kind] = 1 - youden(score, truth) / best
        losses[kind] = calibrated_log_loss(probability, labels.tolist())
    return lost | {"auto": lost[choose_target(losses)]}


@pytest.mark.parametrize(("rates", "query", "better"), [
    (1.5, 0.3, "intent"), (0.5, 1.5, "verdict")])
def test_auto_takes_the_better_target(rates: float, query: float, better: str) -> None:
    """Where verdicts are noise around a persona's rate, learning them would do as well as learning
    that rate, or where the query decides, the rate would do; or auto would take the worse one."""
    found = [regrets(50, rates, query, seed) for seed in range(2)]
    mean = {kind: sum(f[kind] for f in found) / len(found) for kind in found[0]}
    worse = "verdict" if better == "intent" else "intent"
    assert mean[better] < 0.8 * mean[worse]
    assert mean["auto"] <= mean[better] + 0.05


def test_a_threshold_spares_ordinary_traffic() -> None:
    """More of the traffic than the rate would open the gate, or a fixed threshold would move."""
    x, targets = planted(200, 80, 5.0, 0)
    made, names = fitted(x, targets), [""] * 200
    with one_thread():
        p, fold = out_of_fold(x, targets, names, "verdict", 0)
    # Three in ten of it look like wins.
    ordinary = probabilities(made, planted(100, 30, 5.0, 1)[0])
    chosen = {rate: choose_thresholds(p, targets, fold, ordinary, None, rate)
              for rate in (0.01, 0.1, 1.0)}
    shares = {rate: open_share(ordinary, t[None]) for rate, t in chosen.items()}
    assert shares[0.01] < 0.02 and shares[0.1] < 0.11 and shares[1.0] > 0.25
    assert set(chosen[0.1]) == {*range(5), None}
    fixed = choose_thresholds(p, targets, fold, ordinary, 0.3, 0.01)
    assert set(fixed.values()) == {0.3}
    few = choose_thresholds(p, targets, fold, ordinary[:9], None, 0.1)
    assert few == chosen[1.0] and open_share([], 0.5) is None


def test_traffic_that_was_learned_counts_out_of_fold() -> None:
    """A gate would be held to the rate on traffic that it knows by heart, and opens for none of."""
    x = torch.randn(240, 32, generator=torch.Generator().manual_seed(0))  # nothing tells them apart
    rows = [verdict(i, "expert", "a") for i in range(80)]
    rows += [verdict(i, "base", "contrast_b") for i in range(80)]
    learned = Gate(32)
    with one_thread():
        loose, strict = (fit_gate(gate, x[:160], x[160:], rows, "verdict", None, rate, 0)
                         for gate, rate in ((learned, 1.0), (Gate(32), 0.1)))
    by_heart = open_share(probabilities(learned, x[160:]), loose["threshold"])
    assert by_heart < 0.1 < loose["traffic_opened"]
    assert 0 < strict["traffic_opened"] < 0.12 and strict["threshold"] > loose["threshold"]


def test_a_gate_goes_by_brought_traffic(out: Path, command: list[str], tmp_path: Path) -> None:
    """Somebody's real prompts would not be used, or be lost where stage 4 is done again."""
    brought = tmp_path / "brought"
    brought.mkdir()
    rows = [{"query": "How are you?"}, {"query": "What is new?"}]
    for folder, again in ((out, ["--from", "gate"]), (brought, [])):
        write_rows(folder, "traffic.jsonl", rows)
        assert run_train(*command, "--out", folder, "--stop-after", "gate", *again) == 0
        last = {row["stage"]: row for row in rows_of(folder, "metrics.jsonl")}
        assert last["gate"]["traffic"] == 2 and rows_of(folder, "traffic.jsonl") == rows


def test_reported_gate_scores_are_out_of_fold() -> None:
    """Accuracy, AUC and the rest would come from gates that saw the query, or from a threshold that
    it had a part in; or the gate that is kept, or its threshold, not be fitted on all."""
    (x, targets), (ordinary, _) = planted(120, 50, 1.5, 0), planted(60, 20, 1.5, 1)
    rows = [verdict(i, "expert" if won else "base") for i, won in enumerate(targets)]
    made = Gate(32)
    with one_thread():
        found = fit_gate(made, x, ordinary, rows, "verdict", None, 0.5, 0)
        probability, fold = out_of_fold(x, targets, [""] * 120, "verdict", 0)
    lowest = upper_quantile(probabilities(made, ordinary), 0.5)
    thresholds = {}
    for left_out in (*range(5), None):
        others = [i for i, f in enumerate(fold) if f != left_out]
        best = youden_threshold([probability[i] for i in others], [i < 50 for i in others])
        thresholds[left_out] = max(best, lowest)
    assert found["threshold"] == pytest.approx(thresholds[None])
    for mine, of_all in zip(made.parameters(), fitted(x, targets).parameters()):
        torch.testing.assert_close(mine, of_all)
    opened = [p >= thresholds[f] for p, f in zip(probability, fold)]
    assert opened != [p >= thresholds[None] for p in probability]  # or the folds were not tested
    expected = decision_scores(probability, opened, [i < 50 for i in range(120)])
    assert {n: found[n] for n in expected} == expected


def test_the_gate_that_is_kept(finished: Path, net: Transformer, tok: Tokenizer,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not be fitted on the run's own queries, verdicts and traffic, or not be the one that
    routes; or other figures than its own be recorded."""
    monkeypatch.setattr(gate, "GATE_STEPS", 20)  # as in `run_train`
    prism, again = PRISM.load(finished, net), PRISM(net, rank=4, gate_pool="mean")
    run = RunFolder(finished)
    messages, verdicts = read_traffic(run), run.read("verdicts.jsonl", Verdict)
    queries, row = run.read("queries.jsonl", Query), run.latest()["gate"]
    assert len(set(messages)) == len(messages) == row["traffic"]
    with one_thread():
        features, _ = gate_features(prism, tok, [conversation(q.query) for q in queries])
        traffic, _ = gate_features(prism, tok, list(map(conversation, messages)))
        figures = fit_gate(again.gate, features, traffic, verdicts, "auto", None, 0.05, 0)
    assert {name: row[name] for name in figures} == figures
    for mine, saved in zip(again.gate.state_dict().values(), prism.gate.state_dict().values()):
        torch.testing.assert_close(mine, saved, rtol=1e-4, atol=1e-4)
