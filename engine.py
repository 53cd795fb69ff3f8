"""Batched decoding and reading: the engine knows token ids only.

It keeps a fixed number of slots busy: prompts are read in groups, every step advances all
slots by one token, and a slot that finishes is refilled at once from the queue (continuous
batching, Orca, OSDI 2022). Rows stay ordered gated-first, so one step serves adapted and base rows
together.

What was simplified: no paged cache (one row a slot, as long as the longest request needs), and a
prompt is read whole, not in pieces between decoding steps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from model import KVCache, Positions, Transformer
from prism import PRISM, last_states
from sampling import Sampling, sample
from support.config import kept_tokens
from support.device import batches, pad, upload
from support.distributed import progress_bar
from support.hub import InputError

# Steps of fixed shapes, rounded up to so many keys. Never run on a GPU yet, so only if asked for.
STATIC, STATIC_KEYS = os.environ.get("PRISM_STATIC") == "1", 256
MOST_PADDING = 1.25  # longest of the shared beginnings that are read together, over the shortest


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

    @property
    def text_ids(self) -> list[int]:
        """The ids without the token that ended them."""
        return self.ids[:-1] if self.stop == "eos" else self.ids


def group_by_length(rows: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Rows in groups of similar length."""
    groups: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda r: (len(r), r)):
        if groups and len(row) <= MOST_PADDING * len(groups[-1][0]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class PrefixReader:
    """Reads rows of ids, a beginning that rows share only once; all through the base model, or all
    with an adapter on.

    `tokens` counts what really went through the model; `keep`: tokens of beginnings that are held
    for later calls. A call that would exceed it drops all of them first.
    """

    def __init__(self, net: Transformer, adapter: nn.ModuleList | None = None):
        self.net, self.adapter, self.tokens = net, adapter, 0
        self.keep = kept_tokens(net.config, net.dtype)
        # shared ids -> the cache that holds them, and its row
        self.prefixes: dict[tuple[int, ...], tuple[KVCache, int]] = {}

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]],
             shared: Sequence[int]) -> tuple[Tensor, Tensor, KVCache]:
        """Run every row from position shared[i] on, after its first shared[i] ids.

        Returns the last layer's states [B, T, d] (before the final norm, right-padded), the lengths
        [B] of those remainders, and the cache, which holds the whole rows.
        """
        net = self.net
        wanted = {tuple(row[:n]) for row, n in zip(rows, shared) if n}
        if MOST_PADDING * sum(map(len, wanted | self.prefixes.keys())) > self.keep:
            self.prefixes = {}
        for group in group_by_length(wanted - self.prefixes.keys()):
            ids, _ = pad(group, net.device)
            cache = KVCache(net, *ids.shape)
            self._run(ids, net.positions(ids.shape, cache))
            for at, prefix in enumerate(group):
                self.prefixes[prefix] = cache, at
            self.tokens += sum(map(len, group))
        rests = [row[n:] for row, n in zip(rows, shared)]
        ids, lengths = pad(rests, net.device)
        self.tokens += sum(map(len, rests))
        keys = max(shared) + ids.shape[1]
        cache = KVCache(net, len(rows), keys)
        for at, (row, n) in enumerate(zip(rows, shared)):
            if n:
                cache.copy(at, *self.prefixes[tuple(row[:n])], n)
        start = upload(torch.tensor(shared), net.device) if any(shared) else None
        return self._run(ids, net.positions(ids.shape, cache, start, keys)), lengths, cache

    def _run(self, ids: Tensor, at: Positions) -> Tensor:
        """ids [B, T] through all layers, [B, T, d]."""
        layers = range(len(self.net.layers))
        return self.net.run(self.net.embed(ids), at, layers, self.adapter, len(ids))


@dataclass
class Slot:
    """A row of the engine's cache: the answer that it works on, the tokens [0, length) that it
    holds, and the uniform numbers [max_new_tokens] that its tokens are drawn with."""

    out: Output
    length: int
    draws: Tensor


