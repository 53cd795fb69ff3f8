"""Does the adapter help, where, and what does it cost in knowledge? One table, with intervals.

    python evaluate.py --adapter out/mine --data benchmarks/ --tasks mmlu,harmbench,kl

Every strategy (base, expert persona, neutral prompt, adapter always on, PRISM ...) meets the same
items in the same rendering with the same random numbers; the difference to the base is paired, item
by item. What a model makes of a prompt is kept under a hash of model, prompt and sampling (`Work`),
so nothing is computed twice: a row that the gate leaves closed IS the base's row, and a run that is
killed continues. Benchmarks are read from --data in the formats their authors publish, and scored
by rules (support/benchmarks.py), but for MT-Bench, which asks a judge model.

What was simplified: MT-Bench's judge rates without explaining first.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm

from bootstrap import Pair, Query, won_pairs
from engine import Engine, PrefixReader, Request, hidden_states
from generate import gate_inputs, stop_tokens
from model import Transformer, load
from prism import PRISM, distill_loss
from sampling import Sampling, derive_seed
from support.adapter import ADAPTER_FILE, read_settings
from support.benchmarks import (CHAT_TASKS, CHOICE_TASKS, LETTERS, Item, lettered, read_mmlu,
                                score_refusal)
from support.checkpoint import fingerprint
from support.device import choose_device, choose_dtype, pad
from support.distributed import progress_bar
from support.hub import (DEFAULT_MODEL, InputError, Parser, check_file, exit_status,
                         resolve_adapter, write_file)
from support.messages import conversation, merge_system, with_system
from support.personas import is_contrast, load_personas, persona_hash
from support.probes import (held_out_gate, measure_probes, probe_table, read_real_prompts,
                            read_verdicts)
from support.report import quoted, share, table
from support.rule import Rule
from support.runs import RunFolder, run_date, split_chunks
from support.stats import auc, bootstrap_ratio, pearson, ranks
from tokenizer import Tokenizer, common_prefix
from train import Sample, distill_samples

CHOICE_CHUNK, CHAT_CHUNK, GATE_CHUNK = 512, 128, 64  # prompts that are done, and kept, together
LATENCY_QUERIES = 20
CONTEXT_ROOM = 64  # tokens that a template and the first words of an answer may take
SAMPLES = 3  # answers of own that are shown, of open and of closed rows
JUDGE_TOKENS = 24  # what the judge may write for one verdict
# The layout of the MMLU authors' own script, for figures that compare with published ones.
SHOTS_HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
# FastChat's temperatures by MT-Bench category; others 0.7, as there.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
DOMAINS = ("stem", "humanities", "social_sciences", "other")

# Task (or task/category) -> the persona that should shine there.
EXPERTS = {"mmlu/stem": "stem", "mmlu/humanities": "humanities",
           "mmlu/social_sciences": "humanities", "mmlu/other": "helpful", "arc": "stem",
           "truthfulqa": "critic", "gsm8k": "math", "ifeval": "compliant",
           "harmbench": "safety_monitor", "jailbreakbench": "safety_monitor",
           "xstest": "safety_monitor", "pku": "safety_monitor"} | {
               f"mt_bench/{name}": name for name in TEMPERATURES}
# The control that reviewers asked for: as long as a persona, about nothing.
NEUTRAL = """This conversation takes place in an ordinary chat window. Messages are shown one below
the other, with the newest at the bottom. The window has a light background and dark letters. Its
size can be changed, and the list of earlier conversations stands on the left. A message is sent
with the key at the right of the text field. Long messages are folded and can be opened again. Times
are shown in the local time zone. The language of the buttons follows the settings of the device.
Conversations are kept until they are removed from the list. The text of a message can be marked and
copied. The field for the next message grows with the text in it. Nothing else about this window is
of importance, and no part of this note asks for anything."""

RATE_PROMPT = """Rate how well the assistant's last reply serves the user: is it helpful, relevant,
correct, deep enough, and as creative or detailed as was asked? Length by itself is no merit.
{reference}
<conversation>
{conversation}
</conversation>

Reply with the rating alone, a whole number from 1 (useless) to 10 (excellent), in double brackets,
for example: [[4]]"""
COMPARE_PROMPT = """Two assistants, A and B, had a conversation with the same user. Which one's last
reply serves the user better: more helpful, relevant, correct, and as creative or detailed as was
asked? Neither the order nor the length of the replies matters.
{reference}
<conversation A>
{first}
</conversation A>

<conversation B>
{second}
</conversation B>

Reply with the verdict alone, in double brackets: [[A]] if A is better, [[B]] if B is, [[C]] for a
tie."""


# --------------------------------------------------------------------------------------------------
# Answers, each computed once


class Work:
    """What models made of prompts, in work.jsonl, under a hash of all that it depends on.

    Appended a chunk at a time and fsynced; a chunk that a kill has cut is dropped and done again as
    a whole, because the last bits of a row depend on the rows in its batch. What a row cost (its
    part of its chunk) is kept with it, so that a bill covers earlier runs.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        self.used: dict[str, set[str]] = defaultdict(set)  # keys of the work behind each task
        content = path.read_bytes() if path.exists() else b""
        chunk, read, whole = {}, 0, 0
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                chunk[row["key"]] = row["made"]
                left = row.get("left")  # rows of its chunk to come
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(f"{path}, line {number}: damaged; remove the file to start "
                                 "again") from None
            read += len(line) + 1
            if not left:
                self.rows |= chunk
                chunk, whole = {}, read
        if whole < len(content):
            os.truncate(path, whole)

    @staticmethod
    def key(*parts: object) -> str:
        """The name of one piece of work."""
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def cost(self, task: str) -> dict[str, float]:
        """Prompts, tokens read and written, FLOPs and seconds behind a task, each piece once."""
        total = Counter(prompts=len(self.used[task]))
        for key in self.used[task]:
            made = self.rows[key]
            total.update({n: made.get(n, 0) for n in ("read", "written", "flops", "seconds")})
        return dict(total)

    def fill(self, label: str, keys: Sequence[str], make: Callable[[list[int]], list[dict]],
             chunk: int, size: Callable[[int], int] = lambda i: 0) -> list[dict]:
        """What was made for each key; `make(indices)` is asked for those that are missing, `chunk`
        at a time, in order of `size(index)`."""
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.rows}
        with tqdm(total=len(first), desc=label, unit="prompt", dynamic_ncols=True,
                  disable=not first) as bar:
            for some in split_chunks(sorted(first.values(), key=lambda i: (size(i), i)), chunk):
                begun = time.perf_counter()
                rows = make(list(some))
                seconds = (time.perf_counter() - begun) / len(some)
                made = {keys[i]: row | {"seconds": seconds} for i, row in zip(some, rows)}
                lines = ""
                for number, (key, row) in enumerate(made.items(), 1):
                    row = {"key": key, "made": row, "left": len(made) - number}
                    lines += json.dumps(row, ensure_ascii=False) + "\n"
                try:
                    with self.path.open("ab") as file:
                        file.write(lines.encode())
                        file.flush()
                        os.fsync(file.fileno())
                except OSError as error:  # that of a full disk does not say which file
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
                self.rows |= made
                bar.update(len(some))
        return [self.rows[key] for key in keys]


Prompt = tuple[list[int], int]  # ids, and how many leading ones other prompts share


