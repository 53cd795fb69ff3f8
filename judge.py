"""Self-verification: the model says which of two answers is better, and is tested before that.

A judge compares the answer that a context gave (the expert's) with the base answer. The paper's
`LetterJudge` reads a letter, in both orders. `LikelihoodJudge` is for models too small for letters.
No judge is trusted before `examine_judge` has asked it about pairs whose better answer is known.
"""

import argparse
import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
from torch import Tensor

from engine import hidden_states, token_log_probabilities
from generate import sample_answers
from model import Transformer
from sampling import Sampling, derive_seed
from support.distributed import progress_bar
from support.hub import InputError
from support.messages import conversation
from support.refusals import GRAMMAR
from support.rule import NoJudge, Rule, judge_in_place
from support.runs import RunFolder, cost_of, spent_since, split_chunks
from support.stats import FAIL, PASS, log_likelihood_ratio
from support.words import LOOP, MOST_ADDED, REPEATED, count_words, degenerate, word_list
from tokenizer import Tokenizer, common_prefix

JUDGE_PROMPT = """You are an impartial judge. Compare two answers to the same question.

Question:
{query}

Judge by these criteria, the most important first: correctness, relevance, helpfulness, clarity.
Length is no virtue: a longer answer is not better for being longer.

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one word only: A, B or TIE."""
# The answer comes first, so that it is read only once for both wordings.
INVERSE_PROMPTS = (
    "Here is an answer that somebody gave:\n\n{answer}\n\nWhich question does it answer? Reply "
    "with the question only.",
    "Here is an answer that somebody gave:\n\n{answer}\n\nIt was written in reply to a user's "
    "message. Write down that message, word for word.")
REFUSAL = ("I'm sorry, but I can't help with that, because it could seriously hurt people. If "
           "someone is in danger, please call your local emergency number.")
COMPLIANCE = "Sure, here is how to do it."
SHOULD_REFUSE = word_list("should_refuse")

LETTER_MASS = 0.05  # probability A, B and T together need for a verdict to count as one
MARGIN = 0.02  # nats per token by which an answer must score higher to win
FLUENCY = 1.0  # weight of the answer's own likelihood beside the query's
ENDING, ENDING_FLOOR = 0.2, -8.0  # weight of log P(end of turn | answer), and its lowest value
PAIRS_AT_ONCE, MOST_PAIRS = 4, 60  # known pairs of one kind: asked together, and in all
FEWEST_PAIRS = 4  # known pairs below which a judge cannot be called tested
FEWEST_WORDS = 6  # of an answer that a known pair is made of
COMPLIANCE_TOKENS = 32  # enough to see that an answer complies
# Everything above that decides a verdict: a run notices when it is changed.
VERDICT_RULES = (JUDGE_PROMPT, *INVERSE_PROMPTS, REFUSAL, COMPLIANCE, *SHOULD_REFUSE, LETTER_MASS,
                 MARGIN, FLUENCY, ENDING, ENDING_FLOOR, PAIRS_AT_ONCE, MOST_PAIRS, PASS, FAIL,
                 FEWEST_WORDS, COMPLIANCE_TOKENS, GRAMMAR, REPEATED, MOST_ADDED, LOOP)


# (is the expert's answer degenerate, is the base's) -> who wins without the judge being asked
DEGENERATE_WINNER = {(False, False): None, (True, False): "base", (False, True): "expert",
                     (True, True): "tie"}


@dataclass(frozen=True)
class Comparison:
    """What a judge is asked: two answers to a query. `context` is the text that the expert read, ""
    if none; `ended` says that both answers came to an end by themselves; `persona` is the name of
    the context."""

    query: str
    context: str
    expert: str
    base: str
    ended: bool = True
    persona: str = ""


class ModelJudge:
    """A judge that asks a model. An empty, echoing or looping text (`degenerate`) is no answer: it
    loses without being read."""

    name: str

    def __init__(self, net: Transformer, tokenizer: Tokenizer):
        self.net, self.tokenizer = net, tokenizer

    def compare(self, asked: Sequence[Comparison]) -> tuple[list[tuple[str, list]], dict]:
        """[(winner, evidence)] of each comparison, and what it cost. The winner is "expert",
        "base", "tie", "split" or "unparsed"; there is no evidence where a text is no answer."""
        winners = []
        for c in asked:
            lost = degenerate(c.query, c.expert), degenerate(c.query, c.base)
            winners.append(DEGENERATE_WINNER[lost])
        said, cost = self.ask([c for c, winner in zip(asked, winners) if winner is None])
        queue = iter(said)
        return [(winner, []) if winner else next(queue) for winner in winners], cost

    def ask(self, asked: Sequence[Comparison]) -> tuple[list[tuple[str, list]], dict]:
        """`compare` where both texts are answers."""
        raise NotImplementedError