class Engine:
    """Continuous batching over `slots` rows.

    Args:
        model: a base Transformer, or a PRISM that routes each prompt.
        sampling: shared by all requests; draws come from each request's own seed.
        stop_ids: token ids that end an answer.
        slots: rows decoded together; None is the model's own number (`net.sizes`). A setting of a
            run, because results may differ in the last bits between batch shapes.
        gate: "auto", "on" or "off" (see PRISM.prefill); a bare Transformer ignores it.
    """

    def __init__(self, model: Transformer | PRISM, sampling: Sampling, stop_ids: set[int],
                 slots: int | None = None, gate: str = "auto"):
        self.prism = model if isinstance(model, PRISM) else None
        self.net: Transformer = model.net if isinstance(model, PRISM) else model
        self.adapter = self.prism.adapter if self.prism else None
        self.sampling, self.stop_ids, self.gate = sampling, stop_ids, gate
        self.slots = slots or self.net.sizes.slots
        self.static = STATIC
        self.reader = PrefixReader(self.net)
        self.new_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens read by the model so far, shared prefixes counted once."""
        return self.reader.tokens

    @torch.inference_mode()
    def run(self, requests: Sequence[Request],
            on_token: Callable[[int, int], None] | None = None,
            bar: str | None = None) -> Iterator[Output]:
        """Answer all requests; yields each Output when it is finished, in no particular order.

        Args:
            on_token: called with (request index, token id) as soon as a token is drawn.
            bar: what a progress bar calls this work, if it takes seconds.
        """
        context, self.on_token = self.net.config.max_position_embeddings, on_token
        # Most new tokens of each request.
        self.limits = [min(self.sampling.max_new_tokens, context - len(r.ids)) for r in requests]
        for i, limit in enumerate(self.limits):
            if limit < 1 or not requests[i].ids:
                raise InputError(f"prompt {i} has {len(requests[i].ids)} tokens; the model reads "
                                 f"between 1 and {context - 1}")
        # Neighbours in the queue have like lengths: little padding while reading prompts.
        queue = sorted(range(len(requests)), key=lambda i: (len(requests[i].ids), i))
        sizes = [len(r.ids) + limit for r, limit in zip(requests, self.limits)]
        self.capacity, slots = max(sizes, default=0), min(self.slots, len(requests))
        device = self.net.device
        # The busy slots, without gaps, and the adapter's before the base's: a step runs the leading
        # rows of the cache, its adapter the first k of these. `_insert` and `_remove` keep it so.
        self.busy: list[Slot] = []
        self.k = 0
        self.cache, self.graphs = KVCache(self.net, slots, self.capacity), {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # Of each slot: last token, cached tokens, drawn tokens, whether it is busy, and routed.
        self.state = torch.zeros(slots, 5, dtype=torch.long, device=device)
        self.draws = torch.zeros(slots, self.sampling.max_new_tokens, device=device)
        with progress_bar(bar, "answer", total=len(requests)) as shown:
            while queue or self.busy:
                free = self.slots - len(self.busy)
                # With many slots a few wait for each other, else every step would read a prompt.
                if queue and free >= min(len(queue), max(1, self.slots // 32)):
                    group = queue[:free]
                    del queue[:len(group)]
                    self._admit(group, requests)
                else:
                    self._step()
                finished = self._collect()
                shown.update(len(finished))
                yield from finished

    def _admit(self, group: list[int], requests: Sequence[Request]) -> None:
        """Read the prompts of `group`, draw their first tokens, and give each a slot."""
        chosen = [requests[i] for i in group]
        if self.prism is None:
            x, lengths, cache = self.reader.read([r.ids for r in chosen],
                                                 [r.prefix for r in chosen])
            hidden, outs = self.net.norm(last_states(x, lengths)), [Output(i) for i in group]
        else:
            hidden, cache, outs = self._read_routed(group, chosen)
        slots = []
        for out in outs:
            request = requests[out.index]
            generator = torch.Generator().manual_seed(request.seed)  # on the host: devices agree
            draws = torch.rand(self.sampling.max_new_tokens, generator=generator)
            slots.append(Slot(out, len(request.ids), upload(draws, self.net.device)))
        first = torch.stack([slot.draws[0] for slot in slots])
        tokens = sample(self.net.head(hidden), self.sampling, first).tolist()
        for row, (slot, token) in enumerate(zip(slots, tokens)):
            self._append(slot.out, token)
            self._insert(slot, cache, row)
        self._upload()

    def _read_routed(self, group: Sequence[int],
                     chosen: Sequence[Request]) -> tuple[Tensor, KVCache, list[Output]]:
        """Prompts through the gate: the states [B, d] at their last tokens, gated rows first, the
        cache that holds them, and the outputs in that order."""
        ids, lengths = pad([r.ids for r in chosen], self.net.device)
        self.reader.tokens += sum(len(r.ids) for r in chosen)
        cache, mask = KVCache(self.net, *ids.shape), None
        if chosen[0].user_mask is not None:
            mask = pad([r.user_mask for r in chosen], self.net.device)[0].bool()
        routed = self.prism.prefill(ids, lengths, self.gate, cache, mask)
        outs = []
        for row, at in enumerate(routed.order):
            gate = routed.probability[at] if routed.probability else None
            outs.append(Output(group[at], gate=gate, routed=row < routed.k))
        return routed.hidden, cache, outs

    def _insert(self, slot: Slot, source: KVCache, source_row: int) -> None:
        """Give a slot the row behind all others or, if the adapter answers it, the row behind the
        adapter's; the base's slot that stood there moves behind all others."""
        at = len(self.busy)
        self.busy.append(slot)
        if slot.out.routed:
            if self.k < at:
                self._move(self.k, at)
            at = self.k
            self.k += 1
        self.busy[at] = slot
        self.cache.copy(at, source, source_row, slot.length)

    def _move(self, source: int, target: int) -> None:
        """Row `target` takes over what row `source` was working on."""
        self.cache.copy(target, self.cache, source, self.busy[source].length)
        self.busy[target] = self.busy[source]

    def _remove(self, at: int) -> None:
        """Free a row; the last of the adapter's, then the last of all, fill the gap."""
        if at < self.k:
            self.k -= 1
            if at != self.k:
                self._move(self.k, at)
            at = self.k
        last = len(self.busy) - 1
        if at != last:
            self._move(last, at)
        self.busy.pop()

    def _upload(self) -> None:
        """Mirror the slots' state on the device; needed only when their composition changed."""
        if not self.busy:
            return
        rows = [(0, 0, 0, 0, 0)] * len(self.state)
        for at, slot in enumerate(self.busy):
            count = len(slot.out.ids)
            rows[at] = slot.out.ids[-1], slot.length, count, 1, int(slot.out.routed)
        draws = [slot.draws for slot in self.busy]
        torch.stack(draws, out=self.draws[:len(draws)])
        self.state.copy_(upload(torch.tensor(rows), self.net.device))

    def _step(self) -> None:
        """Advance every busy slot by one token; the `tolist` is the step's only wait."""
        rows, keys = len(self.busy), max(slot.length for slot in self.busy) + 1
        if self.static:
            # Few shapes: the next power of two of rows, the next multiple of STATIC_KEYS of keys.
            self._replay(min(1 << (rows - 1).bit_length(), len(self.state)),
                         min(math.ceil(keys / STATIC_KEYS) * STATIC_KEYS, self.capacity))
        else:
            self._advance(rows, keys, self.k)
        for slot, token in zip(self.busy, self.state[:rows, 0].tolist()):
            slot.length += 1
            self._append(slot.out, token)

    def _advance(self, rows: int, keys: int, k: int | None) -> None:
        """A token more in the leading rows of `state`, each of which sees so many cached keys. Rows
        that only round the shape up are computed, too, and stay as they are.

        Args:
            k: how many leading rows the adapter answers; None: those that `state` says.
        """
        net = self.net
        tokens, start, steps, live, routed = self.state[:rows].unbind(1)  # views, written below
        if k is None:
            k = routed.to(net.dtype)[:, None, None]
        at = net.positions((rows, 1), self.cache, start, keys)
        x, layers = net.embed(tokens[:, None]), range(len(net.layers))
        x = net.run(x, at, layers, self.adapter, k)
        uniform = self.draws[:rows].gather(1, steps[:, None]).squeeze(1)
        drawn = sample(net.head(net.norm(x[:, -1])), self.sampling, uniform)
        tokens.copy_(torch.where(live > 0, drawn, tokens))
        start += live
        steps += live

    def _replay(self, rows: int, keys: int) -> None:
        """`_advance` with shapes that come again, on a GPU as a CUDA graph: recorded once, it is
        launched at once, where the host needs longer for a small model's kernels than the GPU."""
        if not self.state.is_cuda:
            return self._advance(rows, keys, None)
        if (rows, keys) not in self.graphs:
            before = self.state.clone()
            self._advance(rows, keys, None)  # makes what is made on first use
            self.state.copy_(before)
            self.graphs[rows, keys] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows, keys], pool=self.pool):
                self._advance(rows, keys, None)
        self.graphs[rows, keys].replay()

    def _append(self, out: Output, token: int) -> None:
        """Note a newly drawn token and report it."""
        if token >= self.net.config.vocab_size:
            raise InputError(f"prompt {out.index}: the model's logits are not finite after "
                             f"{len(out.ids)} tokens; try --dtype float32")
        out.ids.append(token)
        if self.on_token:
            self.on_token(out.index, token)

    def _collect(self) -> list[Output]:
        """Free the slots whose answers are complete and return these."""
        finished = []
        for at in reversed(range(len(self.busy))):
            out = self.busy[at].out
            if out.ids[-1] in self.stop_ids:
                out.stop = "eos"
            elif len(out.ids) >= self.limits[out.index]:
                out.stop = "length"
            if out.stop:
                finished.append(out)
                self.new_tokens += len(out.ids)
                self._remove(at)
        if finished:
            self._upload()
        return finished