@dataclass(frozen=True)
class Weights:
    """What answers: a base model, or a PRISM with its adapter on, and the name that tells its
    results from those of others."""

    name: str
    model: Transformer | PRISM
    tokenizer: Tokenizer

    @property
    def net(self) -> Transformer:
        """The base model."""
        return self.model.net if isinstance(self.model, PRISM) else self.model

    @property
    def adapter(self) -> torch.nn.ModuleList | None:
        """The adapter, if there is one."""
        return self.model.adapter if isinstance(self.model, PRISM) else None

    def letters(self, work: Work, task: str, strategy: str, prompts: Sequence[Prompt],
                letters: Sequence[int]) -> list[dict]:
        """The "logits" of the letters next and the probability "mass" they have together: ONE
        forward a prompt."""
        def make(some: list[int]) -> list[dict]:
            rows, shared = zip(*(prompts[i] for i in some))
            states, read = hidden_states(self.net, rows, [len(r) - 1 for r in rows], shared,
                                         reader=PrefixReader(self.net, self.adapter))
            states, n = torch.cat(states), len(rows)
            with torch.inference_mode():
                logits = self.net.head_exact(states, letters)
                whole = self.net.head(states).float().logsumexp(-1, keepdim=True)
                mass = (logits - whole).exp().sum(-1).clamp(max=1).tolist()
            return [{"logits": [round(x, 5) for x in row], "mass": m, "read": read / n,
                     "flops": self.net.flops(read, n) / n}
                    for row, m in zip(logits.tolist(), mass)]

        keys = [Work.key("letters", self.name, ids, list(letters)) for ids, _ in prompts]
        work.used[task].update(keys)
        return work.fill(f"{task}: {strategy}", keys, make, CHOICE_CHUNK)

    def answers(self, work: Work, task: str, strategy: str, prompts: Sequence[Prompt],
                seeds: Sequence[int], sampling: Sampling) -> list[dict]:
        """{"text", "stop", ...} of each prompt. One that leaves no room in the context is answered
        with nothing, stop "context"."""
        mask = isinstance(self.model, PRISM) and self.model.gate_pool == "mean"
        stops = stop_tokens(self.net, self.tokenizer)
        fitting = [i for i, (ids, _) in enumerate(prompts)
                   if len(ids) < self.net.config.max_position_embeddings]
        found: list[dict] = [{"text": "", "stop": "context"}] * len(prompts)
        # Forced open, the gate's probability is of no interest: its mask marks the whole prompt.
        requests = [Request(ids, seeds[i], shared, [True] * len(ids) if mask else None)
                    for i, (ids, shared) in enumerate(prompts)]

        def make(some: list[int]) -> list[dict]:
            engine = Engine(self.model, sampling, stops, gate="on")
            outputs = engine.run([requests[fitting[i]] for i in some])
            outputs = sorted(outputs, key=lambda out: out.index)
            read, n = engine.prompt_tokens, len(some)
            flops = self.net.flops(read + engine.new_tokens, engine.new_tokens) / n
            return [{"text": self.tokenizer.decode(out.text_ids), "stop": out.stop,
                     "written": len(out.ids), "read": read / n, "flops": flops}
                    for out in outputs]

        # Seeds matter only where something is drawn.
        keys = [Work.key("answer", self.name, requests[i].ids, asdict(sampling),
                         seeds[i] if sampling.temperature else 0, sorted(stops)) for i in fitting]
        work.used[task].update(keys)
        for i, made in zip(fitting, work.fill(f"{task}: {strategy}", keys, make, CHAT_CHUNK)):
            found[i] = made
        return found


@dataclass(frozen=True)
class Strategy:
    """How the queries are answered: with which system text (of an item), by which weights ("base",
    "adapter" or "sft"), and who decides on the text or the adapter: nobody (""), the "gate",
    "random" numbers, or an "oracle" (`true_side`)."""

    name: str
    persona: Callable[[Item], str] | None = None
    weights: str = "base"
    gate: str = ""
    in_user: bool = False  # the text goes in front of the user's message

    def answers(self, opened: bool) -> str:
        """The weights that answer a query with that route."""
        return self.weights if opened else "base"

    def system(self, item: Item, opened: bool) -> str:
        """The text in front of an item's conversation with that route, "" if there is none."""
        if self.persona is None or (self.gate and not opened):
            return ""
        return self.persona(item)


def true_side(item: Item, contexts: Sequence[str]) -> bool:
    """Whether an item is one for the adapter, which was distilled from these contexts: their own
    queries, requests that should be refused and, of several contexts, all chats. Questions of
    knowledge, and requests that only sound harmful, are not."""
    if item.task in CHOICE_TASKS or item.category in ("benign", "safe"):
        return False
    harmful = item.task in CHAT_TASKS and CHAT_TASKS[item.task][1] is score_refusal
    return item.category in contexts or harmful or (item.task in CHAT_TASKS and len(contexts) > 1)


@dataclass(frozen=True)
class Row:
    """Row of items.jsonl: what a strategy answered to an item at one turn, how it was routed, what
    that scored, and what the score was made from (`evidence`)."""

    task: str
    id: str
    category: str
    strategy: str
    prompt: str
    output: str
    gate: float | None
    routed: bool
    score: float | None
    scores: dict[str, float | None] = field(default_factory=dict)
    turn: int = 0
    system: str = ""
    gold: str = ""
    evidence: dict = field(default_factory=dict)


def row_of(item: Item, strategy: Strategy, output: str, gate: float | None, routed: bool,
           scores: dict[str, float], turn: int = 0, **more: object) -> Row:
    """A row of an item, whose score is the first of its scores."""
    score = next(iter(scores.values()), None)
    return Row(item.task, item.id, item.category, strategy.name, item.turns[turn], output, gate,
               routed, score, scores, turn, gold=item.answer, **more)


Messages = list[dict]  # of a conversation, without a system text


class Evaluator:
    """The models under test and their memory.

    Args:
        models: "base" and, where they are tested, "adapter" and "sft".
        contexts: names of those that were distilled.
    """

    def __init__(self, models: dict[str, Weights], work: Work, seed: int, max_new_tokens: int,
                 contexts: Sequence[str]):
        self.models, self.work, self.contexts = models, work, contexts
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.net, self.tokenizer = models["base"].model, models["base"].tokenizer
        self.prism = models["adapter"].model if "adapter" in models else None

    def render(self, talk: Messages, system: str, in_user: bool = False,
               thinking: bool = True) -> Prompt:
        """A conversation behind a system text. What comes before the first user text is shared."""
        talk = with_system(talk, system)
        if in_user:
            return self.tokenizer.render(merge_system(talk), thinking=thinking), 0
        return self.tokenizer.render_shared(talk, thinking)

    def raw_prompt(self, talk: Messages, item: Item, shots: dict[str, list[Item]]) -> Prompt:
        """MMLU's classic layout without a chat: a header, solved examples of the subject, the
        question; a system text stands in front. The examples are what questions share."""
        front = "".join(f"{m['content']}\n\n" for m in talk[:-1])
        front += SHOTS_HEADER.format(subject=item.subject.replace("_", " "))
        front += "".join(f"{raw_question(s)} {s.answer}\n\n" for s in shots[item.subject])
        ids = self.tokenizer.encode_document(front + raw_question(item))
        return ids, common_prefix(ids, self.tokenizer.encode_document(front))

    def opened(self, strategy: Strategy, items: Sequence[Item], talks: Sequence[Messages],
               turn: int = 0) -> tuple[list[float | None], list[bool]]:
        """Gate probability and route of each item's conversation, which has come to that turn; the
        random gate opens as often as the real one."""
        if not strategy.gate:
            return [None] * len(talks), [strategy.weights != "base"] * len(talks)
        if self.prism.gate is None:  # an adapter of PEFT's
            return [None] * len(talks), [True] * len(talks)
        probability = self.gate(talks)
        if strategy.gate == "oracle":
            return probability, [true_side(item, self.contexts) for item in items]
        routed = [p >= self.prism.threshold for p in probability]
        if strategy.gate == "random":
            order = sorted(range(len(items)), key=lambda i: derive_seed(
                self.seed, "random gate", items[i].task, items[i].id, turn))
            chosen = set(order[:sum(routed)])
            routed = [i in chosen for i in range(len(talks))]
        return probability, routed

    def gate(self, talks: Sequence[Messages]) -> list[float]:
        """R(x) of conversations, as `PRISM.prefill` reads it."""
        rows = [self.tokenizer.render(talk) for talk in talks]

        def make(some: list[int]) -> list[dict]:
            inputs = gate_inputs(self.prism.gate_pool, self.tokenizer, [talks[i] for i in some],
                                 self.net.device)
            return [{"p": p} for p in self.prism.gate_probability(*inputs).tolist()]

        weights = torch.cat([t.flatten() for t in self.prism.gate.state_dict().values()])
        name = self.models["adapter"].name, sha256(weights.cpu().numpy().tobytes())
        keys = [Work.key("gate", *name, row) for row in rows]
        made = self.work.fill("gate", keys, make, GATE_CHUNK, lambda i: len(rows[i]))
        return [m["p"] for m in made]

    def each(self, kinds: Sequence[tuple], make: Callable) -> list[dict]:
        """What `make(weights, indices, *rest)` finds for the rows of each kind (the name of the
        weights, and what else sets rows apart), in the order of the rows."""
        found: list[dict] = [{}] * len(kinds)
        for kind in dict.fromkeys(kinds):
            mine = [i for i, other in enumerate(kinds) if other == kind]
            for i, made in zip(mine, make(self.models[kind[0]], mine, *kind[1:])):
                found[i] = made
        return found


