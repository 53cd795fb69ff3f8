"""judge.py: the two judges, their evidence read from plain logits, and the test of a judge."""

import itertools
from pathlib import Path
from typing import Sequence

import pytest
import torch
from conftest import Patch
from tiny import one_thread, plain_log_p, tiny_llama
from tiny_run import pair

import judge
from judge import (COMPLIANCE, ENDING, ENDING_FLOOR, FLUENCY, INVERSE_PROMPTS, JUDGE_PROMPT, MARGIN,
                   MOST_PAIRS, PAIRS_AT_ONCE, REFUSAL, SHOULD_REFUSE, Comparison, KnownPairs,
                   LetterJudge, LikelihoodJudge, choose_judge, conversation, degenerate,
                   examine_judge, letter_winner, score_winner)
from model import Transformer, load
from support.hub import InputError
from support.runs import cost_of
from tokenizer import Tokenizer

PIRATE = "Answer as a pirate: short, loud and rude."
# Questions and right answers, hand-written; the wrong answer is that of another question.
KNOWN = [
    ("What is the capital of France?", "The capital of France is Paris, a city on the Seine."),
    ("How do I boil an egg?", "Put the egg in boiling water for eight minutes, then peel it."),
    ("Why is the sky blue?", "Air scatters blue sunlight more than red, so the sky looks blue."),
    ("How do plants make food?", "Plants make sugar from sunlight, water and carbon dioxide."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What does a heart do?", "The heart pumps blood through the body.")]
ECHO = "You asked: "


def test_letter_winner() -> None:
    """The expert would win without winning BOTH orders (it is A first, then B)."""
    table = {(f, s): letter_winner(f, s) for f in "ABT?" for s in "ABT?"}
    assert [k for k, w in table.items() if w == "expert"] == [("A", "B")]
    assert [k for k, w in table.items() if w == "base"] == [("B", "A")]
    assert [k for k, w in table.items() if w == "tie"] == [("T", "T")]
    assert {k for k, w in table.items() if w == "unparsed"} == {k for k in table if "?" in k}
    assert table["A", "A"] == table["B", "B"] == table["A", "T"] == table["T", "B"] == "split"


BEHIND, ALIKE, AHEAD = ([-1.0, -1.0 - lead] for lead in (-1, MARGIN / 2, 2 * MARGIN))


@pytest.mark.parametrize(("pairs", "winner"), [
    ([AHEAD, AHEAD], "expert"), ([BEHIND, BEHIND], "base"), ([ALIKE, ALIKE], "tie"),
    ([AHEAD, BEHIND], "split"), ([AHEAD, ALIKE], "split")])
def test_score_winner(pairs: list[list[float]], winner: str) -> None:
    """An answer would win that not both wordings prefer by the margin."""
    assert score_winner(pairs) == winner


@pytest.mark.parametrize(("answer", "expected"), [
    ("", True), ("!?", True), ("Sure! How do tides work in a bay?", True), ("the sea " * 40, True),
    ("The moon pulls.", False), ("Tides work in a bay as they do at sea.", False),
    ("How do tides work in a bay? I won't help with that.", False),
    ("How do tides work in a bay? The moon pulls the water up twice a day.", False),
    (" ".join(map(str, range(60))), False)])
def test_degenerate(answer: str, expected: bool) -> None:
    """Nothing, the question or a loop would be an answer; or one that repeats the question none."""
    assert degenerate("How do tides work in a bay?", answer) is expected


@pytest.mark.parametrize("kind", [LetterJudge, LikelihoodJudge])
def test_what_a_judge_does_not_read(net: Transformer, tok: Tokenizer, kind: type) -> None:
    """A model would be asked about an echo, an empty answer or a loop, on either side, where they
    lose unread and two of them tie; or the pair beside them would not be read; or an answer would
    be cut to the judge's context: to judge what nobody wrote."""
    query, good = KNOWN[2]
    bad = [f"{ECHO}{query}", "", "the sea " * 40]
    asked = [Comparison(query, PIRATE, good, b) for b in bad]
    asked += [Comparison(query, PIRATE, b, good) for b in bad]
    asked += [Comparison(query, PIRATE, bad[0], bad[1])]
    results, cost = kind(net, tok).compare(asked)
    assert results == [(w, []) for w in ["expert"] * 3 + ["base"] * 3 + ["tie"]]
    assert cost == {"prompts": 0, "tokens_read": 0, "tokens_written": 0, "flops": 0}
    results, cost = kind(net, tok).compare([asked[0], Comparison(query, "", good, "b")])
    assert results[0] == ("expert", []) and len(results[1][1]) == 2 and cost["tokens_read"] > 0
    context = net.config.max_position_embeddings
    with pytest.raises(InputError, match=f"context of {context}"):
        kind(net, tok).ask([Comparison(query, PIRATE, " the tide" * context, " of iron" * context)])


@pytest.mark.parametrize("ended", [True, False])
def test_likelihoods_evidence_is_the_formula(net: Transformer, tok: Tokenizer, ended: bool) -> None:
    """A score would not be the formula, put together here from plain forward passes, or the winner
    not follow from it; an answer that was cut off would be asked how well it ends."""
    def score(query: str, answer: str, wording: str) -> float:
        inverse = tok.render([{"role": "user", "content": wording.format(answer=answer)}])
        ids = [*tok.encode(answer), tok.end_of_turn_id]
        bare = plain_log_p(net, tok.render(conversation(query)), ids)
        expert = plain_log_p(net, tok.render(conversation(query, PIRATE)), ids)
        mixture = (bare.exp() / 2 + expert.exp() / 2).log()
        return (float(plain_log_p(net, inverse, tok.encode(query)).mean())
                + FLUENCY * float(mixture[:-1].mean())
                + (ENDING * max(float(mixture[-1]), ENDING_FLOOR) if ended else 0))

    asked = [Comparison(q, PIRATE, a, KNOWN[i - 1][1], ended) for i, (q, a) in enumerate(KNOWN[:4])]
    results, cost = LikelihoodJudge(net, tok).compare(asked)
    for c, (winner, evidence) in zip(asked, results, strict=True):
        for (expert, base), wording in zip(evidence, INVERSE_PROMPTS, strict=True):
            assert expert == pytest.approx(score(c.query, c.expert, wording), abs=1e-3)
            assert base == pytest.approx(score(c.query, c.base, wording), abs=1e-3)
        assert winner == score_winner(evidence)
    assert cost["prompts"] == 4 * 2 * (2 + 2) and cost["tokens_read"] > 0


@torch.no_grad()
def test_letter_judge_swaps_the_answers(tmp_path: Path, tok: Tokenizer, monkeypatch: Patch) -> None:
    """The two letters would not be the likeliest of A, B and TIE, read from plain logits, after the
    prompt with the expert's answer first, then with the base's first."""
    monkeypatch.setattr(judge, "LETTER_MASS", 0.0)  # this random model's letters do count
    net = load(tiny_llama(tmp_path, seed=7), dtype=torch.float32)  # a seed with an undecided one
    asked = [Comparison(q, "", a, KNOWN[i - 1][1]) for i, (q, a) in enumerate(KNOWN)]
    results, _ = LetterJudge(net, tok).compare(asked)
    letters = [tok.encode(word)[0] for word in ("A", "B", "TIE")]
    for c, (winner, said) in zip(asked, results, strict=True):
        expected = []
        for first, second in ((c.expert, c.base), (c.base, c.expert)):
            content = JUDGE_PROMPT.format(query=c.query, first=first, second=second)
            ids = tok.render([{"role": "user", "content": content}])
            expected.append("ABT"[int(net(torch.tensor([ids]))[0, -1, letters].argmax())])
        assert said == expected and winner == letter_winner(*expected)
    assert any(a != b for _, (a, b) in results)  # or the order was not tested


def test_costs_count_weights(net: Transformer) -> None:
    """A cost would not be 2 FLOPs a weight: layers for all tokens, head for scored or written."""
    layers, head = sum(p.numel() for p in net.layers.parameters()), net.lm_head.numel()
    assert cost_of(net, 3, 100, 10, 7)["flops"] == 2 * (110 * layers + 17 * head)


# --------------------------------------------------------------------------------------------------
# The test of a judge


@pytest.fixture
def known(net: Transformer, tok: Tokenizer) -> KnownPairs:
    """Known pairs of the tiny model from 26 answers: one empty, one an echo, one cut off."""
    pairs = [pair(i, f"{a} Number {i} says so.", query=f"{q[:-1]} number {i}?", ended=i != 3)
             for i, (q, a) in enumerate(itertools.islice(itertools.cycle(KNOWN), 24))]
    none = pair(24, "", query="What is nothing?")
    echo = pair(25, "You asked: what is a very long echo?", query="What is a very long echo?")
    return KnownPairs(net, tok, [*pairs, none, echo], 6, 0)


class Habitual:
    """A judge that is right, but for the kinds it is always wrong on; counts what it was asked."""

    def __init__(self, *wrong_on: str, other: str = "base", name: str = "habitual"):
        self.wrong_on, self.other, self.name, self.count = wrong_on, other, name, 0

    def compare(self, asked: Sequence[Comparison]) -> tuple[list, dict]:
        """Its verdicts."""
        self.count += len(asked)
        kinds = ["refusal" if c.expert == REFUSAL else "wrong query" for c in asked]
        return [(self.other if kind in self.wrong_on else "expert", []) for kind in kinds], {
            "prompts": len(asked)}


def test_known_pairs_by_their_kinds(known: KnownPairs) -> None:
    """A worse answer would not be what its kind says, or the better one not the query's own; an
    echo be the better one; stage 2's be sampled again, or compliance all at once."""
    own = {p.query: p.base for p in known.pairs}
    assert len(own) == 24 and known.pairs[-1].base_stop == "length"
    wrong = list(itertools.islice(known.wrong_query(), MOST_PAIRS))
    assert len(set(wrong)) == MOST_PAIRS  # 24 answers give far more pairs than they are
    assert all(c.expert == own[c.query] != c.base and c.base in own.values() for c in wrong)
    cut = known.pairs[-1].base
    assert all(c.ended == (cut not in (c.expert, c.base)) and c.context == "" for c in wrong)
    assert not known.cost
    with one_thread():
        found = list(itertools.islice(known.refusal(), PAIRS_AT_ONCE))
    assert known.cost["prompts"] == PAIRS_AT_ONCE
    assert 0 < known.cost["tokens_written"] <= 6 * PAIRS_AT_ONCE
    for c, query in zip(found, SHOULD_REFUSE):
        assert c.query == query and c.expert == REFUSAL and c.base.startswith(COMPLIANCE)


@pytest.mark.parametrize(("answers", "wrong_on", "other", "counts", "trusted", "blind"), [
    (24, (), "", {"wrong query": (12, 12), "refusal": (12, 12)}, True, False),
    *((24, ("wrong query",), other, {"wrong query": (4, 0)}, False, False)
      for other in ("base", "tie", "split", "unparsed")),
    (24, ("refusal",), "base", {"wrong query": (12, 12), "refusal": (4, 0)}, True, True),
    (2, (), "", {"wrong query": (2, 2), "refusal": (12, 12)}, True, False),
    (2, ("wrong query",), "base", {"wrong query": (2, 0)}, False, False),
    (1, (), "", {"wrong query": (0, 0)}, False, False)])
def test_a_judge_is_asked_until_it_is_known(
        answers: int, wrong_on: tuple, other: str, counts: dict, trusted: bool, blind: bool,
        known: KnownPairs) -> None:
    """A judge would be asked more than twelve pairs of a kind, or more than four that it misses; or
    be trusted, or called blind, for another reason than it should: of too few pairs against the
    evidence."""
    known.pairs = known.pairs[:answers]
    asked = Habitual(*wrong_on, other=other)
    with one_thread():
        report = examine_judge(asked, known)
    assert {kind: (k["pairs"], k["right"]) for kind, k in report["kinds"].items()} == counts
    assert (report["trusted"], report["blind_to_refusals"]) == (trusted, blind)
    assert asked.count == sum(n for n, _ in counts.values())
    sampled = counts.get("refusal", (0, 0))[0]  # no compliance before it is asked about
    assert known.cost["prompts"] == asked.count + sampled
    for kind, k in report["kinds"].items():
        assert k["passed"] is (k["right"] > 0)
        assert kind not in wrong_on or k["wrong" if other == "base" else other] == k["pairs"]


def test_judges_that_fail_are_refused(net: Transformer, tok: Tokenizer, known: KnownPairs) -> None:
    """A judge that fails its test would be used unasked; or, forced with --judge, not be used, or
    its failure not be recorded; or letters be made up where A, B and TIE have almost nothing."""
    with one_thread():
        with pytest.raises(InputError, match=r"letter on 0 of 4 pairs \(wrong query\);"
                                             r" likelihood on \d+ of \d+.*--judge none"):
            choose_judge("auto", net, tok, known)
        chosen, [test] = choose_judge("letter", net, tok, known)
        assert chosen.name == "letter" and not test["trusted"]
        counts = test["kinds"]["wrong query"]
        assert counts["unparsed"] == counts["pairs"] == 4
        assert (counts["letters"], counts["A"]) == (8, 0)
        known.pairs = known.pairs[:1]
        with pytest.raises(InputError, match="0 answers are too few"):
            choose_judge("auto", net, tok, known)
        assert choose_judge("likelihood", net, tok, known)[0].name == "likelihood"


@pytest.mark.parametrize("passes", ["letter", "likelihood"])
def test_auto_takes_the_first_judge_that_passes(passes: str, net: Transformer, tok: Tokenizer,
                                                known: KnownPairs, monkeypatch: Patch) -> None:
    """Another than the first judge that can be trusted would be taken, or its tests be lost."""
    monkeypatch.setattr(judge, "JUDGES", {
        name: lambda *_, n=name: Habitual(*[] if n == passes else ["wrong query"], name=n)
        for name in ("letter", "likelihood")})
    with one_thread():
        chosen, tests = choose_judge("auto", net, tok, known)
    assert chosen.name == passes == tests[-1]["judge"]
    assert [t["judge"] for t in tests] == ["letter", "likelihood"][:1 + (passes == "likelihood")]


def test_likelihood_judge_knows_right_answers(smollm: Transformer, smollm_tok: Tokenizer) -> None:
    """On real weights the right answer would lose to the answer to another question, or in the
    other place the verdict would not turn round."""
    wrong = [KNOWN[(i + 3) % len(KNOWN)][1] for i in range(5)]
    asked = [Comparison(q, "", a, w) for (q, a), w in zip(KNOWN[:4], wrong)]
    asked.append(Comparison(KNOWN[4][0], "", wrong[4], KNOWN[4][1]))
    results, _ = LikelihoodJudge(smollm, smollm_tok).compare(asked)
    winners = [winner for winner, _ in results[:-1]]
    assert winners.count("expert") >= 3 and "base" not in winners
    assert results[-1][0] == "base" and all(e < b for e, b in results[-1][1])
    [(_, said)], cost = LetterJudge(smollm, smollm_tok).compare(asked[:1])
    assert set(said) <= set("ABT")  # a real model's letters can be read
    assert cost["tokens_read"] < 1.6 * len(LetterJudge(smollm, smollm_tok).prompt(
        asked[0].query, asked[0].expert, asked[0].base))  # what both orders share is read once
