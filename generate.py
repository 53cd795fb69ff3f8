"""The decoding engine, and a small command on top of it.

The engine keeps a fixed number of slots busy: prompts are read in groups, every step advances all
slots by one token, and a slot that finishes is refilled at once from the queue (continuous
batching, Orca, OSDI 2022). Rows stay ordered gated-first, so one step serves adapted and base rows
together. The engine knows token ids only; `generate` renders conversations and decodes answers.

What was simplified: no paged cache (one row a slot, as long as the longest request needs), and a
prompt is read whole, not in pieces between decoding steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support.hub import (DEFAULT_MODEL, InputError, Parser, check_file, exit_status, read_json,
                 resolve_adapter)
from model import KVCache, Transformer, choose_device, choose_dtype, load, token_ids, upload
from prism import PRISM, Router, only_peft, read_settings
from tokenizer import Tokenizer, check_messages


# --explain: 256-colour backgrounds and the KL (nats) from which each is used
SHADES = ("", "\x1b[48;5;230m\x1b[30m", "\x1b[48;5;222m\x1b[30m", "\x1b[48;5;208m\x1b[30m",
          "\x1b[48;5;160m\x1b[97m")
SHADE_LIMITS = (0.02, 0.1, 0.4, 1.5)
WIDEST = 8  # gaps that are listed


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; top_k 0 and top_p 1 leave everything in."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.max_new_tokens <= 10**6:  # each has its random number, drawn beforehand
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, it must be in [1, 1000000]")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}, it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, it must be in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, it must be 0 (off) or more")


@dataclass
class Request:
    """One prompt for the engine.

    `prefix` leading ids are shared with other requests of the same run and are read only once;
    `user_mask` marks the last user text for a gate that pools by mean.
    """

    ids: list[int]
    seed: int = 0
    prefix: int = 0
    user_mask: list[bool] | None = None


@dataclass
class Output:
    """What the engine made of request `index`: sampled ids (the stop token included), the reason it
    stopped ("eos" or "length"), the gate's probability (None without one) and its route."""

    index: int
    ids: list[int] = field(default_factory=list)
    stop: str | None = None
    gate: float | None = None
    routed: bool = False


@dataclass(frozen=True)
class Completion:
    """One answer: its text without control tokens, its ids as sampled, gate probability, route
    (True: the adapter answered), stop reason ("eos" or "length") and the prompt's token count."""

    text: str
    ids: list[int]
    gate: float | None
    routed: bool
    stop: str
    prompt_tokens: int


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts (run seed, stage, row ...): one row's draws depend on nothing
    but its own name, so neither batching nor resuming can change them."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw one token a row from logits [n, V] with one uniform number [n] each; returns ids [n],
    V where the logits are not finite.

    Inverse-transform sampling: exp, cumsum and searchsorted cost one pass each over the vocabulary
    (2.4 ms for 8 x 152k on CPU where torch.multinomial takes 26). The probabilities need no
    divisor: the number drawn is scaled by their sum instead.
    """
    if sampling.temperature < torch.finfo(torch.float32).tiny:  # would be 0 / 0
        top = logits.max(-1)  # the first maximum, like argmax, at a quarter of its time
        return torch.where(top.values.isfinite(), top.indices, logits.shape[-1])
    z = logits.float()
    top = z.amax(-1, keepdim=True)  # NaN or infinite if any logit is
    z = (z - top).div_(sampling.temperature)  # max first: T -> 0 cannot overflow
    ids = None
    if sampling.top_k and sampling.top_k < z.shape[-1]:
        z, ids = z.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        z, ids = z.sort(dim=-1, descending=True)
    p = z.exp_()
    cdf = p.cumsum(-1)
    if sampling.top_p < 1:  # the first token always stays
        cdf = p.masked_fill_(cdf - p >= sampling.top_p * cdf[:, -1:], 0.0).cumsum(-1)
    total = cdf[:, -1:]
    # Strictly below the total, and `right`: the drawn token always has probability above zero.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform[:, None] * total, below)
    drawn = torch.searchsorted(cdf, target, right=True)
    drawn = drawn.clamp(max=cdf.shape[-1] - 1)  # past the end where the sums are NaN
    drawn = drawn if ids is None else ids.gather(-1, drawn)
    return torch.where(top.isfinite(), drawn, logits.shape[-1]).squeeze(-1)


def alike(rows: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Rows in groups of like length, where padding adds a quarter at most."""
    groups: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda r: (len(r), r)):
        if groups and len(row) <= 1.25 * len(groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class PrefixReader:
    """Reads rows of ids, a beginning that rows share only once; all through the base model, or all
    with an adapter on.

    `tokens` counts what really went through the model; `keep`: shared ids whose keys and values are
    held for later calls, the oldest are dropped first.
    """

    def __init__(self, net: Transformer, adapter: nn.ModuleList | None = None, keep: int = 16384):
        self.net, self.adapter, self.tokens, self.keep = net, adapter, 0, keep
        # shared ids -> the cache that holds them, and its row
        self.prefixes: dict[tuple[int, ...], tuple[KVCache, int]] = {}

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]],
             shared: Sequence[int]) -> tuple[Tensor, Tensor, KVCache]:
        """Run every row from position shared[i] on, after its first shared[i] ids.

        Returns the last layer's states [B, T, d] (before the final norm, right-padded), the lengths
        [B] of those remainders, and the cache, which holds the whole rows.
        """
        net, layers = self.net, range(len(self.net.layers))
        while sum(map(len, self.prefixes)) > self.keep:
            del self.prefixes[next(iter(self.prefixes))]
        begun = {tuple(row[:n]) for row, n in zip(rows, shared) if n}
        for group in alike(begun - self.prefixes.keys()):
            ids, _ = pad(group, net.device)
            cache = net.new_cache(*ids.shape)
            net.run(net.embed(ids), net.span(ids.shape, cache), layers, self.adapter, len(group))
            self.prefixes |= {prefix: (cache, at) for at, prefix in enumerate(group)}
            self.tokens += sum(map(len, group))
        ids, lengths = pad([row[n:] for row, n in zip(rows, shared)], net.device)
        self.tokens += sum(len(row) - n for row, n in zip(rows, shared))
        keys = max(shared) + ids.shape[1]
        cache = net.new_cache(len(rows), keys)
        for at, (row, n) in enumerate(zip(rows, shared)):
            if n:
                cache.copy(at, *self.prefixes[tuple(row[:n])], n)
        start = upload(torch.tensor(shared), net.device) if any(shared) else None
        span = net.span(ids.shape, cache, start, keys)
        return net.run(net.embed(ids), span, layers, self.adapter, len(rows)), lengths, cache


