"""bootstrap.py, stages 2 and 3: what answers and verdicts are made from; and the personas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import pytest
from sampling import Sampling
from support.messages import conversation
from tiny import one_thread
from tiny_run import DATA, PERSONAS, QUERIES, pair, rows_of, watch

import bootstrap
import generate as generate_module
from bootstrap import check_order, won_pairs, write_answers, write_verdicts
from engine import Engine
from evaluate import EXPERTS
from generate import generate
from judge import Comparison, LikelihoodJudge
from model import Sizes, Transformer
from queries import Query, write_queries
from support.hub import InputError
from support.personas import load_personas
from support.runs import RunFolder
from tokenizer import Tokenizer

QUESTIONS = ["What is the capital of France?", "How do I boil an egg?", "Why is the sky blue?"]


def test_the_twelve_personas() -> None:
    """One of the paper's twelve would be gone from personas/ or lack one of its three lengths, be
    much shorter or longer, or stand at another place; a subfolder would be read, too; or a
    benchmark's expert be none of them."""
    folder = Path(bootstrap.__file__).parent / "personas"
    for length, least, most in (("", 90, 220), ("short", 12, 90), ("min", 2, 12)):
        found = load_personas(folder / length)
        assert list(found) == [
            "coding", "compliant", "critic", "extraction", "helpful", "humanities", "math",
            "reasoning", "roleplay", "safety_monitor", "stem", "writing"]
        assert all(least <= len(text.split()) <= most for text in found.values())
    assert set(EXPERTS.values()) <= set(found)


def test_a_row_depends_on_seed_and_name(tmp_path: Path, net: Transformer, tok: Tokenizer) -> None:
    """Another seed would draw the same rows; or a persona's first candidates, and its first query,
    would change when more queries are wanted."""
    files = {}
    for name, seed, wanted in (("one", 0, 3), ("other", 1, 3), ("more", 0, 4)):
        with RunFolder(tmp_path / name) as run, one_thread():
            queries = write_queries(run, net, tok, PERSONAS, wanted, seed)
            if name != "more":
                pairs = write_answers(run, net, tok, PERSONAS, queries, 10, seed)
                write_verdicts(run, LikelihoodJudge(net, tok), PERSONAS, pairs)
        files[name] = {path.name: path.read_bytes().split(b"\n")
                       for path in run.path.glob("*.jsonl")}
    assert not any(files["one"][name] == files["other"][name] for name in DATA)
    for name, rows in (("candidates.jsonl", 9), ("queries.jsonl", 1)):
        assert files["one"][name][:rows] == files["more"][name][:rows]


def test_rows_are_those_of_the_interface(finished: Path, tok: Tokenizer) -> None:
    """A field would have another name or place, ids not be the texts', or stop not say why."""
    queries, answers, verdicts = (rows_of(finished, name) for name in DATA[1:])
    assert [list(r) for r in queries] == [["persona", "index", "query"]] * 2 * QUERIES
    for row, query in zip(answers, queries, strict=True):
        assert list(row) == ["persona", "index", "query", "base", "expert", "base_ids",
                             "expert_ids", "base_stop", "expert_stop"]
        assert {k: row[k] for k in query} == query
        for side in ("base", "expert"):
            ids, stop = row[f"{side}_ids"], row[f"{side}_stop"]
            assert stop == ("eos" if ids[-1] == 2 else "length")
            assert len(ids) == 12 or (stop == "eos" and 1 <= len(ids) < 12)
            assert 2 not in ids[:-1]
            assert row[side] == tok.decode(ids[:-1] if stop == "eos" else ids)
    for row in verdicts:
        assert list(row) == ["persona", "index", "winner", "target", "judge", "evidence"]
        assert row["target"] == int(row["winner"] == "expert") and row["judge"] == "likelihood"
        assert row["winner"] in ("expert", "base", "tie", "split")
    assert any(r["base_ids"] != r["expert_ids"] for r in answers)


