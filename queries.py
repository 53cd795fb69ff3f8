"""Stage 1: the model writes the queries, in the style that suits its size.

A query is what a user would send to this expert. There are two styles (`--query-style`):

- instruct, the paper's: the model is told what the expert is and asked to write one message;
- continue: the model reads the persona as its system message and goes on as the USER (Magpie, arXiv
  2406.08464), where there is no instruction that a small model could echo. Half of these messages
  are given their first words as well (support/data/openings.txt), which help a small model, where
  the persona is in their language.

`auto` tries both on two dozen candidates and takes the one that gives more (`try_styles`).
Nothing in here knows words of a language, beside the prompts and that file.
"""

import itertools
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import PrefixReader, Request, hidden_states, token_log_probabilities
from generate import Completion, sample_requests, stop_tokens
from model import Transformer
from sampling import Sampling, derive_seed
from support.distributed import main_first
from support.hub import InputError
from support.messages import conversation
from support.personas import is_contrast
from support.runs import RunFolder, cost_of, spent_since, split_chunks
from support.words import (CUT_OFF, ECHO_WORDS, FEWEST_WORDS, MAX_WORDS, MIN_WORDS, NEAR_DUPLICATE,
                           QUOTES, SHARED, clean_query, near_duplicates, shares_language,
                           word_list, words_of)
from tokenizer import Tokenizer, common_prefix

# What --query-style may say, and the styles that are then tried; of equals the first is taken.
STYLES = {"auto": ("instruct", "continue"), "instruct": ("instruct",), "continue": ("continue",)}
CURATOR = "You are a dataset curator who writes realistic user queries."
INSTRUCTION = ("Here is the description of an expert:\n\n{persona}\n\n"
               "Write exactly one realistic question or task that a user would bring to this "
               "expert. {wish} Output only the user's words, in the language of the description.")
# What `instruct` asks for in turn, so that one persona's messages differ.
WISHES = ("It is short.", "It is long and detailed.", "It gives a task.",
          "It begins with the user's situation.", "It is from a beginner.", "It is urgent.",
          "It contains the text to work on.", "It is unusual.")
TEMPERATURE = {"instruct": 0.9, "continue": 0.8}
QUERY_TOKENS = 96  # the longest candidate
TRIAL, TRIAL_PERSONAS = 3, 4  # candidates of each style for each of so many personas
CHUNK_SLOTS = 3  # candidates for each of the engine's slots are done, and committed, together
OVERSAMPLE, FEWEST, ROUNDS = 2, 6, 6  # candidates per lacking query, and at least; rounds
MOST_OPENINGS, FEWEST_OPENINGS = 8, 2  # for each persona
RIVALS, LEAD = 3, 1.5  # others under which a query is scored; nats by which its own must lead
MEASURED = 36  # kept queries whose persona is guessed in `measure_queries`
IDENTIFY_PROMPT = ("This is how an expert is described:\n\n{persona}\n\n"
                   "Write one message that a user would send to this expert.")
NO_MESSAGE = "..."  # the user's message when a query is scored as the persona's own words
# How a user's message may begin: ONE list for all, so that no persona has a format of its own.
OPENINGS = word_list("openings")
# Everything above that decides a query: a run notices when it is changed.
QUERY_RULES = (STYLES, CURATOR, INSTRUCTION, WISHES, sorted(TEMPERATURE.items()), QUERY_TOKENS,
               TRIAL, TRIAL_PERSONAS, NO_MESSAGE, CHUNK_SLOTS, OVERSAMPLE, FEWEST, ROUNDS,
               MOST_OPENINGS, FEWEST_OPENINGS, RIVALS, LEAD, IDENTIFY_PROMPT, OPENINGS, MIN_WORDS,
               MAX_WORDS, ECHO_WORDS, NEAR_DUPLICATE, SHARED, FEWEST_WORDS, QUOTES, CUT_OFF)


@dataclass(frozen=True)
class Query:
    """Row of queries.jsonl."""

    persona: str
    index: int
    query: str