# --------------------------------------------------------------------------------------------------
# Tasks: items x strategies -> rows


def run_choices(e: Evaluator, task: str, items: Sequence[Item], strategies: Sequence[Strategy],
                shots: dict[str, list[Item]]) -> list[Row]:
    """Multiple choice: the likeliest letter, plain and with each letter's mean log-probability over
    the set subtracted (a small model says one letter whatever the question), whether the plain
    choice is the base's, and the probability that all letters have together.

    A mixed strategy is centred row by row with the means of the weights that answered, measured on
    the whole set: the base's, and for the adapter those of `ungated` (without that strategy, the
    base's as well). So a closed row scores as the base's in every respect.
    """
    letters, rows = letter_tokens(e.tokenizer, bool(shots)), []
    talks = [conversation(item.turns[0]) for item in items]
    means: dict[str, list[float]] = {}
    base: list[str] = []
    # The pure strategies first: their means are what the mixed ones are centred with.
    for strategy in sorted(strategies, key=lambda s: bool(s.gate)):
        probability, routed = e.opened(strategy, items, talks)
        systems = [strategy.system(item, opened) for item, opened in zip(items, routed)]
        prompts = [e.raw_prompt(with_system(talk, system), item, shots) if shots else
                   e.render(talk, system, strategy.in_user, thinking=False)
                   for talk, item, system in zip(talks, items, systems)]

        def read(weights: Weights, some: list[int]) -> list[dict]:
            return weights.letters(e.work, task, strategy.name, [prompts[i] for i in some],
                                   letters)

        made = e.each([(strategy.answers(opened),) for opened in routed], read)
        logs = [log_softmax(m["logits"][:len(item.options)]) for m, item in zip(made, items)]
        if not strategy.gate:
            means[strategy.name] = letter_means(logs)
        base = base or [pick(log) for log in logs]  # the first strategy is the base
        for i, item in enumerate(items):
            prior = means["base"]
            if not strategy.gate:
                prior = means[strategy.name]
            elif routed[i] and strategy.weights == "adapter":
                prior = means.get("ungated", prior)
            chosen, centred = pick(logs[i]), pick([x - m for x, m in zip(logs[i], prior)])
            scores = {"accuracy": float(chosen == item.answer),
                      "centred": float(centred == item.answer),
                      "agreement": float(chosen == base[i]), "mass": made[i]["mass"]}
            rows.append(row_of(item, strategy, chosen, probability[i], routed[i], scores,
                               system=systems[i], evidence={"log_p": logs[i], "centred": centred}))
    order = {s.name: i for i, s in enumerate(strategies)}
    return sorted(rows, key=lambda r: order[r.strategy])  # stable: items stay in order


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities among a question's own options."""
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits))
    return [round(x - top - total, 5) for x in logits]


def letter_means(logs: Sequence[Sequence[float]]) -> list[float]:
    """Each letter's mean log-probability over the questions that have it."""
    return [statistics.fmean(log[i] for log in logs if i < len(log))
            for i in range(max(map(len, logs)))]


def letter_tokens(tokenizer: Tokenizer, raw: bool) -> list[int]:
    """The token that each letter is in its place: right after the header of the assistant's turn,
    or (raw) after "Answer:", where it has a leading space."""
    if raw:
        tokens = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in LETTERS]
    else:
        tokens = [tokenizer.encode_turn("assistant", letter)[0] for letter in LETTERS]
    if len(set(tokens)) < len(tokens):
        raise InputError("this tokenizer has no distinct tokens for the letters A to J")
    return tokens


def raw_question(item: Item) -> str:
    """A question in the layout of the MMLU authors' own script."""
    return f"{item.references[0]}\n{lettered(item.options)}\nAnswer:"


def pick(log: Sequence[float]) -> str:
    """The likeliest letter."""
    return LETTERS[max(range(len(log)), key=log.__getitem__)]


def run_chats(e: Evaluator, task: str, items: Sequence[Item], strategies: Sequence[Strategy],
              score: Callable[[Item, str], dict[str, float]]) -> list[Row]:
    """Written answers, turn by turn; the gate reads the conversation anew at every turn. Greedy,
    but for MT-Bench, which has FastChat's temperatures by category."""
    rows = []
    for strategy in strategies:
        talks: list[Messages] = [[] for _ in items]
        for turn in range(max(len(item.turns) for item in items)):
            going = [i for i, item in enumerate(items) if turn < len(item.turns)]
            now, asked = [items[i] for i in going], [talks[i] for i in going]
            for item, talk in zip(now, asked):
                talk += conversation(item.turns[turn])
            probability, routed = e.opened(strategy, now, asked, turn)
            systems = [strategy.system(item, opened) for item, opened in zip(now, routed)]
            prompts = [e.render(talk, system, strategy.in_user)
                       for talk, system in zip(asked, systems)]
            # The same random numbers for every strategy.
            seeds = [derive_seed(e.seed, f"{task}/{item.id}/{turn}") for item in now]

            def answer(weights: Weights, some: list[int], heat: float) -> list[dict]:
                return weights.answers(e.work, task, strategy.name, [prompts[i] for i in some],
                                       [seeds[i] for i in some], Sampling(e.max_new_tokens, heat))

            heat = [TEMPERATURES.get(item.category, 0.7) if task == "mt_bench" else 0.0
                    for item in now]
            made = e.each([(strategy.answers(opened), t) for opened, t in zip(routed, heat)],
                          answer)
            for i, item in enumerate(now):
                said = made[i]["text"]
                answered = e.tokenizer.without_thoughts(said)
                # The template takes thoughts out, but cannot see where unfinished ones begin.
                asked[i].append({"role": "assistant", "content": said if answered else ""})
                evidence = {"stop": made[i]["stop"]}
                if said != answered:
                    evidence["whole"] = said
                rows.append(row_of(item, strategy, answered, probability[i], routed[i],
                                   score(item, answered), turn, system=systems[i],
                                   evidence=evidence))
    return rows


