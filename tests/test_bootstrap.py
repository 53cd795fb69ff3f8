"""bootstrap.py, stages 1-3: which queries are kept, what answers and verdicts are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Sequence

import pytest
import torch
from tiny import one_thread
from tiny_run import pair, rows_of
from torch import Tensor

import bootstrap
from bootstrap import (FEWEST_OPENINGS, KINDS, MOST_OPENINGS, OPENINGS, RIVALS, Candidate, Query,
                       assign_openings, check_order, choose_rivals, clean_query, keep_queries,
                       opening, won_pairs, write_answers, write_queries, write_verdicts)
from engine import Sampling, derive_seed
from generate import generate
from judge import Comparison, LikelihoodJudge
from model import Transformer
from support.hub import InputError
from support.personas import Persona, load_personas
from support.runs import RunFolder
from support.words import is_request
from tokenizer import Tokenizer

PERSONAS = [Persona("chemist", "You are a careful chemist who explains each reaction."),
            Persona("pirate", "Answer as a pirate: short, loud and rude.")]
TEXTS = {p.name: p.text for p in PERSONAS}
QUESTIONS = ["What is the capital of France?", "How do I boil an egg?", "Why is the sky blue?",
             "Who wrote Romeo and Juliet?", "What does a heart do?", "What causes ocean tides?"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run folder."""
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


def candidate(persona: str, text: str, complete: bool = True, **fields: object) -> Candidate:
    """A candidate that suits its own persona, unless `fields` says otherwise."""
    return Candidate(**{"persona": persona, "round": 0, "kind": "plain", "text": text,
                        "complete": complete, "suits": persona} | fields)


# --------------------------------------------------------------------------------------------------
# Stage 1, the pure parts


@pytest.mark.parametrize(("text", "expected"), [
    ("How do tides work here?", "How do tides work here?"),
    ("  \n\n How do tides work here? \nSecond line.", "How do tides work here?"),
    ("1. How do tides work here?", "How do tides work here?"),
    ("12) How do tides work here?", "How do tides work here?"),
    ("- How do tides work here?", "How do tides work here?"),
    ('3. "How do tides work here?"', "How do tides work here?"),
    ('How do "spring tides" work here?', 'How do "spring tides" work here?'),
    ("2024 was a year of what?", "2024 was a year of what?"),  # a number that is no numbering
    ("3.5 metres is how many feet?", "3.5 metres is how many feet?"),
    ("Wie funktioniert Ebbe und Flut?", "Wie funktioniert Ebbe und Flut?"),
    ("\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f",
     "\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f"),
    ("How do tides work?", None),  # four words
    ("", None), (" \n \t\n", None), ("1.", None), ('"', None),
    ("Here are some questions for you:", None),  # announces what the first line lacks
    ("When you come to the sea,", None),
    ("Rest of the world celebrated the anniversary.", None),  # no request
    (" ".join(["why?"] * 60), " ".join(["why?"] * 60)),
    (" ".join(["why?"] * 61), None),
    # Five words of the persona in a row are an echo, whatever the case; four are not.
    ("Are you A CAREFUL, chemist who explains fire?", None),
    ("Are you a careful chemist and teacher?", "Are you a careful chemist and teacher?")])
def test_clean_query(text: str, expected: str | None) -> None:
    """Numbering, quotes or a second line would be part of a query; or one would be kept that is too
    short, too long, cut off, no request or an echo of the persona."""
    assert clean_query(text, PERSONAS[0].text) == expected


@pytest.mark.parametrize(("line", "expected"), [
    ("How do tides work in a bay", False), ("How do tides work in a bay?", True),
    ("Wie funktioniert das?", True), ("\u6f6e\u6c50\u662f\u4ec0\u4e48\uff1f", True),
    ("Write a poem about rain", True), ("I need a plan for my day", True),
    ("The user asks: how do tides work?", False), ("A user needs help with this.", False),
    ("True or false: tides are caused by wind.", True), ("", False), ("...", False)])
def test_is_request(line: str, expected: bool) -> None:
    """A question, an imperative or a wish would not be a request, or a statement would be."""
    assert is_request(line) is expected


