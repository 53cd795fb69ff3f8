"""bootstrap.py: cleaning queries, verdicts, the two judges, and the commit protocol of a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Callable, Iterator, Sequence

import pytest
import torch
from tiny import one_thread, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

import bootstrap
from bootstrap import (
    DEGENERATE,
    ENDING,
    ENDING_FLOOR,
    FLUENCY,
    JUDGE_PROMPT,
    KINDS,
    MARGIN,
    TEST_PAIRS,
    Candidate,
    Comparison,
    LetterJudge,
    LikelihoodJudge,
    Pair,
    Persona,
    Query,
    RunFolder,
    Verdict,
    answer_room,
    bill,
    choose_judge,
    clean_query,
    common_prefix,
    degenerate,
    examine_judge,
    hidden_states,
    interval,
    is_request,
    keep_queries,
    known_truth,
    letter_winner,
    load_personas,
    majority,
    opening,
    score_winner,
    sentences,
    shuffled,
    split_chunks,
    token_log_probabilities,
    total,
    write_answers,
    write_queries,
    write_verdicts,
)
from generate import Sampling, derive_seed, generate
from support.hub import InputError
from model import Transformer, load
from tokenizer import Tokenizer

PERSONAS = [Persona("chemist", "You are a careful chemist who explains each reaction."),
            Persona("pirate", "Answer as a pirate: short, loud and rude.")]
# Questions and right answers, hand-written; the wrong answer is that of another question.
KNOWN = [
    ("What is the capital of France?", "The capital of France is Paris, a city on the Seine."),
    ("How do I boil an egg?",
     "Put the egg in boiling water for eight minutes, then cool it and peel it."),
    ("Why is the sky blue?", "Air scatters blue sunlight more than red, so the sky looks blue."),
    ("How do plants make food?",
     "Plants use sunlight, water and carbon dioxide to make sugar by photosynthesis."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What does a heart do?", "The heart pumps blood through the body."),
    ("How can I sleep better at night?",
     "Go to bed at the same hour, avoid coffee late, and keep the bedroom dark and cool."),
    ("What is seven times eight?", "Seven times eight is fifty-six."),
    ("How do I train a new puppy?",
     "Reward your puppy with treats when it obeys, and keep the training short and regular."),
    ("What causes ocean tides?",
     "Tides are caused by the gravity of the moon and the sun pulling on the oceans."),
    ("How do I write a good resume?",
     "Keep your resume to one page, list your work experience, and check the spelling."),
    ("What is a Python list?",
     "A list in Python is an ordered, mutable collection written with square brackets.")]


@pytest.fixture(scope="module")
def oracle(smollm_folder: Path) -> PreTrainedModel:
    """SmolLM2 as transformers reads it, fp32."""
    return AutoModelForCausalLM.from_pretrained(smollm_folder, dtype=torch.float32).eval()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run folder."""
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


def pair(index: int, base: str = "b", expert: str = "e", persona: str = "p",
         query: str = "q") -> Pair:
    """A row of answers.jsonl."""
    return Pair(persona, index, query, base, expert, [5, 2], [6, 2], "eos", "eos")


def candidate(persona: str, text: str, complete: bool = True, **fields: object) -> Candidate:
    """A candidate that is likeliest under its own persona, unless `fields` says otherwise."""
    return Candidate(**{"persona": persona, "round": 0, "kind": "plain", "text": text,
                        "complete": complete, "likeliest": persona} | fields)


# --------------------------------------------------------------------------------------------------
# Stage 1, the pure parts


@pytest.mark.parametrize(("text", "expected"), [
    ("How do tides work here?", "How do tides work here?"),
    ("  \n\n How do tides work here? \nSecond line.", "How do tides work here?"),
    ("1. How do tides work here?", "How do tides work here?"),
    ("12) How do tides work here?", "How do tides work here?"),
    ("- How do tides work here?", "How do tides work here?"),
    ("* How do tides work here?", "How do tides work here?"),
    ('"How do tides work here?"', "How do tides work here?"),
    ('3. "How do tides work here?"', "How do tides work here?"),
    ('How do "spring tides" work here?', 'How do "spring tides" work here?'),
    ("2024 was a year of what?", "2024 was a year of what?"),  # a number that is no numbering
    ("3.5 metres is how many feet?", "3.5 metres is how many feet?"),
    ("Wie funktioniert Ebbe und Flut?", "Wie funktioniert Ebbe und Flut?"),
    ("\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f",
     "\u4e3a\u4ec0\u4e48\u5929\u7a7a\u5728\u767d\u5929\u662f\u84dd\u8272\u7684\uff1f"),
    ("How do tides work?", None),  # four words
    ("", None),
    (" \n \t\n", None),
    ("1.", None),
    ('"', None),
    ("Here are some questions for you:", None),  # announces what the first line lacks
    ("When you come to the sea,", None),
    (" ".join(["why?"] * 60), " ".join(["why?"] * 60)),
    (" ".join(["why?"] * 61), None),
])
def test_clean_query(text: str, expected: str | None) -> None:
    """First line, numbering and quotes stripped, too short, too long and cut-off ones dropped."""
    assert clean_query(text) == expected


def test_clean_query_drops_echoes_of_the_persona() -> None:
    """Five words of the persona in a row are an echo, whatever the case; four are not."""
    persona = "You are a careful chemist who explains each reaction."
    assert clean_query("Are you A CAREFUL, chemist who explains fire?", persona) is None
    near = "Are you a careful chemist and teacher?"
    assert clean_query(near, persona) == near


def texts(queries: Sequence[Query]) -> list[tuple[str, int, str]]:
    """(persona, index, text) of each."""
    return [(q.persona, q.index, q.query) for q in queries]