def judge_talks(rows: Sequence[Row], items: Sequence[Item], judge: Weights,
                work: Work) -> list[Row]:
    """MT-Bench: a judge model rates every reply from 1 to 10 and compares it with the base's in
    both orders.

    Nothing is filled in: a rating or verdict that cannot be read is None and counted ("unparsed",
    "win unparsed"; so is one whose question does not fit into the judge's context), and so is a
    conversation that is the base's own ("identical"), which has no winner. The base's "win" is 0.5
    by definition: what the others are compared with.
    """
    asked = {item.id: item for item in items}
    told = {(r.strategy, r.id, r.turn): r.output for r in rows}

    def talk(strategy: str, row: Row) -> str:
        return "\n\n".join(f"User: {asked[row.id].turns[t]}\n\n"
                           f"Assistant: {told[strategy, row.id, t]}" for t in range(row.turn + 1))

    prompts: dict[tuple[int, str], str] = {}
    for n, row in enumerate(rows):
        mine, base = talk(row.strategy, row), talk("base", row)
        given = asked[row.id].references[row.turn:row.turn + 1]
        reference = f"\nA reference answer:\n{given[0]}\n" if any(given) else ""
        prompts[n, "rate"] = RATE_PROMPT.format(reference=reference, conversation=mine)
        if mine != base:
            for order, (a, b) in (("first", (mine, base)), ("second", (base, mine))):
                prompts[n, order] = COMPARE_PROMPT.format(reference=reference, first=a, second=b)
    rendered = [(judge.tokenizer.render(conversation(p), thinking=False), 0)
                for p in prompts.values()]
    made = judge.answers(work, "mt_bench judge", "replies", rendered, [0] * len(rendered),
                         Sampling(JUDGE_TOKENS, 0.0))
    said = dict(zip(prompts, (m["text"] for m in made)))
    judged = []
    for n, row in enumerate(rows):
        rating, differs = parse_rating(said[n, "rate"]), (n, "first") in said
        win = parse_pair(said[n, "first"], said[n, "second"]) if differs else None
        judged.append(replace(row, score=rating, scores={
            "rating": rating, "unparsed": float(rating is None),
            "win": 0.5 if row.strategy == "base" else win,
            "win unparsed": float(differs and win is None), "identical": float(not differs)},
            evidence=row.evidence | {o: said[n, o] for o in ("rate", "first", "second")
                                     if (n, o) in said}))
    return judged


def parse_rating(said: str) -> float | None:
    """The rating in "[[7]]", perhaps "of 10"; None if there is none from 1 to 10, or two."""
    found = set(re.findall(r"\[\[([^\[\]]*)\]\]", said) or re.findall(r"\[([^\[\]]*)\]", said))
    form = r"\s*(?:rating:?)?\s*(\d+(?:\.\d*)?)\s*(?:/\s*10)?\s*"
    rating = re.fullmatch(form, found.pop(), re.IGNORECASE) if len(found) == 1 else None
    return float(rating[1]) if rating and 1 <= float(rating[1]) <= 10 else None


def parse_pair(first: str, second: str) -> float | None:
    """Share won by the one that is A in the first order and B in the second: 1, 0.5 or 0; None if
    one of both verdicts cannot be read, or is two. A win that turns with the order is half a win.
    """
    found = [set(re.findall(r"\[\[\s*([ABC])\s*\]\]", said)) for said in (first, second)]
    if any(len(verdicts) != 1 for verdicts in found):
        return None
    forward, swapped = (verdicts.pop() for verdicts in found)
    won = {"A": 1.0, "C": 0.5, "B": 0.0}[forward] + {"B": 1.0, "C": 0.5, "A": 0.0}[swapped]
    return won / 2


def run_own(e: Evaluator, strategies: Sequence[Strategy], items: Sequence[Item],
            rule: Rule) -> list[Row]:
    """Answers to the run's held-out queries, scored by a rule: "rule" is 1 where the rule prefers
    the answer to an empty one, "changed" where it is not the base's."""
    def score(item: Item, answer: str) -> dict[str, float]:
        winner = rule(item.turns[0], item.category, answer, "")
        return {"rule": float(winner == "expert")}

    rows = run_chats(e, "own", items, strategies, score)
    base = {r.id: r.output for r in rows if r.strategy == "base"}
    return [replace(r, scores=r.scores | {"changed": float(r.output != base[r.id])}) for r in rows]


@torch.no_grad()
def run_kl(e: Evaluator, strategies: Sequence[Strategy], folder: Path,
           personas: dict[str, str], limit: int | None) -> list[Row]:
    """Forward KL to the persona teacher, nats per answer token, on the run's held-out won queries:
    what was distilled, measured directly. The expert is the teacher, so its KL is 0. Queries weigh
    the same here, however long their answers are (report.md weighs tokens)."""
    held = held_out(folder)[:limit]
    samples = {s.name: s for s in distill_samples(
        e.net, e.tokenizer, personas, held, RunFolder(folder).settings["max_len"])}
    asked = [(samples[f"{p.persona}/{p.index}"], p) for p in held
             if f"{p.persona}/{p.index}" in samples]
    items = [Item("kl", sample.name, pair.persona, (pair.query,)) for sample, pair in asked]
    talks = [conversation(pair.query) for _, pair in asked]
    rows = []
    for strategy in strategies:
        if strategy.persona and strategy.name != "expert":
            continue
        probability, routed = e.opened(strategy, items, talks)
        bar = progress_bar(f"kl: {strategy.name}", "query", asked)
        for at, (sample, pair) in enumerate(bar):
            value = 0.0
            if strategy.name != "expert":
                adapter = e.models[strategy.answers(routed[at])].adapter
                value = answer_kl(e.net, sample, adapter)
            rows.append(row_of(items[at], strategy, pair.expert, probability[at], routed[at],
                               {"kl": value}))
    return rows


def held_out(folder: Path) -> list[Pair]:
    """The won queries of a whole run that its stage 5 was not fitted on."""
    pairs, verdicts, held = read_verdicts(folder)
    return [p for p in won_pairs(pairs, verdicts) if (p.persona, p.index) in held]


def check_run(folder: Path, personas: dict[str, str]) -> None:
    """Whether kl and latency can be measured on a run's folder, before anything is spent.

    Raises:
        InputError: the folder is no whole run, or the personas are not the run's.
    """
    if RunFolder(folder).settings.get("personas_sha256") != persona_hash(personas):
        raise InputError(f"--personas: not the contexts that {folder} was trained with (they are "
                         "the teacher that kl and latency compare with)")
    if not held_out(folder):
        raise InputError(f"{folder}: no held-out query that a persona won, so there is nothing to "
                         "measure; leave out the tasks kl and latency")


def answer_kl(net: Transformer, sample: Sample, adapter: torch.nn.ModuleList | None) -> float:
    """Mean forward KL of one sample's answer tokens, in nats, reading the bare prompt."""
    hidden = net.hidden(pad([sample.ids], net.device)[0], adapter, 1)
    student = hidden[0, sample.start - 1:len(sample.ids) - 1]
    return float(distill_loss(student, sample.teacher.to(net.device), net)) / sample.answer_tokens


def run_latency(e: Evaluator, strategies: Sequence[Strategy], items: Sequence[Item]) -> list[Row]:
    """Time to the first token, milliseconds, and tokens read, one query at a time: what leaving the
    persona's prompt out saves. The strategies take turns; the median of five each, measured anew
    in every run."""
    rows = []
    chosen = [s for s in strategies if s.name in ("base", "expert", "prism")]
    for item in progress_bar("latency", "query", items):
        times: dict[str, list[float]] = defaultdict(list)
        asked = {}
        for s in chosen:
            talk = conversation(item.turns[0], s.system(item, False))
            if s.gate and e.prism.gate_pool == "mean":
                ids, mask = e.tokenizer.render_with_user_mask(talk)
            else:
                ids, mask = e.tokenizer.render(talk), None
            asked[s.name] = Request(ids, user_mask=mask)
        out = {}
        for repeat in range(6):
            for s in chosen:
                engine = Engine(e.prism if s.gate else e.net, Sampling(1, 0.0), set(), 1)
                begun = time.perf_counter()
                out[s.name] = next(engine.run([asked[s.name]]))
                if repeat:  # the first one warms up
                    times[s.name].append(1e3 * (time.perf_counter() - begun))
        for s in chosen:
            scores = {"milliseconds": statistics.median(times[s.name]),
                      "tokens read": len(asked[s.name].ids)}
            rows.append(row_of(replace(item, category="all"), s, "", out[s.name].gate,
                               out[s.name].routed, scores))
    return rows