class Engine:
    """Continuous batching over `slots` rows.

    Args:
        model: a base Transformer, or a PRISM that routes each prompt.
        sampling: shared by all requests; draws come from each request's own seed.
        stop_ids: token ids that end an answer.
        slots: rows decoded together. A setting, never derived from free memory: results may differ
            in the last bits between batch shapes.
        gate: "auto", "on" or "off" (see PRISM.prefill); a bare Transformer ignores it.
    """

    def __init__(self, model: Transformer | PRISM, sampling: Sampling, stop_ids: set[int],
                 slots: int = 16, gate: str = "auto"):
        self.prism = model if isinstance(model, PRISM) else None
        self.net: Transformer = model.net if isinstance(model, PRISM) else model
        self.adapter = self.prism.adapter if self.prism else None
        self.sampling, self.stop_ids, self.slots, self.gate = sampling, stop_ids, slots, gate
        self.reader = PrefixReader(self.net)
        self.new_tokens = 0
        self.on_token: Callable[[int, int], None] | None = None
        self.limits: list[int] = []  # most new tokens of each request
        self.rows: list[Output] = []  # what each busy slot is working on, gated rows first
        self.lengths: list[int] = []  # tokens in each busy slot's cache
        self.uniforms: list[Tensor] = []  # [max_new_tokens] draws of each busy slot
        self.k = 0  # leading slots whose route is the adapter

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens read by the model so far, shared prefixes counted once."""
        return self.reader.tokens

    @torch.inference_mode()
    def run(self, requests: Sequence[Request],
            on_token: Callable[[int, int], None] | None = None) -> Iterator[Output]:
        """Answer all requests; yields each Output when it is finished, in no particular order.

        Args:
            on_token: called with (request index, token id) as soon as a token is drawn.
        """
        context, self.on_token = self.net.config.max_position_embeddings, on_token
        self.limits = [min(self.sampling.max_new_tokens, context - len(r.ids)) for r in requests]
        for i, limit in enumerate(self.limits):
            if limit < 1 or not requests[i].ids:
                raise InputError(f"prompt {i} has {len(requests[i].ids)} tokens; the model reads "
                                 f"between 1 and {context - 1}")
        # Neighbours in the queue have like lengths: little padding while reading prompts.
        queue = sorted(range(len(requests)), key=lambda i: (len(requests[i].ids), i))
        capacity = max((len(r.ids) + n for r, n in zip(requests, self.limits)), default=0)
        self.cache = self.net.new_cache(min(self.slots, len(requests)), capacity)
        while queue or self.rows:
            if queue and len(self.rows) < self.slots:
                group = queue[:self.slots - len(self.rows)]
                del queue[:len(group)]
                self._admit(group, requests)
            else:
                self._step()
            yield from self._collect()

    def _admit(self, group: list[int], requests: Sequence[Request]) -> None:
        """Read the prompts of `group`, draw their first tokens, and give each a slot."""
        chosen = [requests[i] for i in group]
        probability, order, k = None, list(range(len(group))), 0
        if self.prism is None:
            x, lengths, cache = self.reader.read([r.ids for r in chosen],
                                                 [r.prefix for r in chosen])
            hidden = self.net.norm(x[torch.arange(len(group), device=x.device), lengths - 1])
        else:
            ids, lengths = pad([r.ids for r in chosen], self.net.device)
            self.reader.tokens += sum(len(r.ids) for r in chosen)
            cache, mask = self.net.new_cache(*ids.shape), None
            if chosen[0].user_mask is not None:
                mask = pad([r.user_mask for r in chosen], self.net.device)[0].bool()
            routed = self.prism.prefill(ids, lengths, self.gate, cache, mask)
            hidden, order, k = routed.hidden, routed.order, routed.k
            probability = routed.probability
        rows = [Output(group[i], gate=probability[i] if probability else None, routed=at < k)
                for at, i in enumerate(order)]
        draws = [self._draws(requests[row.index].seed) for row in rows]
        first = sample(self.net.head(hidden), self.sampling, torch.stack([d[0] for d in draws]))
        for at, (row, token) in enumerate(zip(rows, first.tolist())):
            self._append(row, token)
            self._insert(row, draws[at], cache, at, len(requests[row.index].ids))
        self._upload()

    def _draws(self, seed: int) -> Tensor:
        """The uniform numbers of one request, drawn on the host so that devices agree."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(self.sampling.max_new_tokens, generator=generator)
        return upload(draws, self.net.device)

    def _insert(self, row: Output, draws: Tensor, source: KVCache, source_row: int,
                length: int) -> None:
        """Give `row` a slot: the end, or (gated) the end of the gated rows, whose successor moves
        to the end. One row of the cache is copied, two when one has to move."""
        at = len(self.rows)
        for held in (self.rows, self.lengths, self.uniforms):
            held.append(None)
        if row.routed:
            if self.k < at:
                self._move(self.k, at)
            at, self.k = self.k, self.k + 1
        self.cache.copy(at, source, source_row, length)
        self.rows[at], self.lengths[at], self.uniforms[at] = row, length, draws

    def _move(self, source: int, target: int) -> None:
        """Slot `target` takes over what slot `source` was working on."""
        self.cache.copy(target, self.cache, source, self.lengths[source])
        for held in (self.rows, self.lengths, self.uniforms):
            held[target] = held[source]

    def _remove(self, at: int) -> None:
        """Free slot `at`, filling the hole so that rows stay dense and gated-first."""
        if at < self.k:
            self.k -= 1
            if at != self.k:
                self._move(self.k, at)
            at = self.k
        last = len(self.rows) - 1
        if at != last:
            self._move(last, at)
        for held in (self.rows, self.lengths, self.uniforms):
            held.pop()

    def _upload(self) -> None:
        """Mirror the slots' state on the device; needed only when their composition changed."""
        device = self.net.device
        self.tokens = upload(torch.tensor([row.ids[-1] for row in self.rows]), device)
        self.start = upload(torch.tensor(self.lengths), device)
        self.steps = upload(torch.tensor([[len(row.ids)] for row in self.rows]), device)
        self.draws = torch.stack(self.uniforms) if self.rows else None

    def _step(self) -> None:
        """Advance every busy slot by one token; the `tolist` is the step's only wait."""
        net = self.net
        span = net.span((len(self.rows), 1), self.cache, self.start, max(self.lengths) + 1)
        x = net.run(net.embed(self.tokens[:, None]), span, range(len(net.layers)), self.adapter,
                    self.k)
        uniform = self.draws.gather(1, self.steps).squeeze(1)
        self.tokens = sample(net.head(net.norm(x[:, -1])), self.sampling, uniform)
        self.start, self.steps = self.start + 1, self.steps + 1
        self.lengths = [n + 1 for n in self.lengths]
        for row, token in zip(self.rows, self.tokens.tolist()):
            self._append(row, token)

    def _append(self, row: Output, token: int) -> None:
        """Note a newly drawn token and report it."""
        if token >= self.net.config.vocab_size:
            raise InputError(f"prompt {row.index}: the model's logits are not finite after "
                             f"{len(row.ids)} tokens; try --dtype float32")
        row.ids.append(token)
        if self.on_token:
            self.on_token(row.index, token)

    def _collect(self) -> list[Output]:
        """Free the slots whose answers are complete and return these."""
        finished = []
        for at in reversed(range(len(self.rows))):
            row = self.rows[at]
            if row.ids[-1] in self.stop_ids:
                row.stop = "eos"
            elif len(row.ids) >= self.limits[row.index]:
                row.stop = "length"
            if row.stop:
                finished.append(row)
                self.new_tokens += len(row.ids)
                self._remove(at)
        if finished:
            self._upload()
        return finished


def pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Right-pad rows of ids to [B, T]; also their lengths [B]. Causal attention never looks right,
    so what stands in the padding does not matter."""
    lengths = [len(r) for r in rows]
    padded = [list(r) + [0] * (max(lengths) - len(r)) for r in rows]
    return upload(torch.tensor(padded), device), upload(torch.tensor(lengths), device)


def stop_tokens(net: Transformer, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends a turn: generation_config.json's, config.json's and the template's."""
    ids = set(net.config.eos_token_ids) | tokenizer.end_of_turn_ids
    path = tokenizer.folder / "generation_config.json"
    if path.exists():
        ids |= set(token_ids(read_json(path), "eos_token_id", str(path)))
    return ids


def generate(model: Transformer | PRISM, tokenizer: Tokenizer, conversations: Iterable[list[dict]],
             sampling: Sampling | None = None, gate: str = "auto", batch_size: int = 16,
             on_token: Callable[[int, int], None] | None = None,
             progress: bool = False) -> list[Completion]:
    """Answer conversations ([{"role", "content"}, ...] each), in input order.

    Args:
        model: a PRISM routes every conversation; a bare Transformer answers as the base.
        gate: "auto" lets the gate decide, "on" and "off" force the route.
        batch_size: slots of the engine.
        on_token: called with (conversation index, token id) as tokens appear.
        progress: show a bar.
    """
    sampling = sampling or Sampling()
    mean = isinstance(model, PRISM) and model.gate_pool == "mean"
    requests = []
    for i, messages in enumerate(conversations):
        rendered = tokenizer.render(messages, return_user_mask=mean)
        ids, mask = rendered if mean else (rendered, None)
        requests.append(Request(ids, derive_seed(sampling.seed, i), user_mask=mask))
    net = model.net if isinstance(model, PRISM) else model
    stop_ids = stop_tokens(net, tokenizer)
    engine = Engine(model, sampling, stop_ids, batch_size, gate)
    done: dict[int, Completion] = {}
    bar = tqdm(total=len(requests), desc="answers", unit="prompt", disable=not progress)
    for out in engine.run(requests, on_token):
        text_ids = out.ids[:-1] if out.stop == "eos" else out.ids
        done[out.index] = Completion(tokenizer.decode(text_ids), out.ids, out.gate, out.routed,
                                     out.stop, len(requests[out.index].ids))
        bar.update()
    bar.close()
    return [done[i] for i in range(len(requests))]


