"""queries.py, stage 1: how queries are asked for, which are kept, and which style is taken."""

from dataclasses import replace

import pytest
import torch
from sampling import derive_seed
from support.messages import conversation
from tiny import one_thread
from tiny_run import PERSONAS, rows_of

import queries
from engine import token_log_probabilities
from model import Transformer
from queries import (CURATOR, FEWEST_OPENINGS, INSTRUCTION, LEAD, MOST_OPENINGS, RIVALS, STYLES,
                     TRIAL, WISHES, Candidate, Draft, Query, QueryWriter, assign_openings,
                     identify, keep_queries, most_alike, query_of, trial_personas, try_styles,
                     write_queries)
from support.hub import InputError
from support.runs import RunFolder
from tokenizer import Tokenizer

NINE = {f"p{i}": f"You are number {i} of nine, and you know about {word}."
        for i, word in enumerate("tides bread iron birds rain wood stars fire salt".split())}


def first(personas: dict[str, str], n: int) -> dict[str, str]:
    """The first n of them."""
    return dict(list(personas.items())[:n])


def candidate(persona: str, text: str, complete: bool = True, **fields: object) -> Candidate:
    """A candidate that suits its own persona, unless `fields` says otherwise."""
    return Candidate(**{"persona": persona, "style": "continue", "text": text,
                        "complete": complete, "suits": persona} | fields)


def test_which_queries_are_kept() -> None:
    """A near-duplicate, or what is unfinished, malformed or likelier under another persona, would
    be kept; or not the first `wanted` in order, so that a later round only appends."""
    def kept(personas: dict[str, str], wanted: int) -> list[tuple[str, int, str]]:
        return [(q.persona, q.index, q.query) for q in keep_queries(found, personas, wanted)]

    a, b = {"a": "You are a careful chemist."}, {"b": "y"}
    bay, harbour = "How do tides work in a bay?", "How do tides work in a harbour?"
    engine, phone = "What makes an engine run smoothly?", "When was the telephone first sold?"
    bread, birds = "Why is bread left to rise?", "Which birds can sing at night?"
    found = [candidate("b", bay), candidate("a", bread, complete=False),
             candidate("a", "Too short."), candidate("a", birds, suits="b"),
             candidate("a", "You are a careful chemist and what?"), candidate("a", harbour),
             candidate("a", harbour[:-1] + "!"), candidate("b", bread), candidate("a", engine),
             candidate("b", "what makes an engine run smoothly, then?"), candidate("a", phone),
             candidate("b", birds)]
    # "bay" differs from "harbour" in one word of eight: 6 / 8 is above 0.7, so b's is a duplicate
    assert kept(a | b, 2) == [("a", 0, harbour), ("a", 1, engine), ("b", 0, bread), ("b", 1, birds)]
    assert kept(b | a, 2) == [("b", 0, bay), ("b", 1, bread), ("a", 0, engine), ("a", 1, phone)]
    assert kept(a, 9) == [("a", 0, harbour), ("a", 1, engine), ("a", 2, phone)]


def test_openings_go_to_the_persona_that_lifts_them() -> None:
    """An opening would go to a persona for being popular everywhere, not for what the persona adds;
    or one would have fewer than its two best, or more than eight."""
    popular = torch.tensor([-1.0, -9.0, -4.0, -2.0, -7.0, -3.0])
    found = popular.repeat(4, 1)  # three personas, and the conversation without one
    found[0, [1, 4]] += 2.0
    found[1, [2, 3]] += 2.0
    found[0] += 5.0  # a persona under which all openings are likelier gets none for that
    assert [sorted(chosen) for chosen in assign_openings(found)[:2]] == [[1, 4], [2, 3]]
    assert all(len(chosen) >= FEWEST_OPENINGS for chosen in assign_openings(found))
    lifted = torch.tensor([[7.0, 1, 2, 5, 1], [8, 3, 2, 6, 2], [0] * 5])
    assert assign_openings(lifted)[0] == [2, 0]  # the one that it lifts most, then its best
    alone = torch.stack([torch.linspace(0, 1, 60), torch.zeros(60)])
    assert assign_openings(alone) == [list(range(59, 59 - MOST_OPENINGS, -1))]


def test_rivals_are_the_personas_most_alike() -> None:
    """Rivals would not be the three others whose states point most the same way, nearest first,
    once what all share is taken away; or a persona would be its own."""
    turned = torch.tensor([0.0, 10, 25, 45, 180, 200, 225, 300]).deg2rad()  # on a circle
    means = torch.stack([turned.cos(), turned.sin()], dim=1)
    means = means - means.mean(0) + torch.tensor([50.0, 20.0])  # much that is common
    found = most_alike(means)
    assert [sorted(rivals) for rivals in found[4:7]] == [[5, 6, 7], [4, 6, 7], [4, 5, 7]]
    assert all(len(set(rivals)) == RIVALS and k not in rivals for k, rivals in enumerate(found))
    assert found[5][0] == 4 and found[0][0] == 1