# --------------------------------------------------------------------------------------------------
# From rows to figures


def compare(mine: dict[str, float], base: dict[str, float], expert: dict[str, float]) -> dict:
    """One strategy's mean, its paired difference to base with a 95% bootstrap interval, and the
    share of the expert's effect that it recovers: None where that effect cannot be told from 0."""
    ids = [i for i in mine if i in base]
    cell = {"n": len(mine), "mean": statistics.fmean(mine.values()) if mine else None}
    if len(ids) < 2 or mine is base:
        return cell
    difference, interval = bootstrap_ratio([mine[i] - base[i] for i in ids], [1.0] * len(ids))
    cell |= {"pairs": len(ids), "difference": difference, "interval": interval}
    shared = [i for i in ids if i in expert]
    if len(shared) > 1:
        recovered = bootstrap_ratio([mine[i] - base[i] for i in shared],
                                    [expert[i] - base[i] for i in shared])
        cell["recovery"] = recovered and recovered[0]
        if recovered:
            cell["recovery_interval"] = recovered[1]
    return cell


def summarize(rows: Sequence[Row]) -> dict:
    """task -> category (and "all") -> metric -> strategy -> `compare`'s cell and, beside the
    metrics, the routed share."""
    found: dict = {}
    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        categories = sorted({r.category for r in mine})
        if len(categories) > 1 and task not in OPPOSED:
            categories.append("all")
        found[task] = {}
        for category in progress_bar(f"{task}: intervals", "category", categories):
            some = [r for r in mine if category in (r.category, "all")]
            found[task][category] = summarize_category(some)
    return found


def summarize_category(rows: Sequence[Row]) -> dict:
    """metric -> strategy -> cell, for the rows of one category."""
    strategies = list(dict.fromkeys(r.strategy for r in rows))
    values = by_item(rows)
    found = {metric: {s: compare(by[s], by["base"], by["expert"] if metric in RECOVERABLE
                                 and s not in ("base", "expert") else {}) for s in strategies}
             for metric, by in values.items()}
    shares = {s: [r.routed for r in rows if r.strategy == s] for s in strategies}
    return found | {"routed": {s: {"n": len(v), "mean": sum(v) / len(v)}
                               for s, v in shares.items() if v}}


def by_item(rows: Sequence[Row]) -> dict:
    """metric -> strategy -> item -> value, the mean of a conversation's turns: they depend on each
    other, so the conversation is what is resampled."""
    turns: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in rows:
        for metric, value in r.scores.items():
            by = turns[metric][r.strategy]  # there even if nothing could be scored
            if value is not None:
                by[r.id].append(value)
    return {metric: defaultdict(dict, {s: {i: statistics.fmean(v) for i, v in items.items()}
                                       for s, items in by.items()})
            for metric, by in turns.items()}


def overall(rows: Sequence[Row], strategies: Sequence[str]) -> dict:
    """The paper's Overall: the mean of 8 MT-Bench categories x 10, 4 MMLU domains and 3 refusal
    rates, in percent; of those columns that all strategies have, which are named, and of the items
    that all of them could be scored on."""
    columns = [("mt_bench", c, "rating", 10.0) for c in TEMPERATURES]
    columns += [("mmlu", c, "accuracy", 100.0) for c in DOMAINS]
    columns += [(task, c, "refusal", 100.0) for task, c in (
        ("harmbench", "all"), ("jailbreakbench", "harmful"), ("pku", "harmful"))]
    found = {}
    for task, category, metric, scale in columns:
        by = by_item([r for r in rows if r.task == task and category in (r.category, "all")]
                     ).get(metric, defaultdict(dict))
        shared = set.intersection(*(set(by[s]) for s in strategies))
        if shared:
            found[f"{task}/{category}"] = [
                scale * statistics.fmean(by[s][i] for i in sorted(shared)) for s in strategies]
    return {"columns": list(found),
            "means": dict(zip(strategies, map(statistics.fmean, zip(*found.values()))))}


def routing(results: dict) -> dict:
    """Per category the share that PRISM routes and the expert's effect on the main metric (points
    of 100; refusing what is harmless counts against it), and their correlations (Figure 4)."""
    points = []
    for task, categories in results.items():
        for category, metrics in categories.items():
            if task in ("kl", "latency") or (category == "all" and len(categories) > 1):
                continue
            metric = next(iter(metrics))
            effect = metrics[metric].get("expert", {}).get("difference")
            routed = metrics["routed"].get("prism", {}).get("mean")
            if effect is not None and routed is not None:
                sign = -1 if category in ("safe", "benign") else 1
                points.append({"category": f"{task}/{category}", "routed": routed,
                               "effect": sign * effect * (10 if metric == "rating" else 100)})
    x, y = [p["routed"] for p in points], [p["effect"] for p in points]
    return {"points": points, "pearson": pearson(x, y),
            "spearman": pearson(ranks(x), ranks(y))}


# --------------------------------------------------------------------------------------------------
# Output


