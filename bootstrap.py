"""Stages 1-3: the model writes queries, answers them with and without a persona, and judges itself.

Every stage is data on disk: one JSONL file, one row a sample, extended by whole chunks and replaced
atomically, so a run killed at any moment continues to the same files. A row's random draws depend
on its own name (persona, index) and a chunk's batching on nothing but the chunk.

1. `write_queries`: for each persona, what a user would type to this expert.
2. `write_answers`: two answers a query, y_0 ~ P(.|x) and y_c ~ P(.|c, x).
3. `write_verdicts`: does the persona's answer win? t(x) = 1 only if it wins under both orders or
   both wordings of the judge's question. Which judge can be trusted is tested first (judge.py).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from engine import SLOTS, Engine, Request, Sampling, derive_seed, token_log_probabilities
from generate import sample_answers, stop_tokens
from judge import Comparison, Judge, conversation
from model import Transformer
from support.hub import InputError
from support.personas import Persona
from support.runs import RunFolder, add_costs, cost_of, peak_memory, split_chunks
from support.stats import interval
from support.words import (ECHO_WORDS, MAX_WORDS, MIN_WORDS, NEAR_DUPLICATE, clean_query,
                           near_duplicates, request_words, word_list, words_of)
from tokenizer import Tokenizer

CANDIDATE_CHUNK = 96  # candidates of stage 1 that are done, and committed, together
QUERY_SAMPLING = {"temperature": 0.8, "max_new_tokens": 96}
ANSWER_TEMPERATURE = 0.7
OVERSAMPLE, ROUNDS = 3, 4  # candidates per lacking query in a round of stage 1; most rounds
MOST_OPENINGS, FEWEST_OPENINGS = 8, 2  # of its own, for each persona
RIVALS, LEAD = 3, 1.5  # others under which a query is scored; nats by which its own must lead
HELD_OUT = 5  # one query in so many is held out from stage 5
MEASURED = 96  # kept queries whose persona is guessed in `measure_queries`
IDENTIFY_PROMPT = ("This is how an expert is described:\n\n{persona}\n\n"
                   "Write one message that a user would send to this expert.")
# How a user's message may begin: ONE list for all, so that no persona has a format of its own.
OPENINGS = word_list("openings")
LONG_OPENINGS = word_list("long_openings")
# Quiz questions: whatever their topic, the answer should not depend on who gives it.
CONTRAST_OPENINGS = word_list("contrast_openings")
# A persona's candidates take these kinds of openings in turn, again and again.
KINDS = ("plain", "own", "own", "plain", "own", "long", "own", "contrast")
# Everything above that decides a query: a run notices when it is changed.
QUERY_RULES = (OPENINGS, LONG_OPENINGS, CONTRAST_OPENINGS, KINDS, sorted(request_words()),
               sorted(QUERY_SAMPLING.items()), OVERSAMPLE, ROUNDS, MIN_WORDS, MAX_WORDS,
               ECHO_WORDS, NEAR_DUPLICATE, MOST_OPENINGS, FEWEST_OPENINGS, RIVALS, LEAD)


@dataclass(frozen=True)
class Candidate:
    """A query as the model wrote it in stage 1, before the pure pass that keeps or drops it.

    `kind`: which sort of opening it was given (KINDS); `text` includes the opening. `complete`: the
    model ended it by itself. `suits`: its own persona, or the first of the rivals that the cleaned
    query suits as well; None if cleaning left nothing.
    """

    persona: str
    round: int
    kind: str
    text: str
    complete: bool
    suits: str | None = None


@dataclass(frozen=True)
class Query:
    """Row of queries.jsonl."""

    persona: str
    index: int
    query: str


@dataclass(frozen=True)
class Pair:
    """Row of answers.jsonl: a query with its base and its expert answer, ids as sampled."""

    persona: str
    index: int
    query: str
    base: str
    expert: str
    base_ids: list[int]
    expert_ids: list[int]
    base_stop: str
    expert_stop: str


@dataclass(frozen=True)
class Verdict:
    """Row of verdicts.jsonl: who won, and t(x). `evidence`: the two letters, or per wording the
    expert's and the base answer's score in nats per token."""

    persona: str
    index: int
    winner: str
    target: int
    judge: str
    evidence: list


# --------------------------------------------------------------------------------------------------
# Stage 1: queries


def write_queries(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: Sequence[Persona], wanted: int, seed: int) -> list[Query]:
    """Stage 1 (paper, section 3.1): `wanted` queries a persona, in the user's own voice.

    The model reads the persona as its system message and goes on as the USER, after an opening that
    suits this expert: no instruction that a small model could echo. A query counts only if it is
    clearly likelier after its own persona than after those most like it. Candidates are written in
    rounds; after each, one pure pass over all (`keep_queries`) says who still lacks queries.

    Where queries.jsonl is there, it is used as it is, whoever wrote it.
    """
    if (run.path / "queries.jsonl").exists():
        return check_queries(run.rows("queries.jsonl", Query), personas, run.path)
    writer = QueryWriter(run, net, tokenizer, personas)
    chunks: list[Sequence[Draft]] = []
    drafted, lacking = Counter(), {p.name: wanted for p in personas}
    for round_ in range(ROUNDS):
        drafts = []
        for name, count in lacking.items():
            for _ in range(max(OVERSAMPLE * count, len(KINDS))):
                drawn = derive_seed(seed, "query", name, drafted[name])
                drafts.append(Draft(name, round_, drafted[name], drawn))
                drafted[name] += 1
        chunks += split_chunks(drafts, CANDIDATE_CHUNK)
        for chunk in run.todo("queries", "candidates.jsonl", Candidate, chunks):
            rows, cost = writer.write(chunk)
            run.commit(rows, cost)
        # A continued run may find later rounds on disk already; a round is judged by its own past.
        candidates = run.rows("candidates.jsonl", Candidate)[:sum(map(len, chunks))]
        queries = keep_queries(candidates, personas, wanted)
        kept = Counter(q.persona for q in queries)
        lacking = {p.name: wanted - kept[p.name] for p in personas if kept[p.name] < wanted}
        if not lacking:
            break
    if run.writes and queries:
        run.record("quality", 0, **measure_queries(net, tokenizer, personas, queries, candidates))
        run.write("queries.jsonl", queries)
    return queries


def check_queries(queries: list[Query], personas: Sequence[Persona], folder: Path) -> list[Query]:
    """The rows of queries.jsonl, which may have been edited; InputError if they cannot be used."""
    names, seen = {p.name for p in personas}, set()
    for number, q in enumerate(queries, 1):
        if q.persona not in names or (q.persona, q.index) in seen or not q.query.strip():
            raise InputError(f"{folder / 'queries.jsonl'}, line {number}: an empty query, a "
                             "persona that is not in --personas, or an index that it has twice")
        seen.add((q.persona, q.index))
    return queries


@dataclass(frozen=True)
class Draft:
    """What a candidate is written from; `number` counts those of its persona."""

    persona: str
    round: int
    number: int
    seed: int


class QueryWriter:
    """Writes and scores candidates; what it needs to know of the personas is read from the model
    when the first chunk is asked for."""

    def __init__(self, run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                 personas: Sequence[Persona]):
        self.run, self.net, self.tokenizer = run, net, tokenizer
        self.stop_ids = stop_tokens(net, tokenizer) | ({tokenizer.end_of_user_id} - {None})
        if not self.stop_ids:
            raise InputError(f"{tokenizer.folder}: no end-of-turn token, so no query would ever "
                             "end")
        self.texts = {p.name: p.text for p in personas}
        self.turns = {p.name: tokenizer.open_user_turn(p.text) for p in personas}
        self.openings: dict[str, list[str]] = {}
        self.rivals: dict[str, list[str]] = {}

    def write(self, drafts: Sequence[Draft]) -> tuple[list[Candidate], dict]:
        """The candidates of a chunk, and what they cost."""
        if not self.openings:
            self.read_openings()
        candidates, written = self.continue_as_user(drafts)
        cleaned = {}
        for at, c in enumerate(candidates):
            text = clean_query(c.text, self.texts[c.persona]) if c.complete else None
            if text:
                cleaned[at] = c.persona, text
        suited, scored = self.find_suited(list(cleaned.values()))
        for at, name in zip(cleaned, suited):
            candidates[at] = replace(candidates[at], suits=name)
        return candidates, add_costs([written, scored]) | {"scoring_flops": scored["flops"]}

    def find_suited(self, asked: Sequence[tuple[str, str]]) -> tuple[list[str], dict]:
        """For each (persona, query) the persona itself if the query is likelier under it by LEAD
        than under every rival, otherwise the first rival that comes within LEAD; and the cost."""
        own, cost = self.score(asked)
        costs, suited = [cost], [persona for persona, _ in asked]
        for place in range(min(RIVALS, len(self.turns) - 1)):
            left = [i for i, (persona, _) in enumerate(asked) if suited[i] == persona]
            rivals = [(self.rivals[asked[i][0]][place], asked[i][1]) for i in left]
            scores, cost = self.score(rivals)
            costs.append(cost)
            for i, (rival, _), score in zip(left, rivals, scores):
                if own[i] - score < LEAD:
                    suited[i] = rival
        return suited, add_costs(costs)

    def score(self, asked: Sequence[tuple[str, str]]) -> tuple[list[float], dict]:
        """log P(query | the persona's opened user turn) of (persona, query) pairs."""
        return log_likelihoods(self.net, [
            (self.turns[persona], self.tokenizer.encode_turn("user", query, system=True))
            for persona, query in asked])

    def read_openings(self) -> None:
        """Which openings suit which persona, and which personas are its rivals."""
        begun, names = time.perf_counter(), list(self.turns)
        likelihoods, cost = opening_likelihoods(self.net, self.tokenizer, list(self.turns.values()))
        chosen = assign_openings(likelihoods)
        for name, openings, rivals in zip(names, chosen, choose_rivals(likelihoods, chosen)):
            self.openings[name] = [OPENINGS[o] for o in openings]
            self.rivals[name] = [names[j] for j in rivals]
        if "openings" not in self.run.latest():
            self.run.record("openings", 0, **cost, scoring_flops=cost["flops"],
                            seconds=round(time.perf_counter() - begun, 3))

    def continue_as_user(self, drafts: Sequence[Draft]) -> tuple[list[Candidate], dict]:
        """Sample each draft's message, an opening and how a user goes on; and what it cost."""
        openings, requests = [], []
        for draft in drafts:
            kind, words = opening(draft.number, self.openings[draft.persona])
            first = self.tokenizer.encode_turn("user", words, system=True)
            turn = self.turns[draft.persona]
            openings.append((kind, first))
            # The turn's last id stays: after an empty opening there must be one to read.
            requests.append(Request([*turn, *first], draft.seed, prefix=len(turn) - 1))
        engine = Engine(self.net, Sampling(**QUERY_SAMPLING), self.stop_ids, SLOTS)
        outputs = sorted(engine.run(requests, bar="sampling"), key=lambda out: out.index)
        candidates = []
        for draft, (kind, first), out in zip(drafts, openings, outputs):
            text = self.tokenizer.decode([*first, *out.ids])
            complete = out.stop == "eos"
            candidates.append(Candidate(draft.persona, draft.round, kind, text, complete))
        return candidates, cost_of(self.net, len(requests), engine.prompt_tokens, engine.new_tokens)


def opening_likelihoods(net: Transformer, tokenizer: Tokenizer,
                        turns: Sequence[list[int]]) -> tuple[Tensor, dict]:
    """log P(opening | opened user turn) of the K personas and of a conversation without one,
    [K + 1, O], and what it cost."""
    begun = [tokenizer.encode_turn("user", words, system=True) for words in OPENINGS]
    alone = [tokenizer.encode_turn("user", words) for words in OPENINGS]
    asked = [(ids, words) for ids in turns for words in begun]
    asked += [(tokenizer.open_user_turn(None), words) for words in alone]
    scores, cost = log_likelihoods(net, asked)
    return torch.tensor(scores).view(len(turns) + 1, len(OPENINGS)), cost


def assign_openings(likelihoods: Tensor) -> list[list[int]]:
    """The openings that suit each persona, given [K + 1, O] log-probabilities.

    An opening goes to the persona that lifts it most: by its log-probability, centred over the
    contexts and over the openings. Each persona has at least its FEWEST_OPENINGS best.
    """
    lift = (likelihoods - likelihoods.mean(0))[:-1]
    lift = lift - lift.mean(1, keepdim=True)
    best = lift.argmax(0).tolist()
    chosen = []
    for k, row in enumerate(lift):
        order = row.argsort(descending=True, stable=True).tolist()
        mine = [o for o in order if best[o] == k][:MOST_OPENINGS]
        others = [o for o in order if o not in mine]
        chosen.append(mine + others[:max(FEWEST_OPENINGS - len(mine), 0)])
    return chosen


def choose_rivals(likelihoods: Tensor, chosen: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each persona the RIVALS others after which its own openings are likeliest. How many, and
    why with a lead: docs/results.md, "Queries"."""
    rivals = []
    for k, openings in enumerate(chosen):
        strength = likelihoods[:-1, openings].mean(1)
        order = strength.argsort(descending=True, stable=True).tolist()
        rivals.append([j for j in order if j != k][:RIVALS])
    return rivals


def longest_opening(tokenizer: Tokenizer) -> int:
    """Tokens of the longest opening."""
    return max(map(len, map(tokenizer.encode, OPENINGS + LONG_OPENINGS + CONTRAST_OPENINGS)))


def opening(number: int, own: Sequence[str]) -> tuple[str, str]:
    """The kind and the opening words of a persona's candidate `number`."""
    turn, place = divmod(number, len(KINDS))
    kind = KINDS[place]
    if kind == "own":
        before = turn * KINDS.count("own") + KINDS[:place].count("own")
        return kind, own[before % len(own)]
    words = {"plain": ("",), "long": LONG_OPENINGS, "contrast": CONTRAST_OPENINGS}[kind]
    return kind, words[turn % len(words)]


def log_likelihoods(net: Transformer, asked: Sequence[tuple]) -> tuple[list[float], dict]:
    """log P(ids | ids before them) of (ids before, ids) pairs, and what it cost."""
    prompts, targets = [before for before, _ in asked], [ids for _, ids in asked]
    shared = [len(before) - 1 for before in prompts]
    logs, read = token_log_probabilities(net, prompts, targets, shared, "scoring")
    cost = cost_of(net, len(prompts), read, 0, sum(map(len, targets)))
    return [float(values.sum()) for values in logs], cost


def keep_queries(candidates: Sequence[Candidate], personas: Sequence[Persona],
                 wanted: int) -> list[Query]:
    """The pure pass of stage 1: keep the first `wanted` well-formed candidates of each persona that
    suit it best and are no near-duplicate of one kept before, across personas."""
    kept: list[Query] = []
    seen: list[set[str]] = []
    for persona in personas:
        index = 0
        for candidate in candidates:
            if index == wanted:
                break
            if candidate.persona != persona.name or candidate.suits != persona.name:
                continue
            text = clean_query(candidate.text, persona.text) if candidate.complete else None
            words = set(words_of(text or ""))
            if not text or any(near_duplicates(words, other) for other in seen):
                continue
            seen.append(words)
            kept.append(Query(persona.name, index, text))
            index += 1
    return kept


def measure_queries(net: Transformer, tokenizer: Tokenizer, personas: Sequence[Persona],
                    queries: Sequence[Query], candidates: Sequence[Candidate]) -> dict:
    """How good stage 1 was: counts of the candidates, and of the kept queries.

    `identifiable` is asked in words that stage 1 never used: is P(query | "write a message to this
    expert") highest for its own expert, of all? Chance is one in the number of personas. Of many
    queries, MEASURED evenly spaced ones are asked about.
    """
    begun = time.perf_counter()
    prompts = [conversation(IDENTIFY_PROMPT.format(persona=p.text)) for p in personas]
    contexts = [tokenizer.render(prompt, thinking=False) for prompt in prompts]
    some = queries[::math.ceil(len(queries) / MEASURED)]
    written = [tokenizer.encode_turn("assistant", q.query) for q in some]
    scores, cost = log_likelihoods(net, [(ids, query) for query in written for ids in contexts])
    guesses = torch.tensor(scores).view(len(some), len(contexts)).argmax(1).tolist()
    hits = sum(personas[guess].name == q.persona for guess, q in zip(guesses, some))
    return {"candidates": len(candidates), "complete": sum(c.complete for c in candidates),
            "well_formed": sum(c.suits is not None for c in candidates),
            "fits_its_persona": sum(c.suits == c.persona for c in candidates),
            "kept": len(queries), "measured": len(some), "identifiable": hits,
            "interval": interval(hits, len(some)), "chance": 1 / len(personas), **cost,
            "scoring_flops": cost["flops"], "seconds": round(time.perf_counter() - begun, 3),
            "peak_memory": peak_memory()}


# --------------------------------------------------------------------------------------------------
# Stages 2 and 3: two answers, and which of them is better


def write_answers(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: Sequence[Persona], queries: Sequence[Query], max_new_tokens: int,
                  seed: int) -> list[Pair]:
    """Stage 2: y_0 ~ P(.|x) and y_c ~ P(.|c, x) for every query, base weights both times.

    All 64 answers of a chunk share the engine's slots; each system prompt is read once a chunk.
    """
    texts = {p.name: p.text for p in personas}
    sampling = Sampling(max_new_tokens, ANSWER_TEMPERATURE)
    check_order(run.rows("answers.jsonl", Pair), queries, run.path / "answers.jsonl")
    for chunk in run.todo("answers", "answers.jsonl", Pair, split_chunks(queries)):
        asked, seeds = [], []
        for q in chunk:
            for kind, context in (("base", ""), ("expert", texts[q.persona])):
                asked.append(conversation(q.query, context))
                seeds.append(derive_seed(seed, kind, q.persona, q.index))
        answers, cost = sample_answers(net, tokenizer, asked, seeds, sampling, bar="sampling")
        pairs = []
        for q, base, expert in zip(chunk, answers[::2], answers[1::2]):
            pairs.append(Pair(q.persona, q.index, q.query, base.text, expert.text, base.ids,
                              expert.ids, base.stop, expert.stop))
        run.commit(pairs, cost)
    return run.rows("answers.jsonl", Pair)


def check_order(rows: Sequence[Pair | Verdict], asked: Sequence[Query | Pair], path: Path) -> None:
    """InputError unless the rows of a stage file, which may have been edited, stand in the order
    of the rows that they were made from."""
    for number, row in enumerate(rows, 1):
        due = asked[number - 1] if number <= len(asked) else None
        if due is None or (row.persona, row.index) != (due.persona, due.index):
            place = f"of {due.persona} {due.index}" if due else "of none, as there is no query left"
            raise InputError(f"{path}, line {number}: {row.persona} {row.index} in the place "
                             f"{place}; rows may be edited here, but only queries.jsonl says which "
                             "there are and in what order")


def write_verdicts(run: RunFolder, judge: Judge, personas: Sequence[Persona],
                   pairs: Sequence[Pair]) -> list[Verdict]:
    """Stage 3: t(x) = 1 where the persona's answer wins twice; everything else is t(x) = 0."""
    texts = {p.name: p.text for p in personas}
    for chunk in run.todo("verdicts", "verdicts.jsonl", Verdict, split_chunks(pairs)):
        results, cost = judge.compare([
            Comparison(p.query, texts[p.persona], p.expert, p.base,
                       p.expert_stop == p.base_stop == "eos", p.persona) for p in chunk])
        verdicts = []
        for p, (winner, evidence) in zip(chunk, results):
            verdicts.append(Verdict(p.persona, p.index, winner, int(winner == "expert"),
                                    judge.name, evidence))
        run.commit(verdicts, cost)
    return run.rows("verdicts.jsonl", Verdict)


def won_pairs(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> list[Pair]:
    """The distill set: the answer pairs of queries with t(x) = 1."""
    return [pair for pair, verdict in zip(pairs, verdicts) if verdict.target]


def hold_out(verdicts: Sequence[Verdict], seed: int) -> set[tuple[str, int]]:
    """The (persona, index) pairs that stage 5 is not fitted on: a fifth of each class, at least one
    where there are two, picked by a hash of their names."""
    held = set()
    for target in (0, 1):
        keys = [(v.persona, v.index) for v in verdicts if v.target == target]
        keys.sort(key=lambda key: derive_seed(seed, "split", *key))
        count = round(len(keys) / HELD_OUT) or int(len(keys) > 1)
        held.update(keys[:count])
    return held