def hidden_states(net: Transformer, rows: Sequence[Sequence[int]], starts: Sequence[int],
                  shared: Sequence[int] | None = None, adapter: nn.ModuleList | None = None,
                  bar: str | None = None,
                  reader: PrefixReader | None = None) -> tuple[list[Tensor], int]:
    """Post-norm hidden states of each row of ids from position starts[i] to its end, [n_i, d], and
    the number of tokens that went through the model.

    Rows are batched by length under a token budget; the batching depends only on the rows.

    Args:
        shared: leading ids of each row (at most starts[i]) that other rows begin with as well; such
            a beginning runs through the model only once.
        adapter: on for all rows (a PRISM's `adapter`); None reads with the base model.
        bar: what a progress bar calls this work, if it takes seconds.
        reader: one of several calls, so that a beginning they share runs through the model once.
    """
    shared, context = shared or [0] * len(rows), net.config.max_position_embeddings
    longest = max(map(len, rows), default=0)
    if longest > context:
        raise InputError(f"a text of {longest} tokens is longer than the model's context of "
                         f"{context}; use shorter personas or fewer --max-new-tokens")
    rests = [len(row) - n for row, n in zip(rows, shared)]
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    reader = reader or PrefixReader(net, adapter)
    before = reader.tokens
    with torch.inference_mode(), progress_bar(bar, "token", total=sum(rests)) as shown:
        for batch in batches(rests, net.sizes.score_tokens, list(map(len, rows))):
            skip = [shared[i] for i in batch]
            some = [rows[i] for i in batch]
            if any(skip):
                hidden = net.norm(reader.read(some, skip)[0])
            else:
                hidden = net.hidden(pad(some, net.device)[0], reader.adapter, len(some))
                reader.tokens += sum(map(len, some))
            for row, i, n in zip(hidden, batch, skip):
                states[i] = row[starts[i] - n:len(rows[i]) - n].clone()
            shown.update(sum(rests[i] for i in batch))
    return states, reader.tokens - before