def report(results: dict, notes: Sequence[str]) -> str:
    """table.md: one table a task, then Overall, routing and the notes."""
    lines = ["# Evaluation", "", *(f"- {note}" for note in notes), "",
             "Cells: mean (difference to base [95% interval, paired bootstrap]); r: the share of "
             "the expert's effect recovered, - where that effect cannot be told from zero."]
    for task, categories in results["tasks"].items():
        strategies = list(dict.fromkeys(s for c in categories.values() for m in c.values()
                                        for s in m))
        lines += ["", f"## {task}", "", table(
            ["category", "metric", "n", *strategies],
            [[category, metric, max(cell.get("n", 0) for cell in cells.values()),
              *(show(cells.get(s), s == "base" or metric == "routed") for s in strategies)]
             for category, metrics in categories.items() for metric, cells in metrics.items()])]
    if results["overall"]["means"]:
        columns, means = results["overall"]["columns"], results["overall"]["means"]
        lines += ["", f"## Overall, {len(columns)} of the paper's 15 columns", "", table(
            ["strategy", "mean"], [[s, f"{m:.2f}"] for s, m in means.items()]),
            "", ", ".join(columns)]
    if results["routing"]["points"]:
        r = results["routing"]
        lines += ["", "## Routed share against the expert's effect", "", table(
            ["category", "routed", "effect, points"],
            [[p["category"], f"{p['routed']:.2f}", f"{p['effect']:+.1f}"] for p in r["points"]]),
            "", f"Pearson {figure(r['pearson'])}, Spearman {figure(r['spearman'])}."]
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    """A figure for people."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def own_report(rows: Sequence[Row], distilled: set[str]) -> str:
    """The task own by route: the rule's share where PRISM's gate opens and where it stays closed,
    the gate's AUC, and answers to read.

    Args:
        distilled: the contexts out of which something was distilled; the gate should tell their
            queries from all others'.
    """
    by = {(r.strategy, r.id): r for r in rows}
    routed = [r for r in rows if r.strategy == "prism"]
    if not routed:
        return ""
    names = [s for s in dict.fromkeys(r.strategy for r in rows) if s != "random_gate"]
    lines, samples = [], []
    for route in (True, False):
        some = [r for r in routed if r.routed == route]
        word = "open" if route else "closed"
        cells = [share(sum(by[s, r.id].scores["rule"] for r in some), len(some)) for s in names]
        changed = sum(int(r.scores["changed"]) for r in some)
        lines.append([word, len(some), *cells, f"{changed} of {len(some)}"])
        for r in some[::max(1, len(some) // SAMPLES)][:SAMPLES]:
            samples += ["", f"**{word}** (gate {figure(r.gate)}, {r.category}): {quoted(r.prompt)}",
                        "", f"*base:* {quoted(by['base', r.id].output)}",
                        "", f"*prism:* {quoted(r.output)}"]
    area, low, high = auc([r.gate for r in routed if r.category in distilled],
                          [r.gate for r in routed if r.category not in distilled])
    told = "-" if area is None else f"{area:.3f} [{low:.3f}, {high:.3f}]"
    return "\n".join([
        "", "## own, by route", "", "The rule's share of held-out queries, by the gate's decision.",
        "", table(["gate", "n", *names, "changed by prism"], lines), "",
        f"Gate AUC, queries of contexts that were distilled against all others: {told}.",
        *samples, ""])


def show(cell: dict | None, plain: bool) -> str:
    """A cell of the table."""
    if not cell or cell.get("mean") is None:
        return "-"
    shown = figure(cell["mean"])
    if not plain and any(cell.get("interval", ())):  # no difference at all needs no words
        low, high = cell["interval"]
        few = "" if cell["pairs"] == cell["n"] else f" on {cell['pairs']}"
        shown += f" ({cell['difference']:+.3f}{few} [{low:+.3f}, {high:+.3f}])"
        if cell.get("recovery") is not None:
            low, high = cell["recovery_interval"]
            shown += f" r {cell['recovery']:.2f} [{low:.2f}, {high:.2f}]"
        elif "recovery" in cell:
            shown += " r -"
    return shown


def plot(results: dict, folder: Path) -> list[str]:
    """PNGs: bars with intervals, the persona matrix, routing; none without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return []
    made = []

    def save(name: str) -> None:
        plt.tight_layout()
        plt.savefig(folder / name, dpi=120)
        plt.close()
        made.append(name)

    rows = []  # of the persona matrix
    for task, categories in results["tasks"].items():
        for category, metrics in categories.items():
            metric, cells = next(iter(metrics.items()))
            if any(s.startswith("persona:") for s in cells):
                rows.append((f"{task}/{category}", cells))
            cells = {s: c for s, c in cells.items() if c.get("mean") is not None}
            if not cells or (category != "all" and "all" in categories):
                continue
            low, high = np.array([c.get("interval", [0, 0]) for c in cells.values()]).T
            middle = np.array([c.get("difference", 0) for c in cells.values()])
            plt.figure(figsize=(max(4, len(cells)), 3))
            plt.bar(list(cells), [c["mean"] for c in cells.values()], capsize=3,
                    yerr=np.stack((middle - low, high - middle)).clip(0))
            name = f"{task}, {category}: {metric}".replace("$", r"\$")
            plt.title(f"{name}\n95% interval of the difference to base")
            plt.xticks(rotation=45, ha="right")
            safe = re.sub(r"[^\w-]", "_", category)
            save(f"{task}.png" if category == "all" else f"{task}_{safe}.png")
    if rows:
        names = [s for s in rows[0][1] if s.startswith("persona:")]
        grid = np.array([[cells[s].get("difference", 0.0) for s in names] for _, cells in rows])
        grid /= np.abs(grid).max(1, keepdims=True).clip(1e-9)
        plt.figure(figsize=(1 + len(names) * 0.7, 1 + len(rows) * 0.4))
        plt.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        plt.xticks(range(len(names)), [n.removeprefix("persona:") for n in names], rotation=60)
        plt.yticks(range(len(rows)), [name for name, _ in rows])
        plt.title("difference to base, each row scaled")
        save("persona_matrix.png")
    points = results["routing"]["points"]
    if points:
        plt.figure(figsize=(5, 4))
        plt.scatter([p["routed"] for p in points], [p["effect"] for p in points])
        for p in points:
            plt.annotate(p["category"].replace("$", r"\$"), (p["routed"], p["effect"]), fontsize=7)
        plt.xlabel("share routed to the adapter")
        plt.ylabel("expert's effect, points")
        save("routing.png")
    return made


# --------------------------------------------------------------------------------------------------
# The command

RUN_TASKS = ("kl", "latency", "own", "routing")  # of a whole run
# On the run's own queries: by a gate that was not fitted on them.
OWN_TASKS = {"kl", "latency", "own"}
OPPOSED = ("xstest", "jailbreakbench")  # half should be refused, half should not: no mean of both
RECOVERABLE = ("accuracy", "centred", "refusal", "rating", "win", "kl",
               "rule")  # scores, not diagnostics
TASKS = (*CHOICE_TASKS, *CHAT_TASKS, *RUN_TASKS)
STRATEGIES = ("base", "expert", "random_persona", "neutral", "ungated", "random_gate",
              "oracle_gate", "gated_prompt", "sft", "prism")
WEIGHTS_AND_GATE = {"ungated": ("adapter",), "random_gate": ("adapter", "random"),
                    "oracle_gate": ("adapter", "oracle"), "gated_prompt": ("base", "gate"),
                    "sft": ("sft",), "prism": ("adapter", "gate")}  # of others: the base, no gate