def router(adapter: str | Path, device: str = "auto",
           dtype: str = "auto") -> Callable[[list[dict]], bool]:
    """`route(messages) -> bool`: whether a conversation should go to the adapter, for a server that
    has adapter and base loaded elsewhere. Only what the gate needs is loaded (prism.Router).
    `adapter` is a folder, or a user/name on the hub."""
    where, adapter = choose_device(device), resolve_adapter(adapter)
    if only_peft(adapter):
        return lambda messages: True  # trained elsewhere, without a gate: always on
    gate = Router(adapter, where, choose_dtype(dtype, where))
    tokenizer = Tokenizer(gate.net.folder)

    def route(messages: list[dict]) -> bool:
        ids, mask = tokenizer.render(messages, return_user_mask=True) if gate.kind == "mean" else (
            tokenizer.render(messages), None)
        ids, lengths = pad([ids], gate.net.device)
        mask = None if mask is None else torch.tensor([mask])
        return float(gate.probability(ids, lengths, mask)) >= gate.threshold

    return route


# --------------------------------------------------------------------------------------------------
# The command


def parser() -> argparse.ArgumentParser:
    """The command line of generate.py."""
    p = Parser(
        description="Answer prompts, routed through a PRISM adapter if one is given. Without "
        "--prompt or --prompts: an interactive chat. Exit status 0 done, 2 wrong input, "
        "130 interrupted.")
    what = p.add_argument_group("model")
    what.add_argument("--model", help="model id or folder (default: the adapter's own base, "
                      f"else {DEFAULT_MODEL})")
    what.add_argument("--adapter", metavar="DIR|ID", help="adapter folder written by train.py, or "
                      "the user/name of one on the hub; PEFT's have no gate and are always on")
    what.add_argument("--gate", choices=("auto", "on", "off"), default="auto",
                      help="auto: the gate decides per query (default); on/off: forced")
    what.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    what.add_argument("--dtype", default="auto", help="auto (default), bfloat16, float32, float16")
    ask = p.add_argument_group("prompts")
    ask.add_argument("--system", help="system message put before every prompt")
    ask.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    ask.add_argument("--prompts", type=Path, metavar="FILE.jsonl",
                     help='rows {"prompt": "..."} or {"messages": [{"role", "content"}, ...]}')
    ask.add_argument("--jsonl", action="store_true", help="print one JSON row per prompt")
    ask.add_argument("--explain", action="store_true", help="per prompt: the gate, both "
                     "answers, and where the adapter's distribution parts from the base's")
    draw = p.add_argument_group("sampling")
    draw.add_argument("--max-new-tokens", type=int, default=256, help="default %(default)s")
    draw.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default 0.7")
    draw.add_argument("--top-p", type=float, default=1.0, help="nucleus; default 1 (off)")
    draw.add_argument("--top-k", type=int, default=0, help="default 0 (off)")
    draw.add_argument("--seed", type=int, default=0, help="default %(default)s")
    draw.add_argument("--batch-size", type=int, default=16, help="slots; default %(default)s")
    return p


