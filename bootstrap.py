"""Stages 1-3: the model writes queries, answers them with and without a persona, and judges itself.

Every stage is data on disk: one JSONL file, one row a sample, extended by whole chunks and replaced
atomically, so a run killed at any moment continues to the same files. A row's random draws depend
on its own name (persona, index) and a chunk's batching on nothing but the chunk.

1. `write_queries`: for each persona, what a user would type to this expert.
2. `write_answers`: two answers a query, y_0 ~ P(.|x) and y_k ~ P(.|persona, x).
3. `write_verdicts`: does the persona's answer win? t(x) = 1 only if it wins under both orders (the
   letter judge of the paper) or both wordings (the likelihood judge, for models too small for
   letters). Which judge can be trusted is tested first, on pairs whose truth is known.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from generate import Engine, Request, Sampling, derive_seed, pad, stop_tokens
from hub import InputError, write_file
from model import Transformer
from tokenizer import Tokenizer

CHUNK = 32  # rows of stages 2 and 3 that are done, and committed, together
CANDIDATE_CHUNK = 96  # candidates of stage 1, likewise
SLOTS = 32  # engine rows; a setting, because results depend on it in the last bits
QUERY_SAMPLING = {"temperature": 0.8, "max_new_tokens": 96}
ANSWER_TEMPERATURE = 0.7
OVERSAMPLE, ROUNDS = 3, 4  # candidates per wanted query in a round of stage 1; most rounds
MIN_WORDS, MAX_WORDS = 5, 60
ECHO_WORDS = 5  # a query that repeats so many words of its persona in a row is an echo
NEAR_DUPLICATE = 0.7  # Jaccard similarity of word sets from which two queries count as one
SCORE_TOKENS = 8192  # padded tokens in one scoring batch
TRUST, TRUST_PAIRS = 0.8, 48  # a judge must be right on this share of that many known pairs
LETTER_MASS = 0.05  # probability A, B and T together need for a verdict to count as one
MARGIN = 0.02  # nats per token by which an answer must explain the query better to win

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
INVERSE_PROMPTS = (
    "Here is an answer that somebody gave:\n\n{answer}\n\nWhich question does it answer? "
    "Reply with the question only.",
    "Read this text:\n\n{answer}\n\nIt was written in reply to a user's message. "
    "Write down that message, word for word.",
)


Triple = tuple[str, str, str]  # query, expert answer, base answer


@dataclass(frozen=True)
class Persona:
    """A context to distil: its name (the file's) and its text (a system prompt)."""

    name: str
    text: str


@dataclass(frozen=True)
class Candidate:
    """A query as the model wrote it in stage 1, before the pure pass that keeps or drops it.

    `complete`: the model ended it by itself. `likeliest`: the persona that makes the cleaned query
    likeliest, None if cleaning left nothing.
    """

    persona: str
    round: int
    text: str
    complete: bool
    likeliest: str | None


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
    """Row of verdicts.jsonl. `evidence`: the two letters, or per wording the expert's and the base
    answer's score (mean log-probability of the query, nats per token)."""

    persona: str
    index: int
    winner: str
    target: int
    judge: str
    evidence: list


def load_personas(folder: Path) -> list[Persona]:
    """Read every *.txt of a folder (not below it), in name order.

    Raises:
        InputError: no such folder, no persona in it, or one that is empty or not UTF-8.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such personas folder")
    personas = []
    for path in sorted(folder.glob("*.txt")):
        try:
            path.name.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{path.name!a}: the file's name is not UTF-8 text") from None
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error})") from None
        if not text:
            raise InputError(f"{path}: the persona is empty")
        personas.append(Persona(path.stem, text))
    if not personas:
        raise InputError(f"{folder}: no *.txt personas in this folder")
    return personas


# --------------------------------------------------------------------------------------------------
# The run folder: stage files, their chunks, and the metrics


class RunFolder:
    """A run's output folder, locked for one process, with the one commit protocol of all stages.

    A chunk is committed in two atomic replacements: first metrics.jsonl gains the chunk's row, then
    the stage file gains the chunk. A kill between the two leaves a metrics row without a chunk,
    which is dropped when the chunk is done again.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is working in this folder") from None

    def close(self) -> None:
        """Release the folder (a dying process does so by itself)."""
        self._lock.close()

    def read(self, name: str, kind: type) -> list:
        """The rows of a stage file as dataclasses of `kind`; an absent file has none."""
        path, rows = self.path / name, []
        if not path.exists():
            return rows
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                rows.append(kind(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not a {kind.__name__} row ({error}); "
                                 "use --overwrite to start again") from None
        return rows

    def write(self, name: str, rows: Iterable) -> None:
        """Replace a stage file."""
        write_file(self.path / name, "".join(
            json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows))

    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        rows = []
        # Not splitlines(): a model may write U+2028, which JSON leaves as it is.
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["stage"], rows[-1]["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}, line {number}: not a metrics row ({error}); "
                                 "use --overwrite with another --out") from None
        return rows

    def record(self, stage: str, step: int, **values: object) -> None:
        """Add a metrics row, replacing what an interrupted attempt at this step (or later) left."""
        kept = [m for m in self.metrics() if m["stage"] != stage or m["step"] < step]
        kept.append({"stage": stage, "step": step, **values})
        write_file(self.path / "metrics.jsonl",
                   "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))

    def forget(self, stages: Sequence[str], files: Sequence[str]) -> None:
        """Delete stage files and the metrics of those stages."""
        for name in files:
            (self.path / name).unlink(missing_ok=True)
        belongs = {"judge": "verdicts", "kl": "lora"}  # rows recorded within a stage
        kept = [m for m in self.metrics() if belongs.get(m["stage"], m["stage"]) not in stages]
        write_file(self.path / "metrics.jsonl",
                   "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept))

    def chunks(self, stage: str, name: str, kind: type, todo: Sequence[Sequence],
               work: Callable[[int, Sequence], tuple[list, dict]]) -> list:
        """Run `work(chunk number, chunk)` -> (rows, metrics) on every chunk that is not done yet.

        A stage file holds whole chunks, one row for each element of the chunk, in order.
        """
        rows, total = self.read(name, kind), sum(map(len, todo))
        with tqdm(total=total, desc=stage, unit="row", dynamic_ncols=True) as bar:
            done = 0
            for number, chunk in enumerate(todo):
                done += len(chunk)
                if len(rows) < done:
                    del rows[done - len(chunk):]
                    begun = time.perf_counter()
                    new, values = work(number, chunk)
                    seconds = round(time.perf_counter() - begun, 3)
                    self.record(stage, number, **values, seconds=seconds)
                    rows += new
                    self.write(name, rows)
                bar.update(done - bar.n)
        return rows


def split_chunks(rows: Sequence, size: int = CHUNK) -> list[Sequence]:
    """Fixed chunks in file order; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def cost(engine: Engine, prompts: int) -> dict:
    """What an engine run cost, for metrics.jsonl."""
    return {"prompts": prompts, "tokens_read": engine.prompt_tokens,
            "tokens_written": engine.new_tokens}


# --------------------------------------------------------------------------------------------------
# Stage 1: queries


def write_queries(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: Sequence[Persona], wanted: int, seed: int) -> list[Query]:
    """Stage 1 (paper, section 3.1): `wanted` queries a persona, in the user's own voice.

    The model reads the persona as its system message and goes on as the USER: no instruction that a
    small model could echo, one format for all personas. A query counts only if it is likelier
    after its own persona than after any other, so that it is about something this expert does.
    Candidates are over-generated in rounds; after each, one pure pass over all of them
    (`keep_queries`) says who still lacks queries.
    """
    todo: list[Sequence[tuple[str, int, int]]] = []  # chunks of (persona, round, number)
    stop_ids = stop_tokens(net, tokenizer)
    systems = {p.name: p.text for p in personas}
    opened = {p.name: tokenizer.open_user_turn(p.text) for p in personas}

    def work(_: int, chunk: Sequence[tuple[str, int, int]]) -> tuple[list, dict]:
        requests = [Request(opened[name], derive_seed(seed, "query", name, round_, i),
                            prefix=len(opened[name]) - 1) for name, round_, i in chunk]
        engine = Engine(net, Sampling(**QUERY_SAMPLING), stop_ids, SLOTS)
        outputs = sorted(engine.run(requests), key=lambda out: out.index)
        texts = [tokenizer.decode(out.ids) for out in outputs]
        clean = [clean_query(text, systems[c[0]]) for text, c in zip(texts, chunk)]
        guesses = likeliest_persona(net, tokenizer, opened, clean)
        return [Candidate(name, round_, text, out.stop == "eos", guess)
                for (name, round_, _), text, out, guess in zip(chunk, texts, outputs, guesses)
                ], cost(engine, len(requests))

    queries: list[Query] = []
    lacking = list(personas)
    for round_ in range(ROUNDS):
        todo += split_chunks([(p.name, round_, i) for p in lacking
                              for i in range(OVERSAMPLE * wanted)], CANDIDATE_CHUNK)
        candidates = run.chunks("queries", "candidates.jsonl", Candidate, todo, work)
        queries = keep_queries(candidates, personas, wanted)
        counts = Counter(q.persona for q in queries)
        lacking = [p for p in personas if counts[p.name] < wanted]
        if not lacking:
            break
    run.write("queries.jsonl", queries)
    return queries


def keep_queries(candidates: Sequence[Candidate], personas: Sequence[Persona],
                 wanted: int) -> list[Query]:
    """The pure pass of stage 1: keep the first `wanted` well-formed candidates of each persona that
    are likeliest under it and no near-duplicate of one kept before, across personas."""
    kept: list[Query] = []
    seen: list[set[str]] = []
    for persona in personas:
        index = 0
        for candidate in (c for c in candidates if c.persona == persona.name):
            text = clean_query(candidate.text, persona.text) if candidate.complete else None
            if index == wanted:
                break
            if not text or candidate.likeliest != persona.name:
                continue
            words = set(re.findall(r"\w+", text.lower()))
            if any(len(words & s) >= NEAR_DUPLICATE * len(words | s) for s in seen):
                continue
            seen.append(words)
            kept.append(Query(persona.name, index, text))
            index += 1
    return kept


def clean_query(text: str, persona: str = "") -> str | None:
    """First non-empty line without list numbering or surrounding quotes; None if it is no query or
    repeats a run of ECHO_WORDS words of the persona.

    >>> clean_query('1. "How do tides work in a bay?"')
    'How do tides work in a bay?'
    """
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    line = re.sub(r"^(?:\d{1,2}[.)]|[-*])\s+", "", line).strip()
    if len(line) > 1 and line[0] == line[-1] == '"':
        line = line[1:-1].strip()
    # A line that ends in a colon announces something that the first-line rule has cut off.
    if not MIN_WORDS <= len(line.split()) <= MAX_WORDS or line.endswith((":", ",")):
        return None
    words, source = (re.findall(r"\w+", t.lower()) for t in (line, persona))
    runs = {tuple(source[i:i + ECHO_WORDS]) for i in range(len(source) - ECHO_WORDS + 1)}
    echo = any(tuple(words[i:i + ECHO_WORDS]) in runs for i in range(len(words)))
    return None if echo else line


def likeliest_persona(net: Transformer, tokenizer: Tokenizer, opened: dict[str, list[int]],
                      queries: Sequence[str | None]) -> list[str | None]:
    """For each query, the name of the opened user turn after which its tokens are likeliest."""
    known = [i for i, q in enumerate(queries) if q is not None]
    targets = [tokenizer.encode(queries[i]) for i in known]
    scores = [log_probability_after(net, prefix, targets) for prefix in opened.values()]
    names, best = list(opened), [None] * len(queries)
    for at, i in enumerate(known):
        best[i] = names[max(range(len(names)), key=lambda j: scores[j][at])]
    return best


# --------------------------------------------------------------------------------------------------
# Stage 2: two answers


def write_answers(run: RunFolder, net: Transformer, tokenizer: Tokenizer,
                  personas: Sequence[Persona], queries: Sequence[Query], max_new_tokens: int,
                  seed: int) -> list[Pair]:
    """Stage 2: y_0 ~ P(.|x) and y_k ~ P(.|persona, x) for every query, base weights both times.

    All 64 answers of a chunk share the engine's slots; each system prompt is read once a chunk.
    """
    texts = {p.name: p.text for p in personas}
    sampling = Sampling(max_new_tokens, ANSWER_TEMPERATURE)
    stop_ids = stop_tokens(net, tokenizer)

    def request(query: Query, kind: str) -> Request:
        system = [{"role": "system", "content": texts[query.persona]}] if kind == "expert" else []
        ids = tokenizer.render([*system, {"role": "user", "content": query.query}])
        other = tokenizer.render([*system, {"role": "user", "content": "\n"}])
        return Request(ids, derive_seed(seed, kind, query.persona, query.index),
                       prefix=common_prefix(ids, other))

    def work(number: int, chunk: Sequence[Query]) -> tuple[list, dict]:
        requests = [request(q, kind) for q in chunk for kind in ("base", "expert")]
        engine = Engine(net, sampling, stop_ids, SLOTS)
        outputs = sorted(engine.run(requests), key=lambda out: out.index)
        text = [tokenizer.decode(o.ids[:-1] if o.stop == "eos" else o.ids) for o in outputs]
        return [Pair(q.persona, q.index, q.query, text[2 * i], text[2 * i + 1],
                     outputs[2 * i].ids, outputs[2 * i + 1].ids,
                     outputs[2 * i].stop, outputs[2 * i + 1].stop)
                for i, q in enumerate(chunk)], cost(engine, len(requests))

    return run.chunks("answers", "answers.jsonl", Pair, split_chunks(queries), work)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two id lists, at least one id short of a's end."""
    n = 0
    while n < min(len(a) - 1, len(b)) and a[n] == b[n]:
        n += 1
    return n


# --------------------------------------------------------------------------------------------------
# Stage 3: self-verification


class LetterJudge:
    """The paper's pairwise judge: which letter is likeliest next, asked in both orders.

    Logits of the first answer token are read directly; nothing is sampled, so a verdict is always
    one of the three letters unless together they hold almost no probability ("unparsed").
    """

    name = "letter"

    def __init__(self, net: Transformer, tokenizer: Tokenizer):
        self.net, self.tokenizer = net, tokenizer
        self.letters = [tokenizer.encode(word)[0] for word in ("A", "B", "TIE")]
        if len(set(self.letters)) < 3:
            raise InputError("this tokenizer has no distinct first tokens for A, B and TIE; "
                             "use --judge likelihood")

    def compare(self, triples: Sequence[Triple]) -> tuple[list[tuple[str, list]], int]:
        """(query, expert, base) texts -> [(winner, [letter, letter])], and the tokens read.

        The second letter is the one given with the two answers swapped.
        """
        prompts = []
        for query, expert, base in triples:
            for first, second in ((expert, base), (base, expert)):
                content = JUDGE_PROMPT.format(query=query, first=first, second=second)
                prompts.append(self.tokenizer.render([{"role": "user", "content": content}]))
        said = []
        for states in hidden_states(self.net, prompts, [len(p) - 1 for p in prompts]):
            p = self.net.head(states).float().softmax(-1)[0, self.letters]
            said.append("ABT"[int(p.argmax())] if float(p.sum()) >= LETTER_MASS else "?")
        results = [(letter_winner(*pair), list(pair)) for pair in zip(said[::2], said[1::2])]
        return results, sum(map(len, prompts))


def letter_winner(forward: str, swapped: str) -> str:
    """The verdict of two letters; the expert is A in the first order and B in the second."""
    table = {("A", "B"): "expert", ("B", "A"): "base", ("T", "T"): "tie"}
    return "unparsed" if "?" in (forward, swapped) else table.get((forward, swapped), "split")


class LikelihoodJudge:
    """Which answer makes the query likelier, asked under two wordings of the inverse question?

    score(y) = mean log P(query tokens | "which question does y answer?"), in nats per token. No
    letters, hence no positions; the two wordings play the part of the two orders.
    """

    name = "likelihood"

    def __init__(self, net: Transformer, tokenizer: Tokenizer):
        self.net, self.tokenizer = net, tokenizer

    def compare(self, triples: Sequence[Triple]) -> tuple[list[tuple[str, list]], int]:
        """(query, expert, base) texts -> [(winner, [[expert, base] score per wording])], tokens."""
        prompts, targets = [], []
        for query, expert, base in triples:
            for wording in INVERSE_PROMPTS:
                for answer in (expert, base):
                    content = wording.format(answer=answer)
                    prompts.append(self.tokenizer.render([{"role": "user", "content": content}]))
                    targets.append(self.tokenizer.encode(query))
        scores = mean_log_probability(self.net, prompts, targets)
        results = []
        for i in range(0, len(scores), 2 * len(INVERSE_PROMPTS)):
            pairs = [scores[i + j:i + j + 2] for j in range(0, 2 * len(INVERSE_PROMPTS), 2)]
            results.append((score_winner(pairs), pairs))
        return results, sum(map(len, prompts)) + sum(map(len, targets))


def score_winner(pairs: Sequence[Sequence[float]], margin: float = MARGIN) -> str:
    """The verdict of [expert, base] scores: a side wins only by `margin` under every wording."""
    ahead = [1 if e - b > margin else -1 if b - e > margin else 0 for e, b in pairs]
    if len(set(ahead)) > 1:
        return "split"
    return {1: "expert", -1: "base", 0: "tie"}[ahead[0]]


def hidden_states(net: Transformer, rows: Sequence[Sequence[int]],
                  starts: Sequence[int]) -> list[Tensor]:
    """Post-norm hidden states of each row of ids from position starts[i] to its end, [n_i, d].

    Rows are batched by length under a token budget; the batching depends only on the rows.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    with torch.inference_mode():
        while order:
            size = 1
            while size < len(order) and (size + 1) * len(rows[order[size]]) <= SCORE_TOKENS:
                size += 1
            batch, order = order[:size], order[size:]
            hidden = net.hidden(pad([rows[i] for i in batch], net.device)[0])
            for at, i in enumerate(batch):
                states[i] = hidden[at, starts[i]:len(rows[i])].clone()
    return states


def mean_log_probability(net: Transformer, prompts: Sequence[Sequence[int]],
                         targets: Sequence[Sequence[int]]) -> list[float]:
    """Mean log P(target token | what stands before it) for each prompt + target, nats per token."""
    rows = [[*p, *t] for p, t in zip(prompts, targets)]
    means = []
    with torch.inference_mode():
        for states, target in zip(hidden_states(net, rows, [len(p) - 1 for p in prompts]), targets):
            log_p = net.head(states[:-1]).float().log_softmax(-1)  # [len(target), V]
            ids = torch.tensor(target, device=net.device)[:, None]
            means.append(round(float(log_p.gather(1, ids).mean()), 6))
    return means


def log_probability_after(net: Transformer, prefix: Sequence[int],
                          targets: Sequence[Sequence[int]]) -> list[float]:
    """Summed log P(target | prefix) of many targets after ONE prefix, which is read only once."""
    sums = [0.0] * len(targets)
    order = sorted(range(len(targets)), key=lambda i: (len(targets[i]), i))
    with torch.inference_mode():
        first = net.new_cache(1, len(prefix))
        span = net.span((1, len(prefix)), first)
        net.run(net.embed(torch.tensor([prefix], device=net.device)), span, range(len(net.layers)))
        for batch in split_chunks(order):
            # The prefix's last token is read again, with the targets: it predicts their first.
            rows = [[prefix[-1], *targets[i]] for i in batch]
            ids, start = pad(rows, net.device)[0], len(prefix) - 1
            cache = net.new_cache(len(batch), start + ids.shape[1])
            for at in range(len(batch)):
                cache.copy(at, first, 0, start)
            span = net.span(ids.shape, cache, torch.full((len(batch),), start, device=net.device),
                            start + ids.shape[1])
            hidden = net.norm(net.run(net.embed(ids), span, range(len(net.layers))))
            for at, i in enumerate(batch):
                target = torch.tensor(targets[i], device=net.device)[:, None]
                log_p = net.head(hidden[at, :len(target)]).float().log_softmax(-1)
                sums[i] = float(log_p.gather(1, target).sum())
    return sums


def known_truth(pairs: Sequence[Pair]) -> list[Triple]:
    """(query, its own base answer, the answer to another persona's query): the first must win."""
    usable = [p for p in pairs if p.base.strip()]
    step = max(len(usable) // 2, 1)
    return [(p.query, p.base, usable[(i + step) % len(usable)].base)
            for i, p in enumerate(usable)][:TRUST_PAIRS]


def examine_judge(judge: LetterJudge | LikelihoodJudge, pairs: Sequence[Pair]) -> dict:
    """Ask a judge about pairs whose truth is known; returns its accuracy and its habits."""
    triples = known_truth(pairs)
    results, _ = judge.compare(triples)
    winners = Counter(winner for winner, _ in results)
    report = {"judge": judge.name, "pairs": len(triples), "right": winners["expert"],
              "accuracy": round(winners["expert"] / max(len(triples), 1), 4), **winners}
    if judge.name == "letter":
        letters = [letter for _, said in results for letter in said]
        report["share_of_A"] = round(letters.count("A") / max(len(letters), 1), 4)
    return report


def choose_judge(name: str, net: Transformer, tokenizer: Tokenizer,
                 pairs: Sequence[Pair]) -> tuple[LetterJudge | LikelihoodJudge, list[dict]]:
    """The judge to use and the self-tests behind the choice.

    "auto" takes the letter judge if it is right on at least 80% of the known pairs, else the
    likelihood judge if it is.

    Raises:
        InputError: neither can be trusted.
    """
    kinds = {"letter": LetterJudge, "likelihood": LikelihoodJudge}
    tests = []
    for kind in kinds.values() if name == "auto" else [kinds[name]]:
        judge = kind(net, tokenizer)
        tests.append(examine_judge(judge, pairs))
        if name != "auto" or tests[-1]["accuracy"] >= TRUST:
            return judge, tests
    table = "; ".join(f"{t['judge']} {t['right']} of {t['pairs']}" for t in tests)
    raise InputError(f"this model cannot verify itself: on answers to the wrong query its judges "
                     f"are right in {table}; use a larger model, or force one with --judge")


def write_verdicts(run: RunFolder, judge: LetterJudge | LikelihoodJudge,
                   pairs: Sequence[Pair]) -> list[Verdict]:
    """Stage 3: t(x) = 1 where the persona's answer wins twice; everything else is t(x) = 0."""

    def work(number: int, chunk: Sequence[Pair]) -> tuple[list, dict]:
        results, tokens = judge.compare([(p.query, p.expert, p.base) for p in chunk])
        rows = [Verdict(p.persona, p.index, winner, int(winner == "expert"), judge.name, evidence)
                for p, (winner, evidence) in zip(chunk, results)]
        return rows, {"prompts": len(chunk), "tokens_read": tokens, "tokens_written": 0}

    return run.chunks("verdicts", "verdicts.jsonl", Verdict, split_chunks(pairs), work)