def test_each_style_asks_in_its_own_way(run: RunFolder, net: Transformer, tok: Tokenizer) -> None:
    """A style would ask with another's prompt, the wishes or openings not take turns, or the
    persona's part, which is read once, reach into what differs."""
    writer = QueryWriter(run, net, tok, PERSONAS, "auto", 0)
    writer.openings = {name: ["How do I", "Why does my"] for name in PERSONAS}
    for name, persona in PERSONAS.items():
        asked = [writer.request(Draft("instruct", name, i)) for i in range(2 * len(WISHES))]
        for request, wish in zip(asked, 2 * WISHES, strict=True):
            text = INSTRUCTION.format(persona=persona, wish=wish)
            assert request.ids == tok.render(conversation(text, CURATOR))
            assert request.ids[:request.prefix] == asked[0].ids[:asked[0].prefix]
        assert persona in tok.decode(asked[0].ids[:asked[0].prefix])
        turn, words = tok.open_user_turn(persona), []
        for number in range(5):
            request = writer.request(Draft("continue", name, number))
            begun = request.ids[len(turn):]
            assert request.ids[:len(turn)] == turn and request.prefix == len(turn) - 1
            assert request.begun == len(begun)
            assert request.seed == derive_seed(0, "query", "continue", name, number)
            words.append(tok.decode(begun))
        assert words == ["How do I", "", "Why does my", "", "How do I"]


def test_openings_suit_the_language(run: RunFolder, net: Transformer, tok: Tokenizer) -> None:
    """A German persona's queries would begin in English, or an English one's be given no help."""
    personas = PERSONAS | {"koch": "Du bist Koch und erkl\u00e4rst Rezepte. Du sagst mir, wann ein "
                                   "Gericht gelungen ist."}
    writer = QueryWriter(run, net, tok, personas, "continue", 0)
    with one_thread():
        writer.find_rivals_and_openings()
    assert [name for name, own in writer.openings.items() if not own] == ["koch"]