def texts(queries: Sequence[Query]) -> list[tuple[str, int, str]]:
    """(persona, index, text) of each."""
    return [(q.persona, q.index, q.query) for q in queries]


def test_keep_queries_order_and_duplicates() -> None:
    """A near-duplicate would be kept, within a persona or across; or not the first `wanted` of each
    in the order of personas and candidates, with dense indices."""
    a, b = Persona("a", "x"), Persona("b", "y")
    found = [candidate("b", "How do tides work in a bay?"),
             candidate("a", "How do tides work in a harbour?"),
             candidate("a", "How do tides work in a harbour!"),
             candidate("b", "Why is bread left to rise?"),
             candidate("a", "What makes an engine run smoothly?"),
             candidate("b", "what makes an engine run smoothly, then?"),
             candidate("a", "When was the telephone first sold?"),
             candidate("b", "Which birds can sing at night?")]
    # "bay" differs from "harbour" in one word of eight: 6 / 8 is above 0.7, so b's is a duplicate
    assert texts(keep_queries(found, [a, b], 2)) == [
        ("a", 0, "How do tides work in a harbour?"), ("a", 1, "What makes an engine run smoothly?"),
        ("b", 0, "Why is bread left to rise?"), ("b", 1, "Which birds can sing at night?")]
    reverse = texts(keep_queries(found, [b, a], 2))
    assert reverse[0] == ("b", 0, "How do tides work in a bay?")  # now b came first
    assert ("a", 0, "How do tides work in a harbour?") not in reverse
    more = [*found, candidate("a", "Something else that nobody ever asked?", round=1)]
    for wanted in (1, 2, 3):  # a later round only appends
        one, two = (keep_queries(some, [a], wanted) for some in (found, more))
        assert two[:len(one)] == one


def test_keep_queries_drops_what_is_not_a_query() -> None:
    """An unfinished or malformed candidate would be kept, or one that another persona makes
    likelier."""
    a, b = PERSONAS
    found = [candidate(a.name, "How do tides work in a bay?", complete=False),
             candidate(a.name, "Too short."),
             candidate(a.name, "Which acids dissolve a gold ring?", suits=b.name),
             candidate(a.name, "You are a careful chemist who explains things?"),
             candidate(a.name, "Why does iron rust in water?")]
    assert texts(keep_queries(found, [a, b], 3)) == [(a.name, 0, "Why does iron rust in water?")]


def test_openings_of_a_persona_take_turns() -> None:
    """A kind would come up more often than its share, or an own opening never be used."""
    found = [opening(i, ["a", "b", "c"]) for i in range(48)]
    assert {k: [kind for kind, _ in found].count(k) for k in set(KINDS)} == {
        "own": 24, "plain": 12, "long": 6, "contrast": 6}
    assert {words for kind, words in found if kind == "own"} == {"a", "b", "c"}
    assert {words for kind, words in found if kind == "plain"} == {""}
    assert len({words for kind, words in found if kind == "contrast"}) == 5


def likelihoods(**lifted: Sequence[int]) -> Tensor:
    """[K + 1, 6] log-probabilities: every opening has a popularity of its own, and each row (the
    last is the conversation without a persona) has some that it lifts by 2."""
    popular = torch.tensor([-1.0, -9.0, -4.0, -2.0, -7.0, -3.0])
    rows = [popular.clone() for _ in range(len(lifted) + 1)]
    for row, openings in zip(rows, lifted.values()):
        row[list(openings)] += 2.0
    return torch.stack(rows)


def test_openings_go_to_the_persona_that_lifts_them() -> None:
    """An opening would go to a persona for being popular everywhere, not for what the persona adds;
    or one would have fewer than its two best, or more than eight."""
    found = likelihoods(a=[1, 4], b=[2, 3], c=[])
    assert sorted(assign_openings(found)[0]) == [1, 4]
    assert sorted(assign_openings(found)[1]) == [2, 3]
    found[0] += 5.0  # a persona under which all openings are likelier gets none for that
    assert sorted(assign_openings(found)[1]) == [2, 3]
    assert all(len(chosen) >= FEWEST_OPENINGS for chosen in assign_openings(found))
    lifted = torch.tensor([[7.0, 1, 2, 5, 1], [8, 3, 2, 6, 2], [0] * 5])
    assert assign_openings(lifted)[0] == [2, 0]  # the one that it lifts most, then its best
    alone = torch.stack([torch.linspace(0, 1, 60), torch.zeros(60)])
    assert assign_openings(alone) == [list(range(59, 59 - MOST_OPENINGS, -1))]