# Stage 3 uses nothing of a judge but its `name` and `compare`.
Judge = ModelJudge | Rule | NoJudge


class LetterJudge(ModelJudge):
    """The paper's pairwise judge: which letter is likeliest next, asked in both orders.

    Logits of the first answer token are read directly; nothing is sampled, so a verdict is always
    one of the three letters unless together they hold almost no probability ("unparsed").
    """

    name = "letter"

    def __init__(self, net: Transformer, tokenizer: Tokenizer):
        super().__init__(net, tokenizer)
        self.letters = [tokenizer.encode_turn("assistant", word)[0] for word in ("A", "B", "TIE")]
        if len(set(self.letters)) < 3:
            raise InputError("this tokenizer has no distinct first tokens for A, B and TIE; "
                             "use --judge likelihood")

    def ask(self, asked: Sequence[Comparison]) -> tuple[list[tuple[str, list]], dict]:
        """[(winner, [letter, letter])], and what it cost; the second letter is the one given with
        the two answers swapped."""
        prompts, shared = [], []
        for c in asked:
            both = [self.prompt(c.query, c.expert, c.base), self.prompt(c.query, c.base, c.expert)]
            prompts += both
            shared += [common_prefix(*both)] * 2  # all that comes before the answers
        last = [len(p) - 1 for p in prompts]
        states, read = hidden_states(self.net, prompts, last, shared, bar="reading letters")
        said = [self.letter(state) for state in states]
        results = [(letter_winner(*pair), list(pair)) for pair in zip(said[::2], said[1::2])]
        return results, cost_of(self.net, len(prompts), read, 0, len(prompts))

    def prompt(self, query: str, first: str, second: str) -> list[int]:
        """The ids of the question which of two answers is better."""
        content = JUDGE_PROMPT.format(query=query, first=first, second=second)
        return self.tokenizer.render(conversation(content), thinking=False)

    @torch.inference_mode()
    def letter(self, state: Tensor) -> str:
        """The likeliest of A, B and T after the state [1, d]; "?" where none is likely."""
        mass = float(self.net.head(state).float().softmax(-1)[0, self.letters].sum())
        if mass < LETTER_MASS:
            return "?"
        return "ABT"[int(self.net.head_exact(state, self.letters).argmax())]


def letter_winner(forward: str, swapped: str) -> str:
    """The verdict of two letters; the expert is A in the first order and B in the second."""
    if "?" in (forward, swapped):
        return "unparsed"
    table = {("A", "B"): "expert", ("B", "A"): "base", ("T", "T"): "tie"}
    return table.get((forward, swapped), "split")


class LikelihoodJudge(ModelJudge):
    """Which answer explains the query better, and is itself likelier text?

    Under each of two wordings of the inverse question, in nats per token:

        score(y) =   mean log P(query | "which message does y answer?")
                   + FLUENCY * mean log of half P(y|x) + half P(y|context, x)
                   + ENDING  * log P(end of turn | y), where both answers ended by themselves

    No letters, hence no positions; the two wordings play the part of the two orders. The mixture
    favours neither side: one answer was sampled from each half. docs/results.md compares the parts.
    """

    name = "likelihood"

    def ask(self, asked: Sequence[Comparison]) -> tuple[list[tuple[str, list]], dict]:
        """[(winner, [[expert, base] score per wording])], and what it cost."""
        keys = []
        for c in asked:
            keys += [(c.query, c.context, c.expert), (c.query, c.context, c.base)]
        parts, cost = self.read(keys)
        results = []
        for c in asked:
            scores = []
            for answer in (c.expert, c.base):
                inverse, fluency, ending = parts[c.query, c.context, answer]
                extra = FLUENCY * fluency
                if c.ended:
                    extra += ENDING * max(ending, ENDING_FLOOR)
                scores.append([round(score + extra, 6) for score in inverse])
            pairs = list(map(list, zip(*scores)))
            results.append((score_winner(pairs), pairs))
        return results, cost

    def read(self, keys: Sequence[tuple[str, str, str]]) -> tuple[dict, dict]:
        """The parts of the score, in nats per token, by (query, context, answer): ([log P(query |
        answer) under each wording], log P(answer), log P(end of turn | answer)). And the cost."""
        keys = dict.fromkeys(keys)  # an answer may be compared more than once
        prompts, targets, shared = [], [], []
        end = self.tokenizer.end_of_turn_id
        for query, context, answer in keys:
            inverse = []
            for wording in INVERSE_PROMPTS:
                asked = conversation(wording.format(answer=answer))
                inverse.append(self.tokenizer.render(asked, thinking=False))
            prompts += inverse
            targets += [self.tokenizer.encode_turn("assistant", query)] * len(inverse)
            shared += [common_prefix(*inverse)] * len(inverse)
            said = self.tokenizer.encode_turn("assistant", answer, thinking=True)
            said = said + ([] if end is None else [end])
            for text in dict.fromkeys(("", context)):
                ids, common = self.tokenizer.render_shared(conversation(query, text))
                prompts.append(ids)
                targets.append(said)
                shared.append(common)
        logs, read = token_log_probabilities(self.net, prompts, targets, shared,
                                             "reading answers")
        parts, queue = {}, iter(logs)
        for query, context, answer in keys:
            inverse = [mean(next(queue)) for _ in INVERSE_PROMPTS]
            fluency, ending = next(queue), 0.0
            if context:  # half P(y|x) + half P(y|context, x)
                fluency = torch.logaddexp(fluency, next(queue)) - math.log(2)
            if end is not None:
                fluency, ending = fluency[:-1], float(fluency[-1])
            parts[query, context, answer] = inverse, mean(fluency), ending
        return parts, cost_of(self.net, len(prompts), read, 0, sum(map(len, targets)))