class Draft(NamedTuple):
    """What a candidate is written from; `number` counts those of its style and persona."""

    style: str
    persona: str
    number: int


@dataclass(frozen=True)
class Candidate:
    """Row of candidates.jsonl: a query as the model wrote it, before `keep_queries`.

    `text` includes the opening. `complete`: the model ended it by itself. `suits`: its own persona,
    or the first of the rivals that the cleaned query suits as well; None if it is no query.
    """

    persona: str
    style: str
    text: str
    complete: bool
    suits: str | None = None


def write_queries(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: dict[str, str], wanted: int, seed: int,
                  style: str = "auto") -> list[Query]:
    """Stage 1 (paper, section 3.1): `wanted` queries a persona, in the user's own voice.

    Candidates are written in rounds; before each, one deterministic pass over all that there are
    (`keep_queries`) says who still lacks queries. A choice of styles begins with their trial.

    Where queries.jsonl is there, it is used as it is, whoever wrote it.
    """
    if (run.path / "queries.jsonl").exists():
        return check_queries(run.rows("queries.jsonl", Query), personas, run.path)
    writer = QueryWriter(run, net, tokenizer, personas, style, seed)
    candidates: list[Candidate] = []
    if style == "auto":
        tried = trial_personas(personas)
        candidates = writer.extend(STYLES[style], dict.fromkeys(tried, TRIAL))
        style = try_styles(run, net, tokenizer, tried, candidates)
    for number in range(ROUNDS + 1):
        candidates = [c for c in candidates if c.style == style]
        queries = keep_queries(candidates, personas, wanted)
        kept, counts = Counter(q.persona for q in queries), {}
        for name in personas:
            if kept[name] < wanted:
                counts[name] = max(OVERSAMPLE * (wanted - kept[name]), FEWEST)
        if not counts or number == ROUNDS:
            break
        candidates = writer.extend([style], counts)
    if run.writes and queries:
        run.record("quality", 0, style=style,
                   **measure_queries(net, tokenizer, personas, queries, candidates))
        run.write("queries.jsonl", queries)
    return queries


def check_queries(queries: list[Query], personas: dict[str, str], folder: Path) -> list[Query]:
    """The rows of queries.jsonl, which may have been edited; InputError if they cannot be used."""
    seen = set()
    for number, q in enumerate(queries, 1):
        if q.persona not in personas or (q.persona, q.index) in seen or not q.query.strip():
            raise InputError(f"{folder / 'queries.jsonl'}, line {number}: an empty query, a "
                             "persona that is not in --personas, or an index that it has twice")
        seen.add((q.persona, q.index))
    return queries


def keep_queries(candidates: Sequence[Candidate], personas: dict[str, str],
                 wanted: int) -> list[Query]:
    """The deterministic pass of stage 1: keep the first `wanted` candidates of each persona that
    suit it best and are no near-duplicate of one kept before, across personas."""
    kept: list[Query] = []
    seen: list[set[str]] = []
    for name, persona in personas.items():
        index = 0
        for candidate in candidates:
            if index == wanted or candidate.persona != name or candidate.suits != name:
                continue
            text = query_of(candidate, persona)
            words = set(words_of(text or ""))
            if text and not any(near_duplicates(words, other) for other in seen):
                seen.append(words)
                kept.append(Query(name, index, text))
                index += 1
    return kept


def query_of(candidate: Candidate, persona: str) -> str | None:
    """The cleaned query of a candidate; None if it is none, whoever wrote it."""
    asked = [INSTRUCTION, *WISHES] if candidate.style == "instruct" else []
    return clean_query(candidate.text, persona, *asked) if candidate.complete else None


# --------------------------------------------------------------------------------------------------
# Writing and scoring candidates