def test_rivals_are_those_most_like_a_persona() -> None:
    """Rivals would not be the three after which a persona's own openings are likeliest, best first;
    or it would be its own, or the conversation without a persona one."""
    found = torch.full((9, 4), -5.0)
    found[:8, 0] = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    found[8] = 0.0  # the conversation without a persona, likeliest of all
    chosen = [[0]] + [[1, 2]] * 7
    rivals = choose_rivals(found, chosen)
    assert rivals[0] == [1, 2, 3] and len(rivals) == 8
    assert all(len(r) == len(set(r)) == RIVALS and k not in r for k, r in enumerate(rivals))
    found[7, 0] = -0.5
    assert choose_rivals(found, chosen)[0][0] == 7
    assert choose_rivals(found[[0, 1, 8]], [[0], [1]]) == [[1], [0]]


# --------------------------------------------------------------------------------------------------
# Personas


def test_load_personas(tmp_path: Path) -> None:
    """A persona would keep a BOM or blank lines, stand in another order, or be a file that is no
    *.txt or below the folder."""
    (tmp_path / "b.txt").write_text("\n Be brief. \n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\ufeffSei höflich.".encode())
    (tmp_path / "notes.md").write_text("not a persona")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "c.txt").write_text("Below the folder.")
    assert load_personas(tmp_path) == [Persona("a", "Sei höflich."), Persona("b", "Be brief.")]


def test_the_twelve_personas() -> None:
    """One of the paper's twelve would be gone from personas/, or be much shorter or longer."""
    found = load_personas(Path(bootstrap.__file__).parent / "personas")
    assert {p.name for p in found} == {
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
        "critic", "safety_monitor", "helpful", "compliant"}
    assert all(90 <= len(p.text.split()) <= 220 for p in found)


# --------------------------------------------------------------------------------------------------
# The stages on the tiny model


def stages(folder: Path, net: Transformer, tok: Tokenizer, seed: int = 0,
           wanted: int = 3) -> dict[str, bytes]:
    """Run or continue stages 1-3 in a folder; the stage files."""
    run = RunFolder(folder)
    try:
        with one_thread():
            queries = write_queries(run, net, tok, PERSONAS, wanted, seed)
            pairs = write_answers(run, net, tok, PERSONAS, queries, 10, seed)
            write_verdicts(run, LikelihoodJudge(net, tok), PERSONAS, pairs)
    finally:
        run.close()
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.jsonl"))
            if p.name != "metrics.jsonl"}