WITH_ADAPTER = [name for name in WEIGHTS_AND_GATE if name != "sft"]
STUDIES = ("length", "placement", "persona-matrix")


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: comma-separated names out of `known`."""
    def parse(value: str) -> list[str]:
        names = [n.strip() for n in value.split(",") if n.strip()]
        if not names or set(names) - set(known):
            wrong = ", ".join(n for n in names if n not in known) or repr(value)
            raise argparse.ArgumentTypeError(f"{wrong}: choose from {', '.join(known)}")
        return list(dict.fromkeys(names))
    return parse


def parser() -> argparse.ArgumentParser:
    """The command line of evaluate.py."""
    p = Parser(description="Compare strategies on benchmarks: the base, an expert persona's "
               "prompt, controls, the adapter always on, PRISM. Exit status 0 done, 2 wrong input, "
               "130 interrupted; the same command continues.")
    what = p.add_argument_group("what is compared")
    what.add_argument("--adapter", metavar="DIR|ID", help="adapter folder written by train.py, or "
                      "the user/name of one on the hub")
    what.add_argument("--model", help="model id or folder (default: the adapter's own base, else "
                      f"{DEFAULT_MODEL})")
    what.add_argument("--personas", type=Path, default=Path(__file__).parent / "personas",
                      help="folder of *.txt contexts (default: personas/ beside evaluate.py)")
    what.add_argument("--strategies", type=names_of(STRATEGIES), help="comma-separated, of "
                      f"{', '.join(STRATEGIES)} (default: all that --adapter and --sft-adapter "
                      "allow); base is always among them")
    what.add_argument("--sft-adapter", metavar="DIR|ID", help="adapter of train.py --loss sft, "
                      "always on")
    what.add_argument("--study", type=names_of(STUDIES), default=[], help="length: personas/min "
                      "and personas/short as experts; placement: the persona in front of the "
                      "user's message; persona-matrix: every persona on every category")
    data = p.add_argument_group("on what")
    data.add_argument("--tasks", type=names_of(TASKS), required=True,
                      help=f"comma-separated, of {', '.join(TASKS)}")
    data.add_argument("--data", help="folder with the benchmarks as their authors publish them, or "
                      "the hub's dataset repository (user/name) that holds such folders")
    data.add_argument("--split", choices=("test", "val", "train", "dev"),
                      help="default: test where there is one")
    data.add_argument("--limit", type=int, help="at most so many items a task, evenly spaced")
    data.add_argument("--shots", type=int, default=0, help="MMLU only: 0 (default) asks in the "
                      "chat template, 5 in the classic raw layout with examples of the dev split")
    data.add_argument("--judge-model", metavar="ID|DIR",
                      help="MT-Bench's judge (default: the base)")
    data.add_argument("--judge", type=Path, metavar="FILE.py", help="the task own: a rule, as in "
                      "train.py --judge")
    run = p.add_argument_group("run")
    run.add_argument("--out", type=Path, help="default: eval/ in the adapter's folder, or out/eval "
                     "(also where the adapter comes from the hub)")
    run.add_argument("--max-new-tokens", type=int, default=512, help="longest answer; default 512")
    run.add_argument("--seed", type=int, default=0, help="default %(default)s")
    run.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    run.add_argument("--dtype", default="auto", help="auto (default), bfloat16, float32, float16")
    return p


def check(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags and refuse what does not go together."""
    for name, low in (("limit", 1), ("max_new_tokens", 1), ("shots", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value <= 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {value}, it must be in [{low}, 1e6]")
    if args.strategies is None:
        args.strategies = [s for s in STRATEGIES if not (
            (s in WITH_ADAPTER and not args.adapter)
            or (s == "sft" and not args.sft_adapter))]
    args.strategies = ["base", *(s for s in args.strategies if s != "base")]
    if not args.adapter and set(args.strategies) & set(WITH_ADAPTER):
        raise InputError(f"the strategies {', '.join(WITH_ADAPTER)} need --adapter")
    if "sft" in args.strategies and not args.sft_adapter:
        raise InputError("the strategy sft needs --sft-adapter (train.py --loss sft)")
    if set(args.tasks) & set(RUN_TASKS) and not args.adapter:
        raise InputError(f"the tasks {', '.join(RUN_TASKS)} need --adapter, the folder of a whole "
                         "run")
    if "own" in args.tasks and not args.judge:
        raise InputError("the task own needs --judge, the file of a rule (docs/forking.md)")
    reading = [task for task in args.tasks if task not in OWN_TASKS]
    if reading and not args.data:
        raise InputError(f"--tasks {','.join(reading)}: needs --data")
    if args.out is None:
        own = args.adapter and Path(args.adapter).is_dir()  # nothing is written to the hub's cache
        args.out = Path(args.adapter) / "eval" if own else Path("out/eval")
    for name in ("adapter", "sft_adapter"):
        if getattr(args, name) is not None:
            setattr(args, name, resolve_adapter(getattr(args, name)))


def data_folder(name: str | None) -> Path | None:
    """--data: a folder, or a dataset repository of the hub, downloaded."""
    if name is None or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"--data {name}: no such folder, and not to be had from the hub "
                         f"({type(error).__name__})") from None


def read_tasks(args: argparse.Namespace) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """The items of every task that reads --data, and MMLU's examples by subject."""
    folder, items, shots = data_folder(args.data), {}, defaultdict(list)
    for task in args.tasks:
        if task in RUN_TASKS:
            continue
        read = CHOICE_TASKS[task] if task in CHOICE_TASKS else CHAT_TASKS[task][0]
        found = read(folder, args.split)
        if not found:
            split = args.split or "default"
            raise InputError(f"--data {args.data}: no items for {task} in the {split} split; it "
                             "should be there as its authors publish it (docs/results.md)")
        twice = [i for i, n in Counter(item.id for item in found).items() if n > 1]
        if twice:
            raise InputError(f"--data {args.data}: {task} has {twice[0]!r} more than once; keep "
                             "one of its files")
        step = len(found) / min(args.limit or len(found), len(found))
        items[task] = [found[int(i * step)] for i in range(round(len(found) / step))]
    if args.shots and "mmlu" in items:
        for item in read_mmlu(folder, "dev"):
            shots[item.subject] += [item] if len(shots[item.subject]) < args.shots else []
        lacking = {i.subject for i in items["mmlu"] if len(shots[i.subject]) < args.shots}
        if lacking:
            raise InputError(f"--shots {args.shots}: not so many examples in mmlu/dev for "
                             f"{sorted(lacking)[0]}")
    return items, shots


def read_queries(task: str, args: argparse.Namespace, personas: dict[str, str]) -> list[Item]:
    """The run's held-out queries, whose experts are their personas: at most --limit, for latency
    at most LATENCY_QUERIES."""
    pairs, _, held = read_verdicts(args.adapter)
    lacking = {p.persona for p in pairs} - personas.keys()
    if lacking and "expert" in args.strategies:
        raise InputError(f"{args.adapter / 'answers.jsonl'}: its persona {sorted(lacking)[0]!r} is "
                         f"not in --personas {args.personas}; give those of the run, or leave out "
                         "the strategy expert")
    queries = [Item(task, f"{p.persona}/{p.index}", p.persona, (p.query.strip(),))
               for p in pairs if (p.persona, p.index) in held]
    if not queries:
        raise InputError(f"{args.adapter}: no query was held out, so there is nothing to measure; "
                         f"leave out the task {task}")
    most = LATENCY_QUERIES if task == "latency" else len(queries)
    count = min(args.limit or most, most)
    return queries[::max(1, len(queries) // count)][:count]


def expert_of(item: Item) -> str:
    """The name of the persona that should shine on an item."""
    if item.task in RUN_TASKS:
        return item.category
    return EXPERTS.get(f"{item.task}/{item.category}", EXPERTS.get(item.task, "helpful"))


def neutral(persona: Callable[[Item], str]) -> Callable[[Item], str]:
    """NEUTRAL in as many words as an item's persona has."""
    def text_for(item: Item) -> str:
        n, words = len(persona(item).split()), NEUTRAL.split()
        return " ".join((words * (n // len(words) + 1))[:n])
    return text_for


def make_strategies(args: argparse.Namespace, personas: dict[str, str],
                    items: Iterable[Item]) -> list[Strategy]:
    """The strategies that are asked for, those of --study among them.

    Raises:
        InputError: an item's expert is not among the personas.
    """
    experts = {expert_of(item) for item in items}

    def expert(folder: Path) -> Callable[[Item], str]:
        texts = load_personas(folder)
        if len(texts) == 1:
            return lambda item: next(iter(texts.values()))
        lacking = sorted(experts - set(texts))
        if lacking:
            raise InputError(f"--personas {folder}: no {lacking[0]}.txt, the expert of a task; add "
                             "it, leave out the strategies and studies that need it, or give one "
                             "context only")
        return lambda item: texts[expert_of(item)]

    def other(item: Item) -> str:
        at = derive_seed(args.seed, "persona", item.task, item.id) % len(personas)
        return list(personas.values())[at]

    chosen = []
    for name in args.strategies:
        text = other if name == "random_persona" else None
        if name in ("expert", "neutral", "gated_prompt"):
            text = expert(args.personas)
        if name == "neutral":
            text = neutral(text)
        chosen.append(Strategy(name, text, *WEIGHTS_AND_GATE.get(name, ())))
    if "length" in args.study:
        chosen += [Strategy(f"expert_{name}", expert(args.personas / name))
                   for name in ("min", "short")]
    if "placement" in args.study:
        chosen.append(Strategy("expert_user", expert(args.personas), in_user=True))
    if "persona-matrix" in args.study:
        chosen += [Strategy(f"persona:{name}", lambda item, t=text: t)
                   for name, text in personas.items()]
    return chosen


def load_models(args: argparse.Namespace) -> dict[str, Weights]:
    """What is under test, "base" and perhaps "adapter" and "sft", and MT-Bench's "judge":
    --judge-model, or the base itself."""
    trained = args.adapter or args.sft_adapter
    name = args.model if args.model is not None else (
        read_settings(trained)["base_model"] if trained else None) or DEFAULT_MODEL
    device = choose_device(args.device)
    net = load(name, device, choose_dtype(args.dtype, device))
    tokenizer = Tokenizer(net.folder, run_date(args.adapter))
    base = Weights(weights_name(net), net, tokenizer)
    models = {"base": base, "judge": base}
    for kind, folder in (("adapter", args.adapter), ("sft", args.sft_adapter)):
        if folder:
            prism, settings = PRISM.load(folder, net), read_settings(folder)
            scale = [settings[n] for n in ("alpha", "rank", "gate_layer", "gate_pool")]
            digest = sha256((folder / ADAPTER_FILE).read_bytes())
            models[kind] = Weights(f"{base.name} {scale} {digest}", prism, tokenizer)
    if args.judge_model and "mt_bench" in args.tasks:
        net = load(args.judge_model, net.device, net.dtype)
        models["judge"] = Weights(weights_name(net), net, Tokenizer(net.folder, tokenizer.now))
    return models


def weights_name(net: Transformer) -> str:
    """What tells a base model's results apart; the tokenizer decodes them."""
    tokenizer = sha256((net.folder / "tokenizer.json").read_bytes())
    return f"{fingerprint(net.folder)} {tokenizer} {net.dtype} {net.device.type}"


def sha256(content: bytes) -> str:
    """Its hash."""
    return hashlib.sha256(content).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Read everything, answer everything, then compare."""
    check(args)
    items, shots = read_tasks(args)
    personas = load_personas(args.personas)
    # Now, not after hours.
    own = {task: read_queries(task, args, personas) for task in ("latency", "own")
           if task in args.tasks}
    strategies = make_strategies(args, personas, [
        i for some in (items | own).values() for i in some])
    rule = Rule(args.judge) if args.judge else None
    if "kl" in args.tasks:
        check_run(args.adapter, personas)
    prompts = {}
    if "routing" in args.tasks:
        check_file(args.adapter / "queries.jsonl")
        prompts = read_real_prompts(data_folder(args.data))
    models = load_models(args)
    prism = models["adapter"].model if args.adapter else None
    if prompts and prism.gate is None:
        raise InputError(f"{args.adapter}: no gate came with this adapter, so there is no routing")
    tokenizer = models["base"].tokenizer
    items, skipped = drop_long(items, strategies, models["base"])
    items |= own
    with RunFolder(args.out):
        contexts = [name for name in personas if not is_contrast(name)]
        e = Evaluator(models, Work(args.out / "work.jsonl"), args.seed, args.max_new_tokens,
                      contexts)
        rows: list[Row] = []
        unseen = None
        if OWN_TASKS & set(args.tasks) and prism.gate is not None:
            unseen = held_out_gate(prism, tokenizer, args.adapter)
            saved = prism.gate, prism.threshold
        for task in args.tasks:
            if unseen:
                prism.gate, prism.threshold = unseen if task in OWN_TASKS else saved
            rows += run_task(e, task, items.get(task, []), shots, strategies, personas, rule, args)
        if unseen:
            prism.gate, prism.threshold = saved
        probes = None
        if prompts:
            queries = RunFolder(args.adapter).read("queries.jsonl", Query)
            probes = measure_probes(prism, tokenizer, queries, prompts, args.seed)
        write_results(args, e, rows, personas, strategies, skipped, probes)
    return 0


def drop_long(items: dict[str, list[Item]], strategies: Sequence[Strategy],
              base: Weights) -> tuple[dict[str, list[Item]], dict[str, int]]:
    """Leave out, for all strategies, the items whose first turn does not fit into the context under
    one of them; how many of each task.

    Raises:
        InputError: nothing of a task is left.
    """
    kept, skipped, context = {}, {}, base.net.config.max_position_embeddings
    for task, some in items.items():
        longest = [max((s.persona(item) for s in strategies if s.persona), key=len, default="")
                   for item in some]
        kept[task] = [item for item, system in zip(some, longest)
                      if len(base.tokenizer.encode(system + item.turns[0])) + CONTEXT_ROOM
                      < context]
        if not kept[task]:
            raise InputError(f"no item of {task} fits into the model's context of {context} "
                             "tokens")
        if len(kept[task]) < len(some):
            skipped[task] = len(some) - len(kept[task])
    return kept, skipped


def run_task(e: Evaluator, task: str, items: list[Item], shots: dict, strategies: list[Strategy],
             personas: dict[str, str], rule: Rule | None, args: argparse.Namespace) -> list[Row]:
    """The rows of one task under all strategies."""
    if task in CHOICE_TASKS:
        return run_choices(e, task, items, strategies, shots if task == "mmlu" else {})
    if task == "routing":
        return []  # measured on the gate alone, see `measure_probes`
    if task == "kl":
        return run_kl(e, strategies, args.adapter, personas, args.limit)
    if task == "latency":
        return run_latency(e, strategies, items)
    if task == "own":
        return run_own(e, strategies, items, rule)
    rows = run_chats(e, task, items, strategies, CHAT_TASKS[task][1])
    if task == "mt_bench":
        rows = judge_talks(rows, items, e.models["judge"], e.work)
    if task == "ifeval":
        for s in strategies:
            write_file(args.out / f"ifeval_{s.name.replace(':', '_')}.jsonl", "".join(
                json.dumps({"prompt": r.prompt, "response": r.output}, ensure_ascii=False) + "\n"
                for r in rows if r.strategy == s.name))
    return rows


def write_results(args: argparse.Namespace, e: Evaluator, rows: Sequence[Row],
                  personas: dict[str, str], strategies: Sequence[Strategy],
                  skipped: dict[str, int], probes: dict | None) -> None:
    """items.jsonl, results.json, table.md and the plots."""
    tasks = summarize(rows)
    cost = {task: e.work.cost(task) for task in e.work.used}
    letters = {}
    if set(args.tasks) & set(CHOICE_TASKS):
        letters = {a: repr(e.tokenizer.decode([i])) for a, i in zip(LETTERS, letter_tokens(
            e.tokenizer, bool(args.shots) and "mmlu" in args.tasks))}
    judge = args.judge_model or f"the base itself ({e.net.name})"
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value
                     for name, value in vars(args).items()} | {
            "model": e.net.name, "dtype": str(e.net.dtype).removeprefix("torch."),
            "device": e.net.device.type, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "threshold": e.prism.threshold if e.prism and e.prism.gate else None,
            "letters": letters, "judge": judge, "experts": EXPERTS},
        "skipped": skipped, "tasks": tasks,
        "overall": overall(rows, [s.name for s in strategies]),
        "routing": routing(tasks), "cost": cost, "probes": probes}
    notes = [f"Model {e.net.name} in {results['settings']['dtype']} on {e.net.device.type}; "
             f"adapter {args.adapter}; answers of at most {args.max_new_tokens} tokens."]
    if letters:
        notes.append("Letters are read as " + ", ".join(letters.values()) + (
            f", MMLU after {args.shots} raw examples." if args.shots else
            ", in the chat template."))
    if OWN_TASKS & set(tasks):
        notes.append("kl, latency and own route held-out queries by a gate fitted without them; "
                     "all other tasks route by the adapter's own gate.")
    notes += [f"{n} items of {task} do not fit into the context and were left out."
              for task, n in skipped.items()]
    if "mt_bench" in tasks:
        notes.append(f"MT-Bench's judge is {judge}"
                     + ("." if args.judge_model else ": its figures are not independent."))
    if len(personas) == 1:
        notes.append(f"The expert is {next(iter(personas))} everywhere.")
    else:
        notes.append("Experts: " + ", ".join(f"{t} {p}" for t, p in EXPERTS.items()
                                             if t.split("/")[0] in tasks) + ".")
    write_file(args.out / "items.jsonl", "".join(
        json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows))
    write_file(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    page = report(results, notes)
    if "own" in tasks:
        distilled = {p.persona for p in won_pairs(*read_verdicts(args.adapter)[:2])}
        page += own_report([r for r in rows if r.task == "own"], distilled)
    if probes:
        page += f"\n{probe_table(probes)}\n"
    write_file(args.out / "table.md", page)
    pictures = plot(results, args.out)
    print(f"{page}\nsaved in {args.out}: results.json, items.jsonl, table.md"
          + "".join(f", {name}" for name in pictures))


if __name__ == "__main__":
    sys.exit(main())