def test_answers_come_from_the_right_prompts(run: RunFolder, net: Transformer, tok: Tokenizer,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """y_0 would not be P(.|x)'s, or y_c not P(.|persona, x)'s: at temperature 0 stage 2 gives what
    `generate` gives for the two conversations, shared prefixes or not. Or more slots, as on a GPU,
    would wait for answers: a chunk has two for each."""
    monkeypatch.setattr(bootstrap, "ANSWER_TEMPERATURE", 0.0)
    monkeypatch.setattr(net, "sizes", Sizes(slots=2))
    engines = watch(monkeypatch, generate_module, "Engine")
    queries = [Query(name, i, q) for name in PERSONAS for i, q in enumerate(QUESTIONS)]
    pairs = write_answers(run, net, tok, PERSONAS, queries, 12, 0)
    assert engines.call_count == 3 and Engine(net, Sampling(4), set()).slots == 2
    for side in ("base", "expert"):
        talks = [conversation(q.query, PERSONAS[q.persona] if side == "expert" else "")
                 for q in queries]
        expected = generate(net, tok, talks, Sampling(12, 0.0))
        assert [getattr(p, f"{side}_ids") for p in pairs] == [c.ids for c in expected]
    assert all(p.base_ids != p.expert_ids for p in pairs)


def by_length(asked: Sequence[Comparison]) -> tuple[list, dict]:
    """The longer answer wins, and the evidence is all that the judge was given."""
    results = []
    for c in asked:
        winner = "expert" if len(c.expert) > len(c.base) else "base"
        results.append((winner, [c.query, c.context, c.expert, c.base, c.ended]))
    return results, {"prompts": len(asked)}


BY_LENGTH = SimpleNamespace(name="length", compare=by_length)


def test_verdicts_are_about_the_right_answers(run: RunFolder) -> None:
    """A verdict would be about another query, persona or answer, or not know which was cut off; or
    t(x), and the distill set, would not be where the expert won."""
    pairs = [pair(i, base="bb", expert="e" * (1 + 2 * (i % 3)), query=f"q{i}", ended=i % 2 > 0,
                  persona=("pirate", "chemist")[i // 20]) for i in range(40)]
    rows = write_verdicts(run, BY_LENGTH, PERSONAS, pairs)
    for p, row in zip(pairs, rows, strict=True):
        assert (row.persona, row.index, row.judge) == (p.persona, p.index, "length")
        assert row.evidence == [p.query, PERSONAS[p.persona], p.expert, "bb", p.base_stop == "eos"]
        assert row.target == int(row.winner == "expert") == int(len(p.expert) > 2)
    assert [m["prompts"] for m in run.metrics()] == [32, 8]
    assert won_pairs(pairs, rows) == [p for p in pairs if len(p.expert) > 2]


def test_rows_moved_or_removed_are_named(run: RunFolder, net: Transformer, tok: Tokenizer) -> None:
    """A row taken out of answers.jsonl would shift all later verdicts to other queries: the line is
    named before anything is sampled. Edited texts are used."""
    queries = [Query("pirate", i, f"q{i}") for i in range(3)]
    pairs = [pair(i, persona="pirate", query=f"edited {i}") for i in range(3)]
    run.write("answers.jsonl", pairs)
    assert write_answers(run, net, tok, PERSONAS, queries, 4, 0) == pairs
    for wrong, line in ((pairs[1:], 1), ([pairs[0], pairs[2], pairs[1]], 2),
                        ([*pairs, pair(3, persona="pirate")], 4)):
        run.write("answers.jsonl", wrong)
        with pytest.raises(InputError, match=rf"answers\.jsonl, line {line}: "):
            write_answers(run, net, tok, PERSONAS, queries, 4, 0)
    verdicts = write_verdicts(run, BY_LENGTH, PERSONAS, pairs)
    check_order(verdicts, pairs, run.path)
    check_order(verdicts[:2], pairs, run.path)  # an interrupted stage
    with pytest.raises(InputError, match="line 1"):
        check_order(verdicts[1:], pairs, run.path)