def test_keep_queries_order_and_duplicates() -> None:
    """Personas in their order, candidates in theirs, the first `wanted` of each, near-duplicates
    dropped within a persona and across personas, indices dense."""
    a, b = Persona("a", "x"), Persona("b", "y")
    found = [candidate("b", "How do tides work in a bay?"),
             candidate("a", "How do tides work in a harbour?"),
             candidate("a", "How do tides work in a harbour!"),
             candidate("b", "Why is bread left to rise?"),
             candidate("a", "What makes an engine run smoothly?"),
             candidate("b", "what makes an engine run smoothly, then?"),
             candidate("a", "When was the telephone first sold?"),
             candidate("b", "Which birds can sing at night?")]
    expected = [("a", 0, "How do tides work in a harbour?"),
                ("a", 1, "What makes an engine run smoothly?"),
                ("b", 0, "Why is bread left to rise?"),
                ("b", 1, "Which birds can sing at night?")]
    # "bay" differs from "harbour" in one word of eight: 6 / 8 is above 0.7, so b's is a duplicate
    assert texts(keep_queries(found, [a, b], 2)) == expected
    assert texts(keep_queries(found, [a, b], 2)) == expected
    reverse = texts(keep_queries(found, [b, a], 2))
    assert reverse[0] == ("b", 0, "How do tides work in a bay?")  # now b came first
    assert ("a", 0, "How do tides work in a harbour?") not in reverse


def test_keep_queries_drops_what_is_not_a_query() -> None:
    """Unfinished candidates, malformed ones and those another persona makes likelier are out."""
    a, b = PERSONAS
    found = [candidate(a.name, "How do tides work in a bay?", complete=False),
             candidate(a.name, "Too short."),
             candidate(a.name, "Which acids dissolve a gold ring?", likeliest=b.name),
             candidate(a.name, "You are a careful chemist who explains things?"),
             candidate(a.name, "Why does iron rust in water?")]
    assert texts(keep_queries(found, [a, b], 3)) == [(a.name, 0, "Why does iron rust in water?")]


def test_keep_queries_with_more_candidates_only_appends() -> None:
    """A later round never changes what an earlier one kept of a persona that had its share."""
    a = Persona("a", "x")
    first = [candidate("a", text) for text in (
        "Which birds can sing at night?", "Why is bread left to rise?",
        "When was the telephone first sold?")]
    more = [*first, candidate("a", "Something else that nobody ever asked?", round=1)]
    assert keep_queries(more, [a], 3) == keep_queries(first, [a], 3)
    assert keep_queries(more, [a], 4)[:3] == keep_queries(first, [a], 3)


# --------------------------------------------------------------------------------------------------
# Verdicts, the pure parts


def test_letter_winner() -> None:
    """The expert wins only if it wins BOTH orders (it is A first, then B); all else is no win."""
    letters = "ABT?"
    table = {(f, s): letter_winner(f, s) for f in letters for s in letters}
    assert [k for k, w in table.items() if w == "expert"] == [("A", "B")]
    assert [k for k, w in table.items() if w == "base"] == [("B", "A")]
    assert [k for k, w in table.items() if w == "tie"] == [("T", "T")]
    assert {k for k, w in table.items() if w == "unparsed"} == {k for k in table if "?" in k}
    assert table["A", "A"] == table["B", "B"] == table["A", "T"] == table["T", "B"] == "split"


@pytest.mark.parametrize(("pairs", "winner"), [
    ([[-1.0, -2.0], [-1.0, -2.0]], "expert"),
    ([[-2.0, -1.0], [-2.0, -1.0]], "base"),
    ([[-1.0, -2.0], [-2.0, -1.0]], "split"),
    ([[-1.0, -2.0], [-1.0, -1.0]], "split"),  # wins one wording, ties the other
    ([[-1.0, -1.0], [-1.0, -1.0]], "tie"),
    ([[-1.0, -1.0 - MARGIN / 2], [-1.0, -1.0 - MARGIN / 2]], "tie"),  # ahead, but within margin
    ([[-1.0, -1.0 - 2 * MARGIN], [-1.0, -1.0 - 2 * MARGIN]], "expert"),
    ([[-1.0, -1.0 - 2 * MARGIN], [-1.0, -1.0 - MARGIN / 2]], "split"),
])
def test_score_winner(pairs: list[list[float]], winner: str) -> None:
    """Both wordings must prefer the same answer by the margin."""
    assert score_winner(pairs) == winner


@pytest.mark.parametrize(("a", "b", "n"), [
    ([1, 2, 3, 4], [1, 2, 9, 4], 2), ([1, 2], [1, 2], 1), ([1, 2], [1, 2, 3], 1),
    ([1, 2, 3], [1], 1), ([1], [1], 0), ([5, 1], [6, 1], 0), ([1, 2, 3], [], 0)])
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    """Length of the shared start, at least one id short of a's end (something must be read)."""
    assert common_prefix(a, b) == n


def test_majority() -> None:
    """More than half of the votes decide; one vote is its own majority."""
    for winner in ("expert", "base", "tie", "split", "unparsed"):
        assert majority([winner]) == winner
    assert majority(["expert", "base", "expert"]) == "expert"
    assert majority(["expert", "base"]) == majority(["expert", "tie", "base"]) == "split"
    assert majority(["tie", "tie", "tie", "expert"]) == "tie"


@pytest.mark.parametrize(("answer", "expected"), [
    ("", True), (" \n", True), ("!?", True), ("You asked: How do tides work in a bay?", True),
    ("How do tides work in a bay?", True), ("how do tides work in a bay", True),
    ("The moon pulls.", False), ("Tides work in a bay as they do at sea.", False),
    ("How do tides work in a bay? The moon pulls the water up twice a day.", False),
    ("the sea " * 40, True), (" ".join(map(str, range(60))), False)])
def test_degenerate(answer: str, expected: bool) -> None:
    """Nothing, the question again, or a loop is no answer; repeating the question first is fine."""
    assert degenerate("How do tides work in a bay?", answer) is expected


def test_degenerate_answer_loses_to_any_other() -> None:
    """However likely a text is, it loses if it is no answer."""
    query = "How do tides work in a bay?"
    asked = Comparison(query, "", "The moon.", query)
    poor, rich = (-9.0, -9.0, -9.0, -9.0), (-0.1, -0.1, -0.1, -0.1)
    scores = [LikelihoodJudge.scores(asked, *side) for side in ((asked.expert, poor),
                                                                (asked.base, rich))]
    assert score_winner(list(zip(*scores))) == "expert"


def test_interval() -> None:
    """Wilson's interval, against figures worked out by hand (z = 1.96)."""
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert interval(0, 0) == (0, 1)