def test_a_candidate_is_scored_under_its_persona_and_its_rivals_only(
        run: RunFolder, net: Transformer, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer would be taken for a message, or a rival overlooked; or, scored under all personas,
    stage 1's cost would grow with their square."""
    drafts = [Draft("continue", name, i) for name in NINE for i in range(9)]
    monkeypatch.setattr(queries, "LEAD", -1.0)  # or too few of so random a model come so far
    with one_thread():
        writer = QueryWriter(run, net, tok, NINE, "instruct", 0)
        writer.openings = {name: [] for name in NINE}
        rows, cost = writer.write(drafts)
    expected, scored = [], 0
    for row in rows:
        own, text = row.persona, query_of(row, writer.texts[row.persona])
        if not text:
            expected.append(None)
            continue
        user, *others = writer.score([(name, text) for name in (own, *writer.rivals[own])])
        [assistant] = writer.score([(own, text)], "assistant")
        close = [place for place, score in enumerate(others) if user - score < queries.LEAD]
        if close:
            scored += 1 + close[0] + 1
            expected.append(writer.rivals[own][close[0]])
        else:  # only then is it read as an answer
            scored += 1 + RIVALS + 1
            expected.append(own if user > assistant else None)
    assert [row.suits for row in rows] == expected
    assert {name and name == row.persona for name, row in zip(expected, rows)} >= {None, False}
    assert cost["prompts"] == len(rows) + scored
    assert run.latest()["personas"]["prompts"] == 9  # no opening was looked at


@pytest.mark.parametrize("behind, suited", [(-LEAD - 1, True), (0.0, True), (LEAD + 1, False)])
def test_what_no_context_claims_is_a_query_of_a_contrast(
        behind: float, suited: bool, run: RunFolder, net: Transformer, tok: Tokenizer,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary questions are as likely under any context: a contrast would never get any. Or it
    would be given what is likelier as its own answer."""
    personas = {"contrast_daily": "You help.", "policy": "Decline."}
    writer = QueryWriter(run, net, tok, personas, "instruct", 0)
    writer.rivals = {"contrast_daily": ["policy"], "policy": ["contrast_daily"]}
    likelihood = {"contrast_daily": -20.0, "policy": -20.0 + behind}
    egg, answer = "How do I boil an egg?", "I boil an egg for eight minutes."
    spoken = {egg: -40.0, answer: -10.0}
    monkeypatch.setattr(writer, "score", lambda asked, role="user": [
        likelihood[name] if role == "user" else spoken[text] for name, text in asked])
    daily, policy, said = writer.find_suited([
        ("contrast_daily", egg), ("policy", egg), ("contrast_daily", answer)])
    assert (daily == "contrast_daily") == suited and (policy == "policy") == (behind > LEAD)
    assert said == (None if suited else "policy")


def test_the_style_with_most_identifiable_queries_is_taken(
        run: RunFolder, net: Transformer, tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the style whose queries can be told apart would be taken, and of equals the first; or a
    run that goes on would try again and choose otherwise."""
    right = ["Which acid dissolves gold best?", "Why does iron rust in rain?"]
    found = [candidate("chemist", text, style="instruct") for text in right]
    found += [candidate("chemist", right[0], style="continue", suits="pirate") for _ in right]
    whole = [candidate("chemist", text, style="continue") for text in right]
    hits = [True, True, False]
    monkeypatch.setattr(queries, "identify", lambda *_: (hits, {"flops": 18}))
    assert try_styles(run, net, tok, PERSONAS, found) == "instruct"
    row = run.latest()["style"]
    counts = {name: (t["candidates"], t["complete"], t["distinct"], t["identifiable"])
              for name, t in row["styles"].items()}
    assert counts == {"instruct": (2, 2, 2, 2), "continue": (2, 2, 1, 0)}
    assert row["chosen"] == "instruct" and row["flops"] == 18
    assert try_styles(run, net, tok, PERSONAS, found[2:]) == "instruct"  # recorded
    hits[2:] = [True, True]
    with RunFolder(run.path / "other") as other:
        assert try_styles(other, net, tok, PERSONAS, [*found[:2], *whole]) == "instruct"  # a draw
    alike = replace(found[0], text=right[1])
    with RunFolder(run.path / "third") as third:
        assert try_styles(third, net, tok, PERSONAS, [found[1], alike, *whole]) == "continue"


def test_a_query_is_identified_by_its_own_description(net: Transformer, tok: Tokenizer) -> None:
    """The query would be scored after another text than the expert's description, or the highest
    not be taken: chosen by hand from the same probabilities, the same are right."""
    three = first(NINE, 3)
    asked = [Query(name, i, f"What do you know about {word}?") for name in three
             for i, word in enumerate(("tides", "bread", "iron", "wine"))]
    prompts = {name: tok.render(conversation(queries.IDENTIFY_PROMPT.format(persona=text)))
               for name, text in three.items()}
    right = []
    for q in asked:
        logs, _ = token_log_probabilities(net, list(prompts.values()),
                                          [tok.encode_turn("assistant", q.query)] * 3)
        best = max(range(3), key=lambda k: float(logs[k].sum()))
        right.append(list(prompts)[best] == q.persona)
    assert identify(net, tok, three, asked)[0] == right and {*right} == {True, False}


@pytest.mark.parametrize("chosen", STYLES["auto"])
def test_the_trial_is_small_and_its_candidates_are_used(
        chosen: str, run: RunFolder, net: Transformer, tok: Tokenizer,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """auto would try only one style or all personas, throw the chosen one's candidates away, keep
    those of the others, or write on in a style that was not chosen; or try one beside the style
    that --query-style names."""
    assert list(trial_personas(NINE)) == ["p0", "p3", "p6"]
    assert len(trial_personas(first(NINE, 8))) == 4 and len(trial_personas(first(NINE, 1))) == 1
    monkeypatch.setattr(queries, "try_styles", lambda *_: chosen)
    with RunFolder(run.path / "other") as other, one_thread():
        kept = write_queries(run, net, tok, PERSONAS, 6, 0)
        write_queries(other, net, tok, PERSONAS, 1, 0, chosen)
    rows = rows_of(run.path, "candidates.jsonl")
    trial, later = rows[:2 * 2 * TRIAL], rows[2 * 2 * TRIAL:]
    assert [r["style"] for r in trial] == [s for s in STYLES["auto"] for _ in range(2 * TRIAL)]
    for written in (later, rows_of(other.path, "candidates.jsonl")):
        assert {r["style"] for r in written} == {chosen}
    assert len({r["text"] for r in rows}) > 0.8 * len(rows)  # no draft is written twice
    mine = [query_of(Candidate(**r), "") for r in rows if r["style"] == chosen]
    tried = [query_of(Candidate(**r), "") for r in trial if r["style"] == chosen]
    assert all(q.query in mine for q in kept) and any(q.query in tried for q in kept)


def test_queries_that_are_there_are_used(run: RunFolder, net: Transformer, tok: Tokenizer) -> None:
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