@pytest.fixture(scope="module")
def written(net: Transformer, tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of stages 1-3; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    stages(folder, net, tok)
    return folder


def test_a_row_is_a_function_of_the_seed_and_its_name(written: Path, tmp_path: Path,
                                                      net: Transformer, tok: Tokenizer) -> None:
    """Another seed would draw the same rows; or a persona's first candidates, and its first query,
    would change when more queries are wanted."""
    first = {p.name: p.read_bytes() for p in written.glob("*.jsonl") if p.name != "metrics.jsonl"}
    other = stages(tmp_path / "other", net, tok, seed=1)
    assert first.keys() == other.keys() >= {"queries.jsonl", "answers.jsonl", "verdicts.jsonl"}
    assert not any(first[name] == other[name] for name in first)
    more = stages(tmp_path / "more", net, tok, wanted=4)
    for name, rows in (("candidates.jsonl", 9), ("queries.jsonl", 1)):
        assert first[name].split(b"\n")[:rows] == more[name].split(b"\n")[:rows]


def test_rows_are_those_of_the_interface(written: Path, tok: Tokenizer) -> None:
    """A field would have another name or place, ids would not decode to the texts, or stop would
    not say why."""
    queries, answers, verdicts = (rows_of(written, f"{name}.jsonl")
                                  for name in ("queries", "answers", "verdicts"))
    assert [list(r) for r in queries] == [["persona", "index", "query"]] * 6
    assert [(r["persona"], r["index"]) for r in queries] == [
        (p.name, i) for p in PERSONAS for i in range(3)]
    for row, query in zip(answers, queries, strict=True):
        assert list(row) == ["persona", "index", "query", "base", "expert", "base_ids",
                             "expert_ids", "base_stop", "expert_stop"]
        assert {k: row[k] for k in query} == query
        for side in ("base", "expert"):
            ids, stop = row[f"{side}_ids"], row[f"{side}_stop"]
            assert stop == ("eos" if ids[-1] == 2 else "length")
            assert len(ids) == 10 or (stop == "eos" and 1 <= len(ids) < 10)
            assert 2 not in ids[:-1]
            assert row[side] == tok.decode(ids[:-1] if stop == "eos" else ids)
    for row, query in zip(verdicts, queries, strict=True):
        assert list(row) == ["persona", "index", "winner", "target", "judge", "evidence"]
        assert (row["persona"], row["index"]) == (query["persona"], query["index"])
        assert row["target"] == int(row["winner"] == "expert") and row["judge"] == "likelihood"
        assert row["winner"] in ("expert", "base", "tie", "split", "unparsed")
    assert any(r["base_ids"] != r["expert_ids"] for r in answers)


def test_a_candidate_is_scored_under_its_persona_and_its_rivals_only(
        run: RunFolder, net: Transformer, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring under all personas would make stage 1's cost grow with their square: with nine of
    them each is read under its own, then under its rivals until one comes close."""
    nine = [Persona(f"p{i}", f"You are number {i} of nine, and you know about {word}.")
            for i, word in enumerate("tides bread iron birds rain wood stars fire salt".split())]
    asked: list[tuple[str, str]] = []
    real = bootstrap.QueryWriter.score

    def counted(writer: bootstrap.QueryWriter, some: Sequence[tuple[str, str]]) -> tuple:
        asked.extend(some)
        return real(writer, some)

    monkeypatch.setattr(bootstrap.QueryWriter, "score", counted)
    with one_thread():
        writer = bootstrap.QueryWriter(run, net, tok, nine)
        rows, cost = writer.write([bootstrap.Draft(p.name, 0, i, derive_seed(p.name, i))
                                   for p in nine for i in range(9)])
    cleaned = [r for r in rows if r.complete and clean_query(r.text, writer.texts[r.persona])]
    assert len(cleaned) > 3
    for row in cleaned:
        text = clean_query(row.text)
        own, *rivals = [persona for persona, query in asked if query == text]
        assert own == row.persona and rivals == writer.rivals[own][:len(rivals)]
        scores, _ = real(writer, [(persona, text) for persona in (own, *rivals)])
        ahead = [rival for rival, score in zip(rivals, scores[1:])
                 if scores[0] - score < bootstrap.LEAD]
        if row.suits == own:
            assert len(rivals) == RIVALS and not ahead
        else:
            assert rivals[-1:] == ahead == [row.suits]  # the last that it was scored under
    assert {r.suits == r.persona for r in cleaned} == {True, False}
    assert all(r.suits is None for r in rows if r not in cleaned)
    assert 0 < cost["scoring_flops"] < cost["flops"]
    opened = run.latest()["openings"]  # the openings are read once, under every persona
    assert opened["prompts"] == 10 * len(OPENINGS) and opened["scoring_flops"] == opened["flops"]


def test_queries_that_are_there_are_used_as_they_are(run: RunFolder, net: Transformer,
                                                     tok: Tokenizer) -> None:
    """Somebody's own queries.jsonl would be written over or added to; or a row of no persona, one
    that is there twice or an empty one would not be named by its line."""
    mine = [Query("pirate", 4, "Where is the gold?"), Query("chemist", 0, "What is rust?")]
    run.write("queries.jsonl", mine)
    assert write_queries(run, net, tok, PERSONAS, 5, 0) == mine
    assert not (run.path / "candidates.jsonl").exists() and run.metrics() == []
    for wrong in (Query("nobody", 0, "q"), Query("pirate", 4, "again"), Query("pirate", 5, " \n")):
        run.write("queries.jsonl", [*mine, wrong])
        with pytest.raises(InputError, match=r"queries\.jsonl, line 3"):
            write_queries(run, net, tok, PERSONAS, 5, 0)


# --------------------------------------------------------------------------------------------------
# Stages 2 and 3


def test_answers_come_from_the_right_prompts(run: RunFolder, net: Transformer, tok: Tokenizer,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """y_0 would not be P(.|x)'s, or y_c not P(.|persona, x)'s: at temperature 0 stage 2 gives what
    `generate` gives for the two conversations, shared prefixes or not."""
    monkeypatch.setattr(bootstrap, "ANSWER_TEMPERATURE", 0.0)
    queries = [Query(p.name, i, q) for p in PERSONAS for i, q in enumerate(QUESTIONS[:3])]
    pairs = write_answers(run, net, tok, PERSONAS, queries, 12, 0)
    for side in ("base", "expert"):
        system = {n: [{"role": "system", "content": t}] if side == "expert" else []
                  for n, t in TEXTS.items()}
        expected = generate(net, tok, [[*system[q.persona], {"role": "user", "content": q.query}]
                                       for q in queries], Sampling(12, 0.0))
        assert [getattr(p, f"{side}_ids") for p in pairs] == [c.ids for c in expected]
    assert all(p.base_ids != p.expert_ids for p in pairs)


class ByLength:
    """The longer answer wins, and the evidence is all that the judge was given."""

    name = "length"

    def compare(self, asked: Sequence[Comparison]) -> tuple[list, dict]:
        """The winners."""
        return [("expert" if len(c.expert) > len(c.base) else "base",
                 [c.query, c.context, c.expert, c.base, c.ended]) for c in asked], {
                     "prompts": len(asked)}


def test_verdicts_are_about_the_right_answers(run: RunFolder) -> None:
    """A verdict would be about another query, persona or answer, or not know which was cut off; or
    t(x), and the distill set, would not be where the expert won."""
    pairs = [pair(i, base="bb", expert="e" * (1 + 2 * (i % 3)), query=f"q{i}", ended=i % 2 > 0,
                  persona=("pirate", "chemist")[i // 20]) for i in range(40)]
    rows = write_verdicts(run, ByLength(), PERSONAS, pairs)
    for p, row in zip(pairs, rows, strict=True):
        assert (row.persona, row.index, row.judge) == (p.persona, p.index, "length")
        assert row.evidence == [p.query, TEXTS[p.persona], p.expert, "bb", p.base_stop == "eos"]
        assert row.target == int(row.winner == "expert") == int(len(p.expert) > 2)
    assert [m["prompts"] for m in run.metrics()] == [32, 8]
    assert won_pairs(pairs, rows) == [p for p in pairs if len(p.expert) > 2]


def test_rows_that_were_moved_or_removed_are_named(run: RunFolder, net: Transformer,
                                                   tok: Tokenizer) -> None:
    """A row taken out of answers.jsonl would shift all later verdicts to other queries: the line is
    named before anything is sampled. Edited texts are used."""
    queries = [Query("pirate", i, f"q{i}") for i in range(3)]
    pairs = [pair(i, persona="pirate", query=f"edited {i}") for i in range(3)]
    run.write("answers.jsonl", pairs)
    assert write_answers(run, net, tok, PERSONAS, queries, 4, 0) == pairs
    for wrong, line in ((pairs[1:], 1), ([pairs[0], pairs[2], pairs[1]], 2),
                        ([*pairs, pair(3, persona="pirate")], 4)):
        run.write("answers.jsonl", wrong)
        before = (run.path / "answers.jsonl").read_bytes()
        with pytest.raises(InputError, match=rf"answers\.jsonl, line {line}: "):
            write_answers(run, net, tok, PERSONAS, queries, 4, 0)
        assert (run.path / "answers.jsonl").read_bytes() == before
    verdicts = write_verdicts(run, ByLength(), PERSONAS, pairs)
    check_order(verdicts, pairs, run.path)
    check_order(verdicts[:2], pairs, run.path)  # an interrupted stage
    with pytest.raises(InputError, match="line 1"):
        check_order(verdicts[1:], pairs, run.path)