def read_prompts(path: Path) -> list[list[dict]]:
    """Conversations from a prompts file, one JSON object a line; blank lines are skipped.

    Raises:
        InputError: a line that is not such an object, by its number.
    """
    conversations = []
    check_file(path)  # a pipe would be waited for
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        elif isinstance(row, dict) and "messages" in row:
            messages = row["messages"]
        else:
            raise InputError(f'{path}, line {number}: needs "prompt" (text) or "messages" (a list)')
        try:
            conversations.append(check_messages(messages))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not conversations:
        raise InputError(f"{path}: no prompts in it")
    return conversations


def load_model(model: str | None, adapter: str | None, device: str,
               dtype: str) -> tuple[Transformer | PRISM, Tokenizer]:
    """The base model, wrapped in a PRISM if an adapter is given, and its tokenizer."""
    folder = None if adapter is None else resolve_adapter(adapter)
    name = model if model is not None else (
        read_settings(folder)["base_model"] if folder else None) or DEFAULT_MODEL
    where = choose_device(device)
    net = load(name, where, choose_dtype(dtype, where))
    return PRISM.load(folder, net) if folder else net, Tokenizer(net.folder)


def route_label(completion: Completion) -> str:
    """How a completion was routed, as the command prints it."""
    if completion.gate is None:
        return "[adapter]" if completion.routed else "[base]"
    return f"[gate {completion.gate:.2f} -> {'adapter' if completion.routed else 'base'}]"


@dataclass(frozen=True)
class Explanation:
    """One prompt seen from both sides: the two answers, and for every token of the adapted one its
    text and how far the adapter's distribution had parted from the base's, KL in nats."""

    base: Completion
    adapted: Completion
    tokens: list[str]
    kl: list[float]


@torch.inference_mode()
def explain(prism: PRISM, tokenizer: Tokenizer, messages: list[dict],
            sampling: Sampling) -> Explanation:
    """Answer a conversation by the base and by the adapter, whatever the gate says, and read the
    adapted answer with both: KL( P_lora(.|x, y_<t) || P(.|x, y_<t) ) at each of its tokens."""
    base, adapted = (generate(prism, tokenizer, [messages], sampling, gate, 1)[0]
                     for gate in ("off", "on"))
    prompt = tokenizer.render(messages)
    ids = torch.tensor([[*prompt, *adapted.ids]], device=prism.net.device)
    with_lora, without = (prism.net.head(prism.net.hidden(ids, prism.adapter, k)[
        0, len(prompt) - 1:-1]).float().log_softmax(-1) for k in (1, 0))  # [answer tokens, V] each
    kl = (with_lora.exp() * (with_lora - without)).sum(-1).clamp(min=0).tolist()
    # Differences of growing decodings: a token alone may be half a character.
    texts = [tokenizer.decode(adapted.ids[:i], skip_special_tokens=False).rstrip("\ufffd")
             for i in range(len(adapted.ids) + 1)]
    return Explanation(base, adapted, [b[len(a):] for a, b in zip(texts, texts[1:])], kl)