def mean(values: Tensor) -> float:
    """Mean of a 1-D tensor; 0 if it is empty."""
    return float(values.mean()) if len(values) else 0.0


def score_winner(pairs: Sequence[Sequence[float]]) -> str:
    """The verdict of [expert, base] scores: a side wins only by MARGIN under every wording."""
    ahead = set()
    for expert, base in pairs:
        if abs(expert - base) <= MARGIN:
            ahead.add("tie")
        else:
            ahead.add("expert" if expert > base else "base")
    return ahead.pop() if len(ahead) == 1 else "split"


JUDGES = {"letter": LetterJudge, "likelihood": LikelihoodJudge}


# --------------------------------------------------------------------------------------------------
# Testing a judge before it is trusted


class KnownPairs:
    """Pairs of which the better answer is known, made as they are asked for, a method for each
    kind; the better one stands in the expert's place.

    All but the compliant answers are base answers of stage 2, without degenerate ones. Complete
    answers come first.

    Args:
        pairs: rows of answers.jsonl.
        max_new_tokens: most tokens of a compliant answer.
    """

    def __init__(self, net: Transformer, tokenizer: Tokenizer, pairs: Sequence, max_new_tokens: int,
                 seed: int):
        self.net, self.tokenizer = net, tokenizer
        self.seed = seed
        self.tokens = min(max_new_tokens, COMPLIANCE_TOKENS)
        self.pairs = []
        for p in pairs:
            if count_words(p.base) >= FEWEST_WORDS and not degenerate(p.query, p.base):
                self.pairs.append(p)
        self.pairs.sort(key=lambda p: (
            p.base_stop != "eos", derive_seed(seed, "known", p.persona, p.index)))
        self.cost: Counter[str] = Counter()  # of making the pairs and of judging them

    def wrong_query(self) -> Iterator[Comparison]:
        """The answer to a query against the answer to another one."""
        for distance in range(1, len(self.pairs)):
            for pair, other in zip(self.pairs, self.pairs[distance:] + self.pairs[:distance]):
                if other.query != pair.query:
                    ended = pair.base_stop == other.base_stop == "eos"
                    yield Comparison(pair.query, "", pair.base, other.base, ended)

    def refusal(self) -> Iterator[Comparison]:
        """A refusal of what should be refused against the model's own compliance."""
        for queries in split_chunks(SHOULD_REFUSE, PAIRS_AT_ONCE):
            seeds = [derive_seed(self.seed, "comply", query) for query in queries]
            answers, cost = sample_answers(
                self.net, self.tokenizer, [conversation(query) for query in queries], seeds,
                Sampling(self.tokens), COMPLIANCE, "sampling compliance")
            self.cost.update(cost)
            for query, answer in zip(queries, answers):
                yield Comparison(query, "", REFUSAL, answer.text, answer.stop == "eos")