def test_shuffled_and_sentences() -> None:
    """The same sentences, never in the same order."""
    text = "One is here. Two is there! Is three?\n\nFour."
    assert sentences(text) == ["One is here.", "Two is there!", "Is three?", "Four."]
    for seed in range(40):
        found = sentences(shuffled(text, seed))
        assert sorted(found) == sorted(sentences(text)) and found != sentences(text)


@pytest.mark.parametrize(("line", "expected"), [
    ("How do tides work in a bay", False), ("How do tides work in a bay?", True),
    ("Wie funktioniert das?", True), ("\u6f6e\u6c50\u662f\u4ec0\u4e48\uff1f", True),
    ("Write a poem about rain", True), ("I need a plan for my day", True),
    ("Rest of the world celebrated the anniversary.", False),
    ("The user asks: how do tides work?", False), ("A user needs help with this.", False),
    ("True or false: tides are caused by wind.", True), ("", False), ("...", False)])
def test_is_request(line: str, expected: bool) -> None:
    """A question, an imperative or a wish; a statement, or a report about a user, is none."""
    assert is_request(line) is expected


def test_openings_of_a_persona_take_turns() -> None:
    """Every kind comes up in its share, and all of a persona's own openings are used."""
    found = [opening(i, ["a", "b", "c"]) for i in range(48)]
    assert {k: [kind for kind, _ in found].count(k) for k in set(KINDS)} == {
        "own": 24, "plain": 12, "long": 6, "contrast": 6}
    assert {words for kind, words in found if kind == "own"} == {"a", "b", "c"}
    assert {words for kind, words in found if kind == "plain"} == {""}
    assert len({words for kind, words in found if kind == "contrast"}) == 5


# --------------------------------------------------------------------------------------------------
# Personas


def test_load_personas(tmp_path: Path) -> None:
    """Every *.txt in name order, stripped, BOM dropped; other files and subfolders are ignored."""
    (tmp_path / "b.txt").write_text("\n Be brief. \n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\ufeffSei höflich.".encode())
    (tmp_path / "notes.md").write_text("not a persona")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "c.txt").write_text("Below the folder.")
    assert load_personas(tmp_path) == [Persona("a", "Sei höflich."), Persona("b", "Be brief.")]


@pytest.mark.parametrize("damage", ["missing", "none", "empty", "blank", "latin1"])
def test_load_personas_errors(tmp_path: Path, damage: str) -> None:
    """A missing folder, no persona, an empty one, one that is not UTF-8: InputError naming it."""
    folder = tmp_path / "personas"
    if damage != "missing":
        folder.mkdir()
        (folder / "below").mkdir()
        (folder / "below" / "x.txt").write_text("not read")
    named = "personas"
    content = {"empty": b"", "blank": b" \n\t\n", "latin1": "höflich".encode("latin-1")}
    if damage in content:
        (folder / "good.txt").write_text("Be brief.")
        (folder / "wrong.txt").write_bytes(content[damage])
        named = "wrong.txt"
    with pytest.raises(InputError, match=named):
        load_personas(folder)


def test_the_twelve_personas() -> None:
    """personas/ holds the twelve of METHOD.md, each about 150 tokens (110 to 220 words or so)."""
    found = load_personas(Path(bootstrap.__file__).parent / "personas")
    assert {p.name for p in found} == {
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
        "critic", "safety_monitor", "helpful", "compliant"}
    assert all(90 <= len(p.text.split()) <= 220 for p in found)
    assert len({p.text for p in found}) == 12


# --------------------------------------------------------------------------------------------------
# The run folder


def test_second_process_is_refused(tmp_path: Path) -> None:
    """The folder is locked while a run is open, and free again after it."""
    first = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="another process"):
        RunFolder(tmp_path / "run")
    first.close()
    RunFolder(tmp_path / "run").close()


NASTY = ["plain", "line\nfeed\r\nand return", 'quotes " and \\ backslash', "tab\tnull\x00bell\x07",
         "emoji 🙂 and 日本語", "next line \x85 here", "line separator \u2028 here",
         "paragraph separator \u2029 here", "vertical \x0b form \x0c file \x1c group \x1d"]


def test_rows_survive_whatever_a_model_writes(run: RunFolder) -> None:
    """A row written is the row read, whatever characters the model put in: one row, one line."""
    rows = [Query("p", i, text) for i, text in enumerate(NASTY)]
    run.write("queries.jsonl", rows)
    data = (run.path / "queries.jsonl").read_bytes()
    assert data.count(b"\n") == len(NASTY) and data.endswith(b"\n")
    assert run.read("queries.jsonl", Query) == rows


def test_absent_stage_file_has_no_rows(run: RunFolder) -> None:
    """Nothing written yet: no rows, no metrics."""
    assert run.read("queries.jsonl", Query) == [] and run.metrics() == []


@pytest.mark.parametrize("line", ['{"persona": "p", "ind', '{"persona": "p"}', "[1, 2]", "7",
                                  '{"persona": "p", "index": 1, "query": "q", "extra": 1}'])
