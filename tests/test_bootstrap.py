"""bootstrap.py: cleaning queries, verdicts, the two judges, and the commit protocol of a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Callable, Iterator, Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import bootstrap
from bootstrap import (
    JUDGE_PROMPT,
    MARGIN,
    Candidate,
    LetterJudge,
    LikelihoodJudge,
    Pair,
    Persona,
    Query,
    RunFolder,
    Verdict,
    choose_judge,
    clean_query,
    common_prefix,
    keep_queries,
    known_truth,
    letter_winner,
    load_personas,
    mean_log_probability,
    score_winner,
    split_chunks,
    write_answers,
    write_queries,
    write_verdicts,
)
from generate import Sampling, derive_seed, generate
from hub import InputError
from model import Transformer, load
from tiny import one_thread, tiny_llama
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def net(folder: Path) -> Transformer:
    """The tiny model in fp32."""
    return load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tok(folder: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer(folder)


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
    return Candidate(**{"persona": persona, "round": 0, "text": text, "complete": complete,
                        "likeliest": persona} | fields)


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
    ("How do tides work?", None),  # four words
    ("", None),
    (" \n \t\n", None),
    ("1.", None),
    ('"', None),
    ("Here are some questions for you:", None),  # announces what the first line lacks
    ("When you come to the sea,", None),
    (" ".join(["word"] * 60), " ".join(["word"] * 60)),
    (" ".join(["word"] * 61), None),
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


def test_known_truth_pairs_never_compare_an_answer_with_itself() -> None:
    """Each query's own answer against the answer to ANOTHER query, empty answers left out."""
    for n in (2, 3, 4, 5, 8):
        for empty in ((), (0,), (0, 1), tuple(range(n // 2))):
            pairs = [pair(i, base="" if i in empty else f"answer {i}", query=f"query {i}")
                     for i in range(n)]
            triples = known_truth(pairs)
            if n - len(empty) < 2:
                continue
            assert len(triples) == n - len(empty)
            for query, right, wrong in triples:
                assert right.split()[1] == query.split()[1]
                assert wrong.strip() and wrong != right, f"{n} pairs, {len(empty)} empty"


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


def square(calls: list[int]) -> Callable[[int, Sequence[int]], tuple[list[Query], dict]]:
    """Work for `RunFolder.chunks` whose rows depend on the whole chunk; notes chunks done."""

    def work(number: int, chunk: Sequence[int]) -> tuple[list[Query], dict]:
        calls.append(number)
        return [Query("p", i, f"{i * i} of {list(chunk)}") for i in chunk], {"rows": len(chunk)}

    return work


def metrics_without_seconds(run: RunFolder) -> list[dict]:
    """Metrics rows without times."""
    return [{k: v for k, v in m.items() if k != "seconds"} for m in run.metrics()]


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
            write_verdicts(run, LikelihoodJudge(net, tok), pairs)
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
            own += mean_log_probability(net, [prompt], [ids])[0]
            swapped += mean_log_probability(net, [other], [ids])[0]
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


def test_verdicts_are_about_the_right_answers(run: RunFolder, net: Transformer,
                                              tok: Tokenizer) -> None:
    """The evidence is, per wording, the query's score given the expert's answer, then the base's,
    each recomputed here alone; the winner follows from it."""
    pairs = [pair(i, base=KNOWN[i - 1][1], expert=a, query=q) for i, (q, a) in enumerate(KNOWN)]
    for p, verdict in zip(pairs, write_verdicts(run, LikelihoodJudge(net, tok), pairs)):
        expected = []
        for wording in bootstrap.INVERSE_PROMPTS:
            asked = [tok.render([{"role": "user", "content": wording.format(answer=answer)}])
                     for answer in (p.expert, p.base)]
            expected.append(mean_log_probability(net, asked, [tok.encode(p.query)] * 2))
        assert [x for e in verdict.evidence for x in e] == pytest.approx(
            [x for e in expected for x in e], abs=1e-4)
        assert verdict.winner == score_winner(verdict.evidence)


@torch.no_grad()
def test_letter_judge_swaps_the_answers(tmp_path: Path, tok: Tokenizer,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The two letters are the likeliest of A, B and TIE after the prompt with the expert's answer
    first, then with the base's first, read from plain logits."""
    monkeypatch.setattr(bootstrap, "LETTER_MASS", 0.0)  # this random model's letters do count
    net = load(tiny_llama(tmp_path, seed=1), dtype=torch.float32)  # a seed with an undecided one
    triples = [(q, a, KNOWN[i - 1][1]) for i, (q, a) in enumerate(KNOWN)]
    results, _ = LetterJudge(net, tok).compare(triples)
    letters = [tok.encode(word)[0] for word in ("A", "B", "TIE")]
    for (query, expert, base), (winner, said) in zip(triples, results, strict=True):
        expected = []
        for first, second in ((expert, base), (base, expert)):
            content = JUDGE_PROMPT.format(query=query, first=first, second=second)
            ids = tok.render([{"role": "user", "content": content}])
            expected.append("ABT"[int(net(torch.tensor([ids]))[0, -1, letters].argmax())])
        assert said == expected and winner == letter_winner(*expected)
    assert any(a != b for _, (a, b) in results)  # or the order was not tested


def test_letter_judge_counts_what_it_cannot_read(net: Transformer, tok: Tokenizer) -> None:
    """A model that puts almost nothing on A, B and TIE gives "unparsed", not a made-up verdict."""
    results, tokens = LetterJudge(net, tok).compare([("q", "one", "two"), ("r", "three", "four")])
    assert [winner for winner, _ in results] == ["unparsed", "unparsed"]
    assert all(said == ["?", "?"] for _, said in results) and tokens > 0


def test_judges_that_fail_their_test_are_refused(net: Transformer, tok: Tokenizer) -> None:
    """"auto" on a random model: neither judge passes, and the error reports both; a forced judge
    is used, its failure recorded."""
    pairs = [pair(i, base=a, query=q) for i, (q, a) in enumerate(KNOWN)]
    with pytest.raises(InputError, match=r"letter \d+ of 12; likelihood \d+ of 12"):
        choose_judge("auto", net, tok, pairs)
    judge, tests = choose_judge("letter", net, tok, pairs)
    assert judge.name == "letter" and len(tests) == 1
    assert (tests[0]["pairs"], tests[0]["right"], tests[0]["unparsed"]) == (12, 0, 12)


@torch.no_grad()
def test_prefix_scoring_is_plain_scoring(net: Transformer, tok: Tokenizer) -> None:
    """Scores after ONE prefix read once equal those of reading prefix + target whole."""
    prefix = tok.open_user_turn(PERSONAS[0].text)
    targets = [tok.encode(q) for q, _ in KNOWN]
    sums = bootstrap.log_probability_after(net, prefix, targets)
    for total, target in zip(sums, targets, strict=True):
        log_p = net(torch.tensor([[*prefix, *target]]))[0].log_softmax(-1)
        expected = sum(float(log_p[len(prefix) - 1 + i, t]) for i, t in enumerate(target))
        assert total == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Real weights


@torch.no_grad()
def test_mean_log_probability_is_that_of_transformers(
        smollm32: Transformer, smollm_tok: Tokenizer, oracle: PreTrainedModel) -> None:
    """Three hand-written examples of different lengths, scored in one padded batch, agree with
    transformers scoring each alone (padding must not matter); rounding to 6 digits allowed."""
    prompts = [smollm_tok.render([{"role": "user", "content": text}]) for text in (
        "Name a colour.", "Which planet is closest to the sun? Answer in one word.", "Hi")]
    targets = [smollm_tok.encode(text) for text in ("Blue.", "Mercury", "Hello! How can I help?")]
    found = mean_log_probability(smollm32, prompts, targets)
    for prompt, target, mean in zip(prompts, targets, found, strict=True):
        log_p = oracle(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[len(prompt) - 1 + i, t])
                       for i, t in enumerate(target)) / len(target)
        assert mean == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_letter_judge_on_the_real_model(smollm32: Transformer, smollm_tok: Tokenizer,
                                        oracle: PreTrainedModel) -> None:
    """SmolLM2 answers with letters, in both orders, and they are the likeliest of the three by
    transformers' logits of the same two prompts."""
    query, right = KNOWN[0]
    wrong = KNOWN[5][1]
    judge = LetterJudge(smollm32, smollm_tok)
    [(winner, said)], tokens = judge.compare([(query, right, wrong)])
    expected = []
    for first, second in ((right, wrong), (wrong, right)):
        content = JUDGE_PROMPT.format(query=query, first=first, second=second)
        ids = smollm_tok.render([{"role": "user", "content": content}])
        tokens -= len(ids)
        logits = oracle(torch.tensor([ids])).logits[0, -1]
        heads = [smollm_tok.encode(word)[0] for word in ("A", "B", "TIE")]
        assert float(logits.softmax(-1)[heads].sum()) > 0.05
        expected.append("ABT"[int(logits[heads].argmax())])
    assert said == expected and winner == letter_winner(*expected) and tokens == 0


def test_likelihood_judge_knows_right_answers(smollm_folder: Path, smollm_tok: Tokenizer) -> None:
    """On hand-written questions the right answer beats the answer to another question in at least
    10 of 12, and never loses more than once; given in the other place, the verdict turns round."""
    net = load(smollm_folder, dtype=torch.bfloat16)
    judge = LikelihoodJudge(net, smollm_tok)
    wrong = [KNOWN[(i + 5) % len(KNOWN)][1] for i in range(len(KNOWN))]
    results, tokens = judge.compare([(q, a, w) for (q, a), w in zip(KNOWN, wrong)])
    winners = [winner for winner, _ in results]
    assert winners.count("expert") >= 10 and winners.count("base") <= 1
    assert tokens > 0 and all(len(scores) == 2 for _, scores in results)
    [(turned, scores)], _ = judge.compare([(KNOWN[4][0], wrong[4], KNOWN[4][1])])
    assert turned == "base" and all(e < b for e, b in scores)


def test_dataclasses_are_frozen() -> None:
    """Rows that were read cannot be changed behind the file's back."""
    for row in (Query("p", 0, "q"), pair(0), Verdict("p", 0, "tie", 0, "letter", [])):
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.index = 3
