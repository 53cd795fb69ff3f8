"""Stages 2 and 3: the model answers its queries with and without a persona, and judges itself.

Every stage is data on disk: one JSONL file, one row a sample, extended by whole chunks and replaced
atomically, so a run killed at any moment continues to the same files. A row's random draws depend
on its own name (persona, index) and a chunk's batching on nothing but the chunk.

1. `queries.write_queries`: for each persona, what a user would type to this expert.
2. `write_answers`: two answers a query, y_0 ~ P(.|x) and y_c ~ P(.|c, x).
3. `run_verdicts`: does the persona's answer win? t(x) = 1 only if it wins under both orders or
   both wordings of the judge's question. Which judge can be trusted is tested first (judge.py).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from generate import sample_answers
from judge import Comparison, Judge, judge_of_run
from model import Transformer, load
from queries import Query
from sampling import Sampling, derive_seed
from support.distributed import main_first
from support.hub import InputError, resolve
from support.messages import conversation
from support.runs import RunFolder, split_chunks
from tokenizer import Tokenizer

ANSWER_TEMPERATURE = 0.7
HOLD_OUT_EVERY = 5  # one query in so many is held out from stage 5


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

    def __post_init__(self):
        if self.target not in (0, 1):
            raise ValueError(f"target is {self.target}, not 0 or 1")


def write_answers(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: dict[str, str], queries: Sequence[Query], max_new_tokens: int,
                  seed: int) -> list[Pair]:
    """Stage 2: y_0 ~ P(.|x) and y_c ~ P(.|c, x) for every query, base weights both times.

    A chunk has two answers for each of the engine's slots; each system prompt is read once a chunk.
    """
    sampling = Sampling(max_new_tokens, ANSWER_TEMPERATURE)
    check_order(run.rows("answers.jsonl", Pair), queries, run.path / "answers.jsonl")
    for chunk in run.todo("answers", "answers.jsonl", Pair, split_chunks(queries, net.sizes.slots)):
        asked, seeds = [], []
        for q in chunk:
            for kind, context in (("base", ""), ("expert", personas[q.persona])):
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
            place = f"of {due.persona} {due.index}" if due else "of none, past the last query"
            raise InputError(f"{path}, line {number}: {row.persona} {row.index} in the place "
                             f"{place}; rows may be edited here, but only queries.jsonl says which "
                             "there are and in what order")


def run_verdicts(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                 personas: dict[str, str], pairs: Sequence[Pair],
                 args: argparse.Namespace) -> list[Verdict]:
    """Stage 3: test the judge, then let it judge; a --judge-model is loaded only for that."""
    done = run.rows("verdicts.jsonl", Verdict)
    check_order(done, pairs, run.path / "verdicts.jsonl")
    if len(done) == len(pairs) and "judge" in run.latest():
        return done
    judging = net, tokenizer
    if args.judge_model:
        folder = resolve(args.judge_model)
        judging = load(folder, net.device, net.dtype), Tokenizer(folder, tokenizer.now)
    with main_first():
        judge = judge_of_run(run, net, tokenizer, judging, pairs, args)
    return write_verdicts(run, judge, personas, pairs)


def write_verdicts(run: RunFolder, judge: Judge, personas: dict[str, str],
                   pairs: Sequence[Pair]) -> list[Verdict]:
    """Stage 3: t(x) = 1 where the judge says "expert" (a model has to say so in both orders, or
    under both wordings); everything else is t(x) = 0."""
    for chunk in run.todo("verdicts", "verdicts.jsonl", Verdict, split_chunks(pairs)):
        asked, verdicts = [], []
        for p in chunk:
            ended = p.expert_stop == p.base_stop == "eos"
            asked.append(Comparison(p.query, personas[p.persona], p.expert, p.base, ended,
                                    p.persona))
        results, cost = judge.compare(asked)
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
    of a class of two or more, picked by a hash of their names."""
    held = set()
    for target in (0, 1):
        keys = [(v.persona, v.index) for v in verdicts if v.target == target]
        keys.sort(key=lambda key: derive_seed(seed, "split", *key))
        count = round(len(keys) / HOLD_OUT_EVERY) or int(len(keys) > 1)
        held.update(keys[:count])
    return held