def test_broken_line_is_named(run: RunFolder, line: str) -> None:
    """A row that is no row of its kind is an InputError with file and line number."""
    good = json.dumps({"persona": "p", "index": 0, "query": "q"})
    (run.path / "queries.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"queries\.jsonl, line 2"):
        run.read("queries.jsonl", Query)


@pytest.mark.parametrize("line", ['{"stage": "answers", "st', "[]", '{"loss": 1}', "\udcff"])
def test_broken_metrics_line_is_named(run: RunFolder, line: str) -> None:
    """The same for metrics.jsonl: it is read at every start."""
    good = json.dumps({"stage": "queries", "step": 0})
    (run.path / "metrics.jsonl").write_bytes(
        f"{good}\n{line}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        run.record("answers", 0)


def test_changed_metrics_row_is_named(run: RunFolder) -> None:
    """One digit that somebody changed, a threshold say, is named by its line; rows of earlier
    versions carry no checksum; the times of a row are not in its own."""
    path = run.path / "metrics.jsonl"
    row = {"stage": "gate", "step": 0, "threshold": 0.25, "text": "é \u2028", "seconds": 1.5}
    path.write_text(json.dumps(row) + "\n")
    run.record("lora", 0, loss=1 / 3, seconds=0.1)
    good = path.read_text(encoding="utf-8")
    assert run.metrics()[0] == row and good.count('"sha256"') == 2
    path.write_text(good.replace("0.25", "0.35"), encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: .*SHA-256.*another --out"):
        run.metrics()
    path.write_text(good.replace('"seconds": 1.5', '"seconds": 2.5'), encoding="utf-8")
    assert run.metrics()[0]["seconds"] == 2.5


def square(calls: list[int]) -> Callable[[int, Sequence[int]], tuple[list[Query], dict]]:
    """Work for `RunFolder.chunks` whose rows depend on the whole chunk; notes chunks done."""

    def work(number: int, chunk: Sequence[int]) -> tuple[list[Query], dict]:
        calls.append(number)
        return [Query("p", i, f"{i * i} of {list(chunk)}") for i in chunk], {"rows": len(chunk)}

    return work


def metrics_without_seconds(run: RunFolder) -> list[dict]:
    """Metrics rows without times, memory, and what their chunk's lines are checked by."""
    return [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory", "chunk")}
            for m in run.metrics()]


@pytest.mark.parametrize("kept", range(12))
def test_chunk_protocol(run: RunFolder, kept: int) -> None:
    """A stage file cut after any row is completed to the same bytes, by whole chunks only."""
    todo, calls = split_chunks(range(11), 4), []
    rows = run.chunks("squares", "queries.jsonl", Query, todo, square(calls))
    assert calls == [0, 1, 2] and [r.index for r in rows] == list(range(11))
    path = run.path / "queries.jsonl"
    final, metrics = path.read_bytes(), metrics_without_seconds(run)
    assert metrics == [{"stage": "squares", "step": i, "rows": n} for i, n in enumerate((4, 4, 3))]
    path.write_bytes(b"".join(final.splitlines(keepends=True)[:kept]))
    again: list[int] = []
    assert run.chunks("squares", "queries.jsonl", Query, todo, square(again)) == rows
    assert again == [n for n, done in enumerate((4, 8, 11)) if done > kept]
    assert path.read_bytes() == final and metrics_without_seconds(run) == metrics


def test_leftover_metrics_row_is_dropped(run: RunFolder) -> None:
    """A metrics row whose chunk was never committed is replaced, rows of other stages stay."""
    todo = split_chunks(range(8), 4)
    run.chunks("squares", "queries.jsonl", Query, todo[:1], square([]))
    run.record("other", 5, loss=1.0)
    run.record("squares", 1, rows=-1, seconds=9.9)  # killed between the two replacements
    run.chunks("squares", "queries.jsonl", Query, todo, square([]))
    assert sorted(metrics_without_seconds(run), key=str) == sorted(
        [{"stage": "squares", "step": 0, "rows": 4}, {"stage": "other", "step": 5, "loss": 1.0},
         {"stage": "squares", "step": 1, "rows": 4}], key=str)


def test_work_that_fails_leaves_the_chunks_before(run: RunFolder) -> None:
    """An error in chunk 1 leaves chunk 0 on disk, whole, and nothing of chunk 1."""

    def work(number: int, chunk: Sequence[int]) -> tuple[list[Query], dict]:
        if number == 1:
            raise MemoryError
        return [Query("p", i, "q") for i in chunk], {}

    with pytest.raises(MemoryError):
        run.chunks("squares", "queries.jsonl", Query, split_chunks(range(8), 4), work)
    assert [q.index for q in run.read("queries.jsonl", Query)] == [0, 1, 2, 3]
    assert [m["step"] for m in run.metrics()] == [0]
    assert not list(run.path.glob("*.tmp")) and not list(run.path.glob(".*.tmp"))


def test_forget_drops_stages_and_what_belongs_to_them(run: RunFolder) -> None:
    """The judge's self-test goes with the verdicts, the KL rows with the adapter."""
    for stage in ("queries", "answers", "judge", "verdicts", "gate", "lora", "kl"):
        run.record(stage, 0)
    (run.path / "verdicts.jsonl").write_text("x")
    (run.path / "answers.jsonl").write_text("y")
    run.forget(["verdicts", "lora"], ["verdicts.jsonl", "absent.json"])
    assert [m["stage"] for m in run.metrics()] == ["queries", "answers", "gate"]
    assert not (run.path / "verdicts.jsonl").exists()
    assert (run.path / "answers.jsonl").read_text() == "y"


# --------------------------------------------------------------------------------------------------
# The stages on the tiny model


def stages(folder: Path, net: Transformer, tok: Tokenizer, seed: int, wanted: int = 3,
           keep: Path | None = None) -> dict[str, bytes]:
    """Run stages 1-3 in a new folder (`keep`: with these files already there); the stage files."""
    if keep is not None:
        shutil.copytree(keep, folder)
    run = RunFolder(folder)
    try:
        with one_thread():
            queries = write_queries(run, net, tok, PERSONAS, wanted, seed)
            pairs = write_answers(run, net, tok, PERSONAS, queries, 10, seed)
            write_verdicts(run, LikelihoodJudge(net, tok), PERSONAS, [pairs])
    finally:
        run.close()
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.jsonl"))
            if p.name != "metrics.jsonl"}


def test_stages_are_a_function_of_the_seed(tmp_path: Path, net: Transformer,
                                           tok: Tokenizer) -> None:
    """Same seed, same bytes; another seed, other queries and answers."""
    first = stages(tmp_path / "a", net, tok, 0)
    assert first == stages(tmp_path / "b", net, tok, 0)
    other = stages(tmp_path / "c", net, tok, 1)
    assert first.keys() == other.keys() >= {"queries.jsonl", "answers.jsonl", "verdicts.jsonl"}
    assert not any(first[name] == other[name] for name in first)


def test_rows_are_those_of_the_interface(tmp_path: Path, net: Transformer,
                                         tok: Tokenizer) -> None:
    """Field names and order of INTERFACE.md; ids decode to the texts; stop says why."""
    files = stages(tmp_path / "a", net, tok, 0)
    rows = {name: [json.loads(line) for line in data.decode().split("\n")[:-1]]
            for name, data in files.items()}
    assert [list(r) for r in rows["queries.jsonl"]] == [["persona", "index", "query"]] * 6
    assert [(r["persona"], r["index"]) for r in rows["queries.jsonl"]] == [
        (p.name, i) for p in PERSONAS for i in range(3)]
    for row, query in zip(rows["answers.jsonl"], rows["queries.jsonl"], strict=True):
        assert list(row) == ["persona", "index", "query", "base", "expert", "base_ids",
                             "expert_ids", "base_stop", "expert_stop"]
        assert {k: row[k] for k in query} == query
        for side in ("base", "expert"):
            ids, stop = row[f"{side}_ids"], row[f"{side}_stop"]
            assert stop == ("eos" if ids[-1] == 2 else "length")
            assert len(ids) == 10 or (stop == "eos" and 1 <= len(ids) < 10)
            assert 2 not in ids[:-1]
            assert row[side] == tok.decode(ids[:-1] if stop == "eos" else ids)
    for row, query in zip(rows["verdicts.jsonl"], rows["queries.jsonl"], strict=True):
        assert list(row)[:5] == ["persona", "index", "winner", "target", "judge"]
        assert (row["persona"], row["index"]) == (query["persona"], query["index"])
        assert row["target"] == int(row["winner"] == "expert") and row["judge"] == "likelihood"
        assert row["winner"] in ("expert", "base", "tie", "split", "unparsed")
    assert any(r["base_ids"] != r["expert_ids"] for r in rows["answers.jsonl"])


def test_answers_come_from_the_right_prompts(tmp_path: Path, net: Transformer,
                                             tok: Tokenizer) -> None:
    """y_0 is sampled from P(.|x) and y_k from P(.|persona, x): each answer's tokens are, over all
    rows, likelier under its own prompt than under the other one."""
    files = stages(tmp_path / "a", net, tok, 0, wanted=8)
    texts = {p.name: p.text for p in PERSONAS}
    own = swapped = 0.0
    for line in files["answers.jsonl"].decode().split("\n")[:-1]:
        row = json.loads(line)
        user = {"role": "user", "content": row["query"]}
        bare = tok.render([user])
        persona = tok.render([{"role": "system", "content": texts[row["persona"]]}, user])
        for ids, prompt, other in ((row["base_ids"], bare, persona),
                                   (row["expert_ids"], persona, bare)):
            [mine, foreign], _ = token_log_probabilities(net, [prompt, other], [ids, ids])
            own, swapped = own + float(mine.mean()), swapped + float(foreign.mean())
    assert own > swapped + 32 * 0.5  # 32 answers, half a nat a token each


def test_greedy_answer_equals_generate(run: RunFolder, net: Transformer, tok: Tokenizer,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """With temperature 0 stage 2 gives what `generate` gives for the same conversations: sharing
    the persona's prefix changes nothing."""
    monkeypatch.setattr(bootstrap, "ANSWER_TEMPERATURE", 0.0)
    queries = [Query(p.name, i, q) for p in PERSONAS for i, (q, _) in enumerate(KNOWN[:3])]
    pairs = write_answers(run, net, tok, PERSONAS, queries, 12, 0)
    texts = {p.name: p.text for p in PERSONAS}
    for side in ("base", "expert"):
        system = {n: [{"role": "system", "content": t}] if side == "expert" else []
                  for n, t in texts.items()}
        expected = generate(net, tok, [[*system[q.persona], {"role": "user", "content": q.query}]
                                       for q in queries], Sampling(12, 0.0))
        assert [getattr(p, f"{side}_ids") for p in pairs] == [c.ids for c in expected]


def test_stage_files_cut_anywhere_are_completed(tmp_path: Path, net: Transformer, tok: Tokenizer,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates, answers and verdicts cut to row prefixes that are no chunk boundaries: running
    again gives the uninterrupted run's bytes."""
    monkeypatch.setattr(bootstrap, "CANDIDATE_CHUNK", 10)
    monkeypatch.setattr(bootstrap, "split_chunks",
                        lambda rows, size=4: [rows[i:i + size] for i in range(0, len(rows), size)])
    whole = stages(tmp_path / "whole", net, tok, 0)
    for name, kept in (("candidates.jsonl", 13), ("candidates.jsonl", 0), ("answers.jsonl", 5),
                       ("verdicts.jsonl", 3)):
        cut = tmp_path / f"{name}-{kept}"
        shutil.copytree(tmp_path / "whole", cut)
        later = ["candidates.jsonl", "queries.jsonl", "answers.jsonl", "verdicts.jsonl"]
        for gone in later[later.index(name) + 1:]:
            (cut / gone).unlink()
        lines = (cut / name).read_bytes().splitlines(keepends=True)
        assert len(lines) > kept
        (cut / name).write_bytes(b"".join(lines[:kept]))
        assert stages(tmp_path / f"again-{name}-{kept}", net, tok, 0, keep=cut) == whole, name


def test_stage_1_continues_where_it_was_in_any_round(
        tmp_path: Path, net: Transformer, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Personas that fill up in different rounds: wherever a kill came, also between a metrics row
    and its chunk, the same command ends with the same candidates and queries."""
    def clean(text: str, system: str = "") -> str | None:
        """About one candidate in two, three and ten of the personas."""
        luck = {PERSONAS[0].text: 2, PERSONAS[1].text: 3}.get(system, 10)
        return text if derive_seed(text) % luck == 0 else None

    monkeypatch.setattr(bootstrap, "CANDIDATE_CHUNK", 4)
    monkeypatch.setattr(bootstrap, "clean_query", clean)
    monkeypatch.setattr(bootstrap, "NEAR_DUPLICATE", 2.0)
    monkeypatch.setattr(bootstrap, "keep_queries", lambda candidates, personas, wanted: [
        Query(p.name, i, c.text) for p in personas for i, c in enumerate(
            [c for c in candidates if c.persona == p.name and clean(c.text, p.text)][:wanted])])
    three = [*PERSONAS, Persona("judge", "Be fair and brief.")]

    def run_stage(folder: Path) -> dict[str, bytes]:
        run = RunFolder(folder)
        with one_thread():
            write_queries(run, net, tok, three, 3, 0)
        run.close()
        return {n: (folder / n).read_bytes() for n in ("candidates.jsonl", "queries.jsonl")}

    whole = run_stage(tmp_path / "whole")
    lines = whole["candidates.jsonl"].splitlines(keepends=True)
    rounds = [json.loads(line)["round"] for line in lines]
    owners = [{json.loads(line)["persona"] for line in lines if json.loads(line)["round"] == r}
              for r in sorted(set(rounds))]
    assert len(owners) >= 3 and len(owners[0]) == 3 > len(owners[-1])
    done = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open(encoding="utf-8")]
    done = [m for m in done if m.get("chunk", {}).get("file") == "candidates.jsonl"]
    ends = [0, *(m["chunk"]["rows"][1] for m in done)]
    assert len(ends) > len(owners) and ends[-1] == len(lines)
    for i, kept in enumerate(ends[:-1]):
        cut = tmp_path / str(kept)
        cut.mkdir()
        (cut / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in done[:i + 1]),
                                           encoding="utf-8")
        (cut / "candidates.jsonl").write_bytes(b"".join(lines[:kept]))
        assert run_stage(cut) == whole, kept


def test_a_row_does_not_depend_on_how_many_follow(tmp_path: Path, net: Transformer,
                                                  tok: Tokenizer) -> None:
    """Draws are seeded by a row's own name: a persona's first candidates, and its first query,
    are the same when more queries are wanted."""
    few = stages(tmp_path / "few", net, tok, 0, wanted=2)
    more = stages(tmp_path / "more", net, tok, 0, wanted=4)
    for name, rows in (("candidates.jsonl", 6), ("queries.jsonl", 1)):
        lines = [files[name].split(b"\n")[:rows] for files in (few, more)]
        assert lines[0] == lines[1]
    assert len({derive_seed(0, "a", 1), derive_seed(0, "a1"), derive_seed(0, "a", 2)}) == 3


def test_seed_reaches_the_answers(tmp_path: Path, net: Transformer, tok: Tokenizer) -> None:
    """The same queries under another seed get other answers, of both kinds; the base's and the
    expert's draws differ from each other, too."""
    queries, found = [Query("pirate", i, q) for i, (q, _) in enumerate(KNOWN)], []
    for seed in (0, 0, 1):
        run = RunFolder(tmp_path / str(len(found)))
        with one_thread():
            found.append(write_answers(run, net, tok, PERSONAS, queries, 10, seed))
        run.close()
    assert found[0] == found[1]
    for side in ("base_ids", "expert_ids"):
        assert [getattr(p, side) for p in found[0]] != [getattr(p, side) for p in found[2]]


def plain_log_p(net: Transformer, prompt: list[int], target: list[int]) -> torch.Tensor:
    """log P of each target token, from the logits of one plain forward pass."""
    with torch.no_grad():
        logits = net(torch.tensor([[*prompt, *target]]))[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]


@pytest.mark.parametrize("ended", [True, False])
def test_verdicts_are_about_the_right_answers(run: RunFolder, net: Transformer, tok: Tokenizer,
                                              ended: bool) -> None:
    """The evidence is, per wording, the expert's score and the base answer's, each put together
    here from plain forward passes; the winner follows from it. An answer that was cut off is not
    asked how well it ends."""
    texts = {p.name: p.text for p in PERSONAS}
    pairs = [dataclasses.replace(pair(i, base=KNOWN[i - 1][1], expert=a, query=q, persona="pirate"),
                                 base_stop="eos" if ended else "length")
             for i, (q, a) in enumerate(KNOWN[:6])]

    def score(query: str, answer: str, wording: str) -> float:
        inverse = tok.render([{"role": "user", "content": wording.format(answer=answer)}])
        user, ids = {"role": "user", "content": query}, [*tok.encode(answer), tok.end_of_turn_id]
        bare = plain_log_p(net, tok.render([user]), ids)
        system = {"role": "system", "content": texts["pirate"]}
        expert = plain_log_p(net, tok.render([system, user]), ids)
        mixture = (bare.exp() / 2 + expert.exp() / 2).log()
        return (float(plain_log_p(net, inverse, tok.encode(query)).mean())
                + FLUENCY * float(mixture[:-1].mean()) - DEGENERATE * degenerate(query, answer)
                + (ENDING * max(float(mixture[-1]), ENDING_FLOOR) if ended else 0))

    judge = LikelihoodJudge(net, tok)
    for p, verdict in zip(pairs, write_verdicts(run, judge, PERSONAS, [pairs])):
        [evidence] = verdict.evidence
        for (e, b), wording in zip(evidence, bootstrap.INVERSE_PROMPTS, strict=True):
            assert e == pytest.approx(score(p.query, p.expert, wording), abs=1e-3)
            assert b == pytest.approx(score(p.query, p.base, wording), abs=1e-3)
        assert verdict.votes == [verdict.winner] == [score_winner(evidence)]
        assert verdict.share == verdict.target == int(verdict.winner == "expert")


def test_votes_are_counted(run: RunFolder) -> None:
    """Three answer pairs a query: each is judged with its own answers, t(x) is the majority's, the
    share is kept, and chunks keep queries whole."""
    class ByLength:
        """The longer answer wins."""

        name = "length"

        def compare(self, asked: Sequence[Comparison]) -> tuple[list, dict]:
            return [("expert" if len(c.expert) > len(c.base) else "base", [c.expert, c.base])
                    for c in asked], {"prompts": len(asked)}

    def votes(i: int) -> list[str]:
        return [f"{'e' * (1 + (i >> v & 1) * 2)}" for v in range(3)]

    rounds = [[pair(i, base="bb", expert=votes(i)[v], persona="pirate") for i in range(40)]
              for v in range(3)]
    rows = write_verdicts(run, ByLength(), PERSONAS, rounds)
    for i, row in enumerate(rows):
        won = [(i >> v) & 1 for v in range(3)]
        assert row.index == i and row.share == pytest.approx(sum(won) / 3)
        assert row.votes == ["expert" if w else "base" for w in won]
        assert row.target == int(sum(won) >= 2)
        assert row.evidence == [[e, "bb"] for e in votes(i)]
    assert [m["prompts"] for m in run.metrics()] == [96, 24]


def test_more_votes_use_the_answers_that_are_there(run: RunFolder, net: Transformer,
                                                   tok: Tokenizer) -> None:
    """The second vote has a file of its own with other draws; the first vote's is left alone."""
    queries = [Query("pirate", i, q) for i, (q, _) in enumerate(KNOWN)]
    with one_thread():
        first = write_answers(run, net, tok, PERSONAS, queries, 8, 0)
        before = (run.path / "answers.jsonl").read_bytes()
        second = write_answers(run, net, tok, PERSONAS, queries, 8, 0, vote=1)
    assert (run.path / "answers.jsonl").read_bytes() == before
    assert run.read("answers.1.jsonl", Pair) == second
    assert [p.query for p in first] == [p.query for p in second]
    for side in ("base_ids", "expert_ids"):
        assert [getattr(p, side) for p in first] != [getattr(p, side) for p in second]
    assert [m["step"] for m in run.metrics()] == [0, 1]


@torch.no_grad()
def test_letter_judge_swaps_the_answers(tmp_path: Path, tok: Tokenizer,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The two letters are the likeliest of A, B and TIE after the prompt with the expert's answer
    first, then with the base's first, read from plain logits."""
    monkeypatch.setattr(bootstrap, "LETTER_MASS", 0.0)  # this random model's letters do count
    net = load(tiny_llama(tmp_path, seed=1), dtype=torch.float32)  # a seed with an undecided one
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


def test_letter_judge_counts_what_it_cannot_read(net: Transformer, tok: Tokenizer) -> None:
    """A model that puts almost nothing on A, B and TIE gives "unparsed", not a made-up verdict."""
    results, cost = LetterJudge(net, tok).compare([Comparison("q", "", "one", "two"),
                                                   Comparison("r", "", "three", "four")])
    assert [winner for winner, _ in results] == ["unparsed", "unparsed"]
    assert all(said == ["?", "?"] for _, said in results) and cost["tokens_read"] > 0


@pytest.mark.parametrize("kind", [LetterJudge, LikelihoodJudge])
def test_answers_of_the_room_fit_every_judge(kind: type, net: Transformer, tok: Tokenizer) -> None:
    """The longest that a judge is asked: the longest query, the longest persona, an answer of
    `answer_room` tokens against two of them. It fits, and hardly more would."""
    personas = [*PERSONAS, Persona("long", "You are a very careful expert. " * 30)]
    context = net.config.max_position_embeddings
    room = answer_room(tok, personas, kind.name, context)
    assert 100 < room < context // 2

    def ask(tokens: int) -> None:
        query, answer = " the" * 108, " the" * tokens
        assert (len(tok.encode(query)), len(tok.encode(answer))) == (108, tokens)
        kind(net, tok).compare([Comparison(query, personas[-1].text, answer,
                                           f"{answer}\n\n{answer}")])

    ask(room)
    with pytest.raises(InputError, match=f"context of {context}"):
        ask(room + 4)


def test_room_of_the_default_settings(smollm_tok: Tokenizer) -> None:
    """The paper's 512 tokens fit SmolLM2's context with all twelve personas, and one of 2,048."""
    personas = load_personas(Path(bootstrap.__file__).parent / "personas")
    rooms = {judge: answer_room(smollm_tok, personas, judge, 2048)
             for judge in ("letter", "likelihood", "auto")}
    assert 512 <= rooms["auto"] == rooms["letter"] < rooms["likelihood"]
    assert answer_room(smollm_tok, personas, "auto", 8192) > 2500


@pytest.fixture(scope="module")
def cases(net: Transformer, tok: Tokenizer) -> dict[str, list[Comparison]]:
    """Known-truth pairs of the tiny model: the hand-written answers, one of them empty."""
    known = [*KNOWN, ("What is nothing, if it is anything?", "")]
    pairs = [pair(i, base=a, query=q, persona="pirate") for i, (q, a) in enumerate(known)]
    return known_truth(net, tok, PERSONAS, pairs, 6, 0)[0]


def test_known_truth_by_its_kinds(cases: dict[str, list[Comparison]]) -> None:
    """Each worse answer is spoilt the way its kind says; the better one is the query's own, in the
    expert's place; empty answers are left out."""
    own = dict(KNOWN)
    assert list(cases) == ["wrong query", "wrong but longer", "cut to a third", "echo",
                           "very hot", "same prompt", "refusal"]  # no answer has three sentences
    # the control takes every query, the one without a usable answer too, and two fresh answers
    assert len(cases["same prompt"]) == len(KNOWN) + 1
    assert not {c.expert for c in cases["same prompt"]} & set(own.values())
    assert len(cases["refusal"]) == TEST_PAIRS == 24
    for kind, asked in cases.items():
        assert all(c.expert != c.base for c in asked), kind
        if kind not in ("refusal", "same prompt"):
            assert all(c.expert == own[c.query] and c.persona == PERSONAS[1].text for c in asked)
    for c in cases["wrong query"]:
        assert c.base in own.values()
    for c in cases["wrong but longer"]:
        assert len(c.base) > len(c.expert) and c.expert not in c.base.split("\n\n")
    for c in cases["cut to a third"]:
        assert c.expert.startswith(c.base)
        assert len(c.base.split()) == len(c.expert.split()) // 3
    assert all(c.base == f"You asked: {c.query}" for c in cases["echo"])
    for c in cases["refusal"]:
        assert c.expert == bootstrap.REFUSAL and c.base.startswith(bootstrap.COMPLIANCE)


def test_examined_judge_is_counted_right(cases: dict[str, list[Comparison]]) -> None:
    """A judge of known habits: always right but on refusals, with one tie and one split."""
    class Habitual:
        """Knows the truth; ties on the first echo, splits on the second, complies."""

        name = "habitual"

        def compare(self, asked: Sequence[Comparison]) -> tuple[list, dict]:
            echoes = [c.query for c in asked if c.base.startswith("You asked")]
            return [("base" if c.expert == bootstrap.REFUSAL else
                     "tie" if echoes and c.base == f"You asked: {echoes[0]}" else
                     "split" if echoes and c.base == f"You asked: {echoes[1]}" else "expert", [])
                    for c in asked], {"prompts": len(asked)}

    report = examine_judge(Habitual(), cases)
    echo, refusal = report["kinds"]["echo"], report["kinds"]["refusal"]
    assert (echo["tie"], echo["split"], echo["right"], echo["pairs"]) == (
        1, 1, len(KNOWN) - 3, len(KNOWN) - 1)  # one answer has fewer than six words
    assert refusal["wrong"] == 24 and report["blind_to_refusals"] and report["trusted"]
    assert report["bill"]["prompts"] == sum(map(len, cases.values()))
    worse = {**cases, "echo": cases["echo"][:4]}  # two of four is under 80%
    assert not examine_judge(Habitual(), worse)["trusted"]


def test_judges_that_fail_their_test_are_refused(net: Transformer, tok: Tokenizer,
                                                 cases: dict[str, list[Comparison]]) -> None:
    """"auto" on a random model: neither judge passes, and the error reports both; a forced judge
    is used, its failure recorded, and it is not asked for more than the first kind."""
    with pytest.raises(InputError, match=r"cannot verify itself.*letter 0 of \d+.*likelihood \d+"):
        choose_judge("auto", net, tok, cases)
    few = {kind: asked[:3] for kind, asked in cases.items()}
    with pytest.raises(InputError, match="3 answers are too few"):
        choose_judge("auto", net, tok, few)
    judge, tests = choose_judge("letter", net, tok, cases)
    assert judge.name == "letter" and len(tests) == 1 and not tests[0]["trusted"]
    assert list(tests[0]["kinds"]) == ["wrong query", "same prompt"]  # no other but the control
    counts = tests[0]["kinds"]["wrong query"]
    assert counts["unparsed"] == counts["pairs"] > 0
    assert counts["letters"] == 2 * counts["pairs"] and counts["A"] == 0


@torch.no_grad()
def test_prefix_scoring_is_plain_scoring(net: Transformer, tok: Tokenizer) -> None:
    """Scores after a prefix that is read once equal those of reading prefix + target whole; what
    was read is counted, the prefix once."""
    prefix = tok.open_user_turn(PERSONAS[0].text)
    other = tok.open_user_turn(None)
    targets = [tok.encode(q) for q, _ in KNOWN]
    prompts = [prefix, other] * 6
    found, read = token_log_probabilities(net, prompts, targets, [len(p) - 1 for p in prompts])
    for prompt, target, logs in zip(prompts, targets, found, strict=True):
        torch.testing.assert_close(logs, plain_log_p(net, prompt, target), rtol=1e-4, atol=1e-4)
    assert read == len(prefix) - 1 + len(other) - 1 + sum(len(t) + 1 for t in targets)
    whole, read = token_log_probabilities(net, prompts, targets)
    assert read == sum(len(p) + len(t) for p, t in zip(prompts, targets))
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert token_log_probabilities(net, [], []) == ([], 0)
    assert hidden_states(net, [], []) == ([], 0)


def test_bill_counts_weights(net: Transformer) -> None:
    """Two operations a weight: the layers for every token, the head for those scored or written."""
    layer = sum(p.numel() for p in net.layers.parameters())
    head = net.lm_head.numel()
    row = bill(net, 3, 100, 10, 7)
    assert row == {"prompts": 3, "tokens_read": 100, "tokens_written": 10,
                   "flops": 2 * (110 * layer + 17 * head)}
    assert total([row, row]) == {k: 2 * v for k, v in row.items()}


# --------------------------------------------------------------------------------------------------
# Real weights


@torch.no_grad()
def test_log_probabilities_are_those_of_transformers(
        smollm32: Transformer, smollm_tok: Tokenizer, oracle: PreTrainedModel) -> None:
    """Three hand-written examples of different lengths, scored in one padded batch, agree with
    transformers scoring each alone (padding must not matter)."""
    prompts = [smollm_tok.render([{"role": "user", "content": text}]) for text in (
        "Name a colour.", "Which planet is closest to the sun? Answer in one word.", "Hi")]
    targets = [smollm_tok.encode(text) for text in ("Blue.", "Mercury", "Hello! How can I help?")]
    found, _ = token_log_probabilities(smollm32, prompts, targets)
    for prompt, target, logs in zip(prompts, targets, found, strict=True):
        log_p = oracle(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        expected = [float(log_p[len(prompt) - 1 + i, t]) for i, t in enumerate(target)]
        assert logs.tolist() == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_letter_judge_on_the_real_model(smollm32: Transformer, smollm_tok: Tokenizer,
                                        oracle: PreTrainedModel) -> None:
    """SmolLM2 answers with letters, in both orders, and they are the likeliest of the three by
    transformers' logits of the same two prompts."""
    query, right = KNOWN[0]
    wrong = KNOWN[5][1]
    judge = LetterJudge(smollm32, smollm_tok)
    [(winner, said)], cost = judge.compare([Comparison(query, "", right, wrong)])
    expected, prompts = [], []
    for first, second in ((right, wrong), (wrong, right)):
        content = JUDGE_PROMPT.format(query=query, first=first, second=second)
        ids = smollm_tok.render([{"role": "user", "content": content}])
        prompts.append(ids)
        logits = oracle(torch.tensor([ids])).logits[0, -1]
        heads = [smollm_tok.encode(word)[0] for word in ("A", "B", "TIE")]
        assert float(logits.softmax(-1)[heads].sum()) > 0.05
        expected.append("ABT"[int(logits[heads].argmax())])
    assert said == expected and winner == letter_winner(*expected)
    shared = common_prefix(*prompts)  # all that comes before the answers is read once
    assert cost["tokens_read"] == sum(map(len, prompts)) - shared and shared > 60


def test_likelihood_judge_knows_right_answers(smollm: Transformer, smollm_tok: Tokenizer) -> None:
    """On hand-written questions the right answer beats the answer to another question in at least
    10 of 12, and never loses more than once; given in the other place, the verdict turns round."""
    judge = LikelihoodJudge(smollm, smollm_tok)
    wrong = [KNOWN[(i + 5) % len(KNOWN)][1] for i in range(len(KNOWN))]
    results, cost = judge.compare([Comparison(q, "", a, w) for (q, a), w in zip(KNOWN, wrong)])
    winners = [winner for winner, _ in results]
    assert winners.count("expert") >= 10 and winners.count("base") <= 1
    assert cost["tokens_read"] > 0 and all(len(scores) == 2 for _, scores in results)
    [(turned, scores)], _ = judge.compare([Comparison(KNOWN[4][0], "", wrong[4], KNOWN[4][1])])
    assert turned == "base" and all(e < b for e, b in scores)


def test_dataclasses_are_frozen() -> None:
    """Rows that were read cannot be changed behind the file's back."""
    for row in (Query("p", 0, "q"), pair(0), Verdict("p", 0, "tie", 0, "letter", 0.0, ["tie"], [])):
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.index = 3