class QueryWriter:
    """Writes and scores candidates; what it needs to know of the personas is read from the model
    when the first chunk is asked for."""

    def __init__(self, run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                 personas: dict[str, str], style: str, seed: int):
        self.run, self.net, self.tokenizer = run, net, tokenizer
        self.texts, self.style, self.seed = personas, style, seed
        self.reader = PrefixReader(net)  # the personas are read once for all comparisons
        # The ids before a user's message to each persona (None: to nobody), before an answer of its
        # own, and the paper's prompts with each wish.
        self.turns, self.headers, self.instructions = {None: tokenizer.open_user_turn(None)}, {}, {}
        for name, text in personas.items():
            self.turns[name] = tokenizer.open_user_turn(text)
            self.headers[name] = tokenizer.render(conversation(NO_MESSAGE, text), thinking=False)
            asked = [INSTRUCTION.format(persona=text, wish=wish) for wish in WISHES]
            self.instructions[name] = [
                tokenizer.render(conversation(one, CURATOR), thinking=False) for one in asked]
        self.openings: dict[str, list[str]] = {}
        self.rivals: dict[str, list[str]] = {}
        self.chunks: list[list[Draft]] = []  # all that were asked for
        self.numbers: defaultdict = defaultdict(itertools.count)  # of each style and persona
        self.cost: Counter[str] = Counter()  # of the work in hand

    def extend(self, styles: Sequence[str], counts: dict[str, int]) -> list[Candidate]:
        """Write so many more candidates for each persona, in each style; all that there are now."""
        for style in styles:
            drafts = []
            for name, count in counts.items():
                for _ in range(count):
                    drafts.append(Draft(style, name, next(self.numbers[style, name])))
            self.chunks += split_chunks(drafts, CHUNK_SLOTS * self.net.sizes.slots)
        for chunk in self.run.todo("queries", "candidates.jsonl", Candidate, self.chunks):
            self.run.commit(*self.write(chunk))
        # A continued run may find later rounds on disk; it has to decide as the first attempt did.
        asked = sum(map(len, self.chunks))
        return self.run.rows("candidates.jsonl", Candidate)[:asked]

    def write(self, drafts: Sequence[Draft]) -> tuple[list[Candidate], dict]:
        """The candidates of a chunk, which is of one style, and what they cost."""
        if not self.rivals:
            self.find_rivals_and_openings()
        asked, style = [self.request(draft) for draft in drafts], drafts[0].style
        written, cost = write_messages(self.net, self.tokenizer, asked, style, "sampling")
        self.cost, candidates, messages = cost, [], []
        for draft, message in zip(drafts, written):
            candidate = Candidate(draft.persona, style, message.text, message.stop == "eos")
            candidates.append(candidate)
            messages.append((draft.persona, query_of(candidate, self.texts[draft.persona])))
        suited = self.find_suited(messages)
        rows = [replace(c, suits=name) for c, name in zip(candidates, suited)]
        return rows, dict(self.cost)

    def request(self, draft: Draft) -> Request:
        """A draft's prompt, and how its message begins.

        "instruct": the instruction with the next wish. "continue": the opened turn of a user who
        talks to the persona, and every other time an opening.
        """
        name, number, seed = draft.persona, draft.number, derive_seed(self.seed, "query", *draft)
        if draft.style == "instruct":
            prompts = self.instructions[name]
            shared = min(common_prefix(prompts[0], other) for other in prompts[1:])
            return Request(prompts[number % len(WISHES)], seed, prefix=shared)
        words, own = "", self.openings[name]
        if own and number % 2 == 0:
            words = own[number // 2 % len(own)]
        turn = self.turns[name]
        begun = self.tokenizer.encode_turn("user", words, system=True)
        # The turn's last id stays: without an opening there must be one to read.
        return Request([*turn, *begun], seed, prefix=len(turn) - 1, begun=len(begun))

    def find_suited(self, asked: Sequence[tuple[str, str | None]]) -> list[str | None]:
        """For each (persona, query):

        - the persona itself, if the query is likelier under it by LEAD than under every rival;
        - else the first rival that comes within LEAD. (What people ask of no context in particular
          is what a contrast is for: a rival takes its query only by leading by LEAD.)
        - None, if there is no query, or if it is likelier as an answer of the persona's.

        Each test reads only what has passed those before it.
        """
        suited = [persona if query else None for persona, query in asked]
        passed = [i for i, name in enumerate(suited) if name]
        own = dict(zip(passed, self.score([asked[i] for i in passed])))
        for place in range(min(RIVALS, len(self.texts) - 1)):
            others = [(self.rivals[suited[i]][place], asked[i][1]) for i in passed]
            for i, (rival, _), score in zip(passed, others, self.score(others)):
                lead = -LEAD if is_contrast(suited[i]) else LEAD
                if own[i] - score < lead:
                    suited[i] = rival
            passed = [i for i in passed if suited[i] == asked[i][0]]
        for i, score in zip(passed, self.score([asked[i] for i in passed], "assistant")):
            if score >= own[i]:
                suited[i] = None
        return suited

    def score(self, asked: Sequence[tuple[str | None, str]], role: str = "user") -> list[float]:
        """log P(text | the persona) of (persona, text) pairs, as a user's message to it, or to
        nobody, or as an "assistant"'s answer of its own."""
        rows, shared = [], []
        for persona, text in asked:
            turn = self.turns[persona]
            before = turn if role == "user" else self.headers[persona]
            rows.append((before, self.tokenizer.encode_turn(role, text, persona is not None)))
            shared.append(common_prefix(turn, before))
        scores, cost = log_likelihoods(self.net, rows, shared, self.reader)
        self.cost.update(cost)
        return scores

    def find_rivals_and_openings(self) -> None:
        """Read every persona, which the reader keeps, and find out its rivals and openings; no
        openings for one in another language than theirs."""
        begun, names = time.perf_counter(), list(self.texts)
        turns = [self.turns[name] for name in names]
        ends = [len(turn) - 1 for turn in turns]
        states, read = hidden_states(self.net, turns, ends, ends, reader=self.reader)
        self.cost = cost_of(self.net, len(turns), read)
        for name, rivals in zip(names, most_alike(torch.cat(states).float())):
            self.rivals[name] = [names[k] for k in rivals]
        if "continue" in STYLES[self.style]:
            scores = self.score([(name, words) for name in (*names, None) for words in OPENINGS])
            chosen = assign_openings(torch.tensor(scores).view(-1, len(OPENINGS)))
            for name, own in zip(names, chosen):
                known = shares_language(self.texts[name], OPENINGS)
                self.openings[name] = [OPENINGS[o] for o in own] if known else []
        if "personas" not in self.run.latest():  # once in a run, however often it is continued
            self.run.record("personas", 0, **self.cost, **spent_since(begun))


def write_messages(net: Transformer, tokenizer: Tokenizer, asked: Sequence[Request], style: str,
                   bar: str) -> tuple[list[Completion], Counter[str]]:
    """Users' messages sampled in a style, and what they cost; InputError if nothing ends one."""
    stops = stop_tokens(net, tokenizer) | ({tokenizer.end_of_user_id} - {None})
    if not stops:
        raise InputError(f"{tokenizer.folder}: no end-of-turn token, so no query would ever end")
    sampling = Sampling(QUERY_TOKENS, TEMPERATURE[style])
    return sample_requests(net, tokenizer, asked, sampling, stops, bar)


def most_alike(states: Tensor) -> list[list[int]]:
    """For each persona its rivals, the RIVALS others after which users write most alike: by the
    cosine of the states [K, d] from which the user's message begins, less what all have in common.
    """
    unit = F.normalize(states - states.mean(0), dim=1)
    likeness = (unit @ unit.T).fill_diagonal_(-math.inf)  # [K, K]
    return likeness.topk(min(RIVALS, len(states) - 1), dim=1).indices.tolist()


def assign_openings(likelihoods: Tensor) -> list[list[int]]:
    """The openings that suit each of K personas, given the [K + 1, O] log-probabilities of each
    opening under it, and at last in a conversation without one.

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


def log_likelihoods(net: Transformer, asked: Sequence[tuple], shared: Sequence[int] | None = None,
                    reader: PrefixReader | None = None) -> tuple[list[float], dict]:
    """log P(ids | ids before them) of (ids before, ids) pairs, and what it cost; `shared` as in
    `hidden_states`, all but the last of the ids before by default."""
    prompts, targets = [before for before, _ in asked], [ids for _, ids in asked]
    shared = shared or [len(before) - 1 for before in prompts]
    logs, read = token_log_probabilities(net, prompts, targets, shared, "scoring", reader)
    cost = cost_of(net, len(prompts), read, 0, sum(map(len, targets)))
    return [float(values.sum()) for values in logs], cost


# --------------------------------------------------------------------------------------------------
# Which style, and how good it was


def trial_personas(personas: dict[str, str]) -> dict[str, str]:
    """At most TRIAL_PERSONAS of them, evenly spaced."""
    step = math.ceil(len(personas) / TRIAL_PERSONAS)
    return dict(list(personas.items())[::step])


def try_styles(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
               personas: dict[str, str], candidates: Sequence[Candidate]) -> str:
    """The style of which most candidates of the trial are identifiable queries, of equals the
    first in STYLES; recorded with its table."""
    with main_first():  # the others find it recorded
        if "style" not in run.latest():
            begun, queries, styles, tables = time.perf_counter(), [], [], {}
            for style in dict.fromkeys(c.style for c in candidates):
                mine = [c for c in candidates if c.style == style]
                # Rivals do not count here, only whether it is a query.
                asked = [replace(c, suits=c.persona if c.suits else None) for c in mine]
                distinct = keep_queries(asked, personas, len(mine))
                queries += distinct
                styles += [style] * len(distinct)
                tables[style] = {"candidates": len(mine), "distinct": len(distinct),
                                 "complete": sum(c.complete for c in mine)}
            hits, cost = identify(net, tokenizer, personas, queries)
            found = Counter(itertools.compress(styles, hits))
            for style, table in tables.items():
                table["identifiable"] = found[style]
            run.record("style", 0, chosen=max(tables, key=lambda style: found[style]),
                       styles=tables, chance=1 / len(personas), **cost, **spent_since(begun))
        return run.latest()["style"]["chosen"]


def identify(net: Transformer, tokenizer: Tokenizer, personas: dict[str, str],
             queries: Sequence[Query]) -> tuple[list[bool], dict]:
    """Whether each query is likeliest after the description of its own expert, of all that are
    given, in words that no style uses (IDENTIFY_PROMPT); and what it cost."""
    prompts = [conversation(IDENTIFY_PROMPT.format(persona=p)) for p in personas.values()]
    contexts = [tokenizer.render(prompt, thinking=False) for prompt in prompts]
    written = [tokenizer.encode_turn("assistant", q.query) for q in queries]
    scores, cost = log_likelihoods(net, [(ids, query) for query in written for ids in contexts])
    guesses = torch.tensor(scores).view(len(queries), len(contexts)).argmax(1).tolist()
    names = list(personas)
    return [names[guess] == q.persona for guess, q in zip(guesses, queries)], cost


def measure_queries(net: Transformer, tokenizer: Tokenizer, personas: dict[str, str],
                    queries: Sequence[Query], candidates: Sequence[Candidate]) -> dict:
    """How good stage 1 was: counts of the candidates, and of the kept queries. Of many queries,
    MEASURED evenly spaced ones are identified; chance is one in the number of personas."""
    begun = time.perf_counter()
    some = queries[::math.ceil(len(queries) / MEASURED)]
    right, cost = identify(net, tokenizer, personas, some)
    return {"candidates": len(candidates), "complete": sum(c.complete for c in candidates),
            "well_formed": sum(c.suits is not None for c in candidates),
            "fits_its_persona": sum(c.suits == c.persona for c in candidates),
            "kept": len(queries), "measured": len(some), "identifiable": sum(right),
            "chance": 1 / len(personas), **cost, **spent_since(begun)}