def show_explanation(e: Explanation, threshold: float, colour: bool) -> str:
    """An explanation for the terminal: answers, the adapted one shaded by KL, the widest gaps."""
    route = "no gate, so the adapter answers" if e.base.gate is None else (
        f"gate {e.base.gate:.2f}, threshold {threshold:.2f} -> "
        f"{'adapter' if e.base.gate >= threshold else 'base'}")
    shaded = "".join(f"{SHADES[sum(kl > limit for limit in SHADE_LIMITS)]}{token}\x1b[0m"
                     if colour else token for token, kl in zip(e.tokens, e.kl))
    widest = sorted(range(len(e.kl)), key=lambda i: -e.kl[i])[:WIDEST]
    gaps = ", ".join(f"{e.kl[i]:.2f} at {i} {e.tokens[i]!r}" for i in widest)
    mean = sum(e.kl) / len(e.kl)
    return (f"[{route}]\n\n"
            f"base:\n{e.base.text}\n\nadapted (darker: the distributions part more):\n{shaded}\n\n"
            f"KL(adapter || base): {mean:.3f} nats a token; widest {gaps}")


def chat(model: Transformer | PRISM, tokenizer: Tokenizer, sampling: Sampling, gate: str,
         system: str | None) -> int:
    """Talk in the terminal; every user turn re-reads the conversation and is routed anew."""
    messages = [{"role": "system", "content": system}] if system else []
    print("chat: an empty line or Ctrl-D ends it", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        ids: list[int] = []
        shown = ""

        def stream(_: int, token: int) -> None:
            nonlocal shown
            ids.append(token)
            whole = tokenizer.decode(ids)
            if not whole.endswith("\ufffd"):  # wait for the rest of a multi-byte character
                print(whole[len(shown):], end="", flush=True)
                shown = whole

        answer = generate(model, tokenizer, [messages], sampling, gate, 1, stream)[0]
        print(f"\n{route_label(answer)}", flush=True)
        # The template takes thoughts out, but cannot see where unfinished ones begin.
        said = answer.text if tokenizer.without_thoughts(answer.text) else ""
        messages.append({"role": "assistant", "content": said})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Load, then chat, or answer all prompts and print them in input order."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}, it must be at least 1")
    conversations = [[{"role": "user", "content": text}] for text in args.prompt]
    if args.prompts:
        conversations += read_prompts(args.prompts)
    if args.system:
        conversations = [c if c and c[0].get("role") == "system" else
                         [{"role": "system", "content": args.system}, *c] for c in conversations]
    if args.explain and not (conversations and args.adapter):
        raise InputError("--explain needs --adapter and a --prompt (or --prompts)")
    model, tokenizer = load_model(args.model, args.adapter, args.device, args.dtype)
    if args.explain:
        for i, messages in enumerate(conversations):
            e = explain(model, tokenizer, messages, replace(sampling, seed=sampling.seed + i))
            print(json.dumps({"index": i, "gate": e.base.gate, "base": e.base.text, "adapted":
                              e.adapted.text, "tokens": e.tokens, "kl": e.kl}, ensure_ascii=False)
                  if args.jsonl else show_explanation(e, model.threshold, sys.stdout.isatty())
                  + ("\n" if i + 1 < len(conversations) else ""))
        return 0
    if not conversations:
        return chat(model, tokenizer, sampling, args.gate, args.system)
    answers = generate(model, tokenizer, conversations, sampling, args.gate, args.batch_size,
                       progress=len(conversations) > 1 and sys.stderr.isatty())
    for i, a in enumerate(answers):
        if args.jsonl:
            print(json.dumps({"index": i, "text": a.text, "gate": a.gate, "routed": a.routed,
                              "prompt_tokens": a.prompt_tokens, "tokens": len(a.ids),
                              "stop": a.stop}, ensure_ascii=False))
        else:
            print(f"{route_label(a)} {a.text}" + ("\n" if i + 1 < len(answers) else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