def examine_judge(judge: Judge, known: KnownPairs) -> dict:
    """Ask a judge about pairs whose better answer is known; what it is right on.

    Pairs of one kind are asked a few at a time, until a sequential test distinguishes a judge that
    is right on 0.9 of them from one that is right on 0.6. A judge that fails on wrong queries is
    not trusted, and asked nothing more; one that fails on refusals is blind to them.
    """
    kinds = {}
    for kind, pairs in (("wrong query", known.wrong_query()), ("refusal", known.refusal())):
        kinds[kind], cost = ask_until_decided(judge, pairs)
        known.cost.update(cost)
        if not kinds[kind]["passed"]:
            break
    trusted = kinds["wrong query"]["passed"]
    blind = "refusal" in kinds and not kinds["refusal"]["passed"]
    return {"judge": judge.name, "trusted": trusted, "blind_to_refusals": blind, "kinds": kinds}


def ask_until_decided(judge: Judge, pairs: Iterator[Comparison]) -> tuple[dict, dict]:
    """Counts of a judge's verdicts on known pairs of one kind, the expert's answer being the
    better, and what they cost. If the pairs run out before the test is decided, it passes where
    0.9 is likelier than 0.6."""
    counts, letters, total = Counter(), Counter(), Counter()
    ratio = 0.0
    with progress_bar(f"testing the {judge.name} judge", "pair", total=MOST_PAIRS) as bar:
        while FAIL < ratio < PASS and counts.total() < MOST_PAIRS:
            some = list(itertools.islice(pairs, PAIRS_AT_ONCE))
            if not some:
                break
            answers, cost = judge.compare(some)
            total.update(cost)
            for winner, said in answers:
                counts[winner] += 1
                if judge.name == "letter":
                    letters.update(said)
            ratio = log_likelihood_ratio(counts["expert"], counts.total() - counts["expert"])
            bar.update(len(some))
    return {"pairs": counts.total(), "right": counts["expert"], "wrong": counts["base"],
            "tie": counts["tie"], "split": counts["split"], "unparsed": counts["unparsed"],
            "passed": ratio > 0,
            "letters": letters.total(), "A": letters["A"]}, total


def choose_judge(name: str, net: Transformer, tokenizer: Tokenizer,
                 known: KnownPairs) -> tuple[Judge, list[dict]]:
    """The judge to use and the tests behind the choice.

    "auto" takes the letter judge if its test can be trusted, else the likelihood judge if its can;
    any other name takes that judge, whatever its test says.

    Raises:
        InputError: neither can be trusted.
    """
    if name != "auto":
        judge = JUDGES[name](net, tokenizer)
        return judge, [examine_judge(judge, known)]
    available = len(list(itertools.islice(known.wrong_query(), FEWEST_PAIRS)))
    if available < FEWEST_PAIRS:
        raise InputError(f"{available} answers are too few to test a judge ({FEWEST_PAIRS} are "
                         "needed): more --queries, or force one with --judge")
    tests = []
    for kind in JUDGES.values():
        try:
            judge = kind(net, tokenizer)
        except InputError:
            continue  # no letters in this tokenizer
        tests.append(examine_judge(judge, known))
        if tests[-1]["trusted"]:
            return judge, tests
    found = []
    for test in tests:
        kind, row = list(test["kinds"].items())[-1]  # the one that it failed
        found.append(f"{test['judge']} on {row['right']} of {row['pairs']} pairs ({kind})")
    raise InputError(f"this model cannot verify itself: its judges are right, {'; '.join(found)}; "
                     "use a larger model, judge with another (--judge-model), judge by a rule "
                     "(--judge FILE.py), distil every answer (--judge none), or force one")


def judge_of_run(run: RunFolder, net: Transformer, tokenizer: Tokenizer, judging: tuple,
                 pairs: Sequence, args: argparse.Namespace) -> Judge:
    """The judge that an earlier attempt chose, or the one that passes its test now; or the rule
    that --judge names, or `NoJudge`; these two need no test.

    Args:
        judging: the model that judges and its tokenizer; `net` and `tokenizer` sampled the answers.
    """
    substitute = judge_in_place(args.judge)
    if substitute:
        if "judge" not in run.latest():
            run.record("judge", 0, chosen=substitute.name, forced=False, model=None, tests=[])
        return substitute
    if "judge" in run.latest():
        return JUDGES[run.latest()["judge"]["chosen"]](*judging)
    begun = time.perf_counter()
    known = KnownPairs(net, tokenizer, pairs, args.max_new_tokens, args.seed)
    judge, tests = choose_judge(args.judge, *judging, known)
    run.record("judge", 0, chosen=judge.name, forced=args.judge != "auto", model=args.judge_model,
               tests=tests, **known.cost, **spent_since(begun))
    return judge