def token_log_probabilities(net: Transformer, prompts: Sequence[Sequence[int]],
                            targets: Sequence[Sequence[int]],
                            shared: Sequence[int] | None = None, bar: str | None = None,
                            reader: PrefixReader | None = None) -> tuple[list[Tensor], int]:
    """log P(target token | all before it) of each prompt + target: fp32 tensors [len(target)], and
    the number of tokens read. `shared`, `bar` and `reader` as in `hidden_states`."""
    rows = [[*p, *t] for p, t in zip(prompts, targets)]
    states, read = hidden_states(net, rows, [len(p) - 1 for p in prompts], shared, bar=bar,
                                 reader=reader)
    if not rows:
        return [], 0
    flat = torch.cat([s[:-1] for s in states])  # [N, d], N tokens of all targets together
    ids = torch.tensor([i for t in targets for i in t], device=net.device)[:, None]
    # Filled in place: small results kept between the large temporaries fragment the heap (measured:
    # 7.8 GiB instead of 1.2). And one buffer for all chunks: new memory costs as much as the rest.
    logs = torch.empty(len(flat), device=net.device)
    size = max(1, net.sizes.score_logits // net.config.vocab_size)
    buffer = torch.empty(min(size, len(flat)), net.config.vocab_size, device=net.device)
    with torch.inference_mode():
        for i in range(0, len(flat), size):
            logits = net.head(flat[i:i + size])
            log_p = buffer[:len(logits)].copy_(logits)
            torch.log_softmax(log_p, dim=-1, out=log_p)
            logs[i:i + size] = log_p.gather(1, ids[i:i + size])[:, 0]
    return list(logs.cpu().split([len(t) for t in targets])), read
