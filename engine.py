"""Batched decoding and reading: the engine knows token ids only.

It keeps a fixed number of slots busy: prompts are read in groups, every step advances all
slots by one token, and a slot that finishes is refilled at once from the queue (continuous
batching, Orca, OSDI 2022). Rows stay ordered gated-first, so one step serves adapted and base rows
together. Between steps the device keeps the cache alone: the host tells each step what to read.

What was simplified: no paged cache (one row a slot, as long as the longest request needs), and a
prompt is read whole, not in pieces between decoding steps.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from model import KVCache, Transformer
from prism import PRISM, last_states
from sampling import Sampling, sample
from support.config import kept_tokens
from support.device import batches, pad, upload
from support.distributed import progress_bar
from support.hub import InputError

# Steps of fixed shapes, rounded up to so many keys. Never run on a GPU yet, so only if asked for.
STATIC, STATIC_KEYS = os.environ.get("PRISM_STATIC") == "1", 256
MOST_PADDING = 1.25  # longest of the shared beginnings that are read together, over the shortest
Rows = Sequence[Sequence[int]]  # of token ids


@dataclass
class Request:
    """One prompt for the engine.

    `prefix` leading ids are shared with other requests of the same run and are read only once;
    `user_mask` marks the last user text for a gate that pools by mean; the answer's text begins
    with the last `begun` ids.
    """

    ids: list[int]
    seed: int = 0
    prefix: int = 0
    user_mask: list[bool] | None = None
    begun: int = 0


@dataclass
class Output:
    """What the engine made of request `index`: sampled ids (the stop token included, at most
    `limit`), the reason it stopped ("eos" or "length"), the gate's probability (None without one)
    and its route."""

    index: int
    request: Request
    limit: int
    ids: list[int] = field(default_factory=list)
    stop: str | None = None
    gate: float | None = None
    routed: bool = False

    @property
    def text_ids(self) -> list[int]:
        """The ids of the answer's text: as begun in the prompt, without the token that ended it.
        To be decoded together: some decoders drop the space a text begins with."""
        begun = self.request.ids[len(self.request.ids) - self.request.begun:]
        return begun + (self.ids[:-1] if self.stop == "eos" else self.ids)

    @property
    def cached(self) -> int:
        """Tokens that the cache holds: all but the last, which the next step reads."""
        return len(self.request.ids) + len(self.ids) - 1


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
    """Reads rows of ids, each shared beginning once; all through the base model, or all
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
    def read(self, rows: Rows, shared: Sequence[int],
             fill: bool = True) -> tuple[Tensor, Tensor, KVCache | None]:
        """Run every row from position shared[i] on, after its first shared[i] ids.

        Returns the last layer's states [B, T, d] (before the final norm, right-padded), the lengths
        [B] of those remainders, and the cache, which holds the whole rows. Without `fill` there is
        none if no row needs one.
        """
        net, cache, start = self.net, None, None
        wanted = {tuple(row[:n]) for row, n in zip(rows, shared) if n}
        if MOST_PADDING * sum(map(len, wanted | self.prefixes.keys())) > self.keep:
            self.prefixes = {}
        for group in group_by_length(wanted - self.prefixes.keys()):
            held = KVCache(net, len(group), len(group[-1]))
            self._run(group, held)
            for at, prefix in enumerate(group):
                self.prefixes[prefix] = held, at
        rests = [row[n:] for row, n in zip(rows, shared)]
        keys = max(shared) + max(map(len, rests))
        if wanted:
            start = upload(torch.tensor(shared), net.device)
        if wanted or fill:
            cache = KVCache(net, len(rows), keys)
        for at, (row, n) in enumerate(zip(rows, shared)):
            if n:
                cache.copy(at, *self.prefixes[tuple(row[:n])], n)
        return *self._run(rests, cache, start, keys), cache

    def _run(self, rows: Rows, cache: KVCache | None, start: Tensor | None = None,
             keys: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of ids through all layers: the states [B, T, d] and the lengths [B]."""
        net = self.net
        ids, lengths = pad(rows, net.device)
        self.tokens += sum(map(len, rows))
        at = net.positions(ids.shape, cache, start, keys)
        x = net.run(net.embed(ids), at, range(len(net.layers)), self.adapter, len(ids))
        return x, lengths


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
        self.sampling, self.stop_ids = sampling, stop_ids
        self.gate = gate
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
        context = self.net.config.max_position_embeddings
        queue = []
        for i, request in enumerate(requests):
            limit = min(self.sampling.max_new_tokens, context - len(request.ids))
            if limit < 1 or not request.ids:
                raise InputError(f"prompt {i} has {len(request.ids)} tokens; the model reads "
                                 f"between 1 and {context - 1}")
            queue.append(Output(i, request, limit))
        # Neighbours in the queue have like lengths: little padding while reading prompts.
        queue.sort(key=lambda out: len(out.request.ids))
        capacity = max((len(out.request.ids) + out.limit for out in queue), default=0)
        self.cache = KVCache(self.net, min(self.slots, len(queue)), capacity)
        # busy[i] is the answer in row i of the cache: no gaps, and the adapter's k come first, so
        # that a step runs leading rows only. `_insert` and `_remove` keep it so.
        self.busy: list[Output] = []
        self.k = 0
        # Of each of them, the uniform numbers that its tokens are drawn with.
        self.draws: dict[int, list[float]] = {}
        self.on_token, self.graphs = on_token, {}
        self.pool = torch.cuda.graph_pool_handle() if self.cache.kv.is_cuda else None
        with progress_bar(bar, "answer", total=len(queue)) as shown:
            while queue or self.busy:
                free = self.slots - len(self.busy)
                # With many slots a few wait for each other, else every step would read a prompt.
                if queue and free >= min(len(queue), max(1, self.slots // 32)):
                    group = queue[:free]
                    del queue[:free]
                    self._admit(group)
                else:
                    self._step()
                finished = self._collect()
                shown.update(len(finished))
                yield from finished

    def _admit(self, outs: list[Output]) -> None:
        """Read prompts, draw their first tokens, and give each a slot."""
        outs, hidden, cache = self._read(outs)
        for out in outs:
            # On the host, so that all devices draw the same.
            generator = torch.Generator().manual_seed(out.request.seed)
            self.draws[out.index] = torch.rand(out.limit, generator=generator).tolist()
        uniform = upload(torch.tensor(self._next_draws(outs)), self.net.device)
        self._append(outs, sample(self.net.head(hidden), self.sampling, uniform))
        for row, out in enumerate(outs):
            self._insert(out, cache, row)

    def _read(self, outs: list[Output]) -> tuple[list[Output], Tensor, KVCache]:
        """Prompts through the model: the outputs, gated ones first and told their routes, the
        states [B, d] at their last tokens, and the cache that holds them."""
        requests, mask = [out.request for out in outs], None
        rows = [r.ids for r in requests]
        if self.prism is None:
            x, lengths, cache = self.reader.read(rows, [r.prefix for r in requests])
            return outs, self.net.norm(last_states(x, lengths)), cache
        self.reader.tokens += sum(map(len, rows))
        ids, lengths = pad(rows, self.net.device)
        cache = KVCache(self.net, *ids.shape)
        if requests[0].user_mask is not None:
            mask = pad([r.user_mask for r in requests], self.net.device)[0].bool()
        routed = self.prism.prefill(ids, lengths, self.gate, cache, mask)
        if routed.probability is not None:
            for out, probability in zip(outs, routed.probability):
                out.gate = probability
        outs = [outs[at] for at in routed.order]
        for out in outs[:routed.k]:
            out.routed = True
        return outs, routed.hidden, cache

    def _insert(self, out: Output, source: KVCache, source_row: int) -> None:
        """Give an answer the row behind all others or, if the adapter answers it, the row behind
        the adapter's; the base's that stood there moves behind all others."""
        at = len(self.busy)
        self.busy.append(out)
        if out.routed:
            self._move(self.k, at)
            at = self.k
            self.busy[at] = out
            self.k += 1
        self.cache.copy(at, source, source_row, out.cached)

    def _move(self, source: int, target: int) -> None:
        """Row `target` takes over what row `source` was working on."""
        if source != target:
            self.cache.copy(target, self.cache, source, self.busy[source].cached)
            self.busy[target] = self.busy[source]

    def _remove(self, at: int) -> None:
        """Free a row; the last of the adapter's, then the last of all, fill the gap."""
        if at < self.k:
            self.k -= 1
            self._move(self.k, at)
            at = self.k
        self._move(len(self.busy) - 1, at)
        self.busy.pop()

    def _step(self) -> None:
        """A token more for every busy slot."""
        rows, k = len(self.busy), self.k
        keys = max(out.cached for out in self.busy) + 1
        advance, spare = self._advance, 0
        if self.static:
            # Few shapes: the next power of two of rows, the next multiple of STATIC_KEYS of keys.
            _, slots, _, capacity, _ = self.cache.kv.shape
            spare = min(1 << (rows - 1).bit_length(), slots) - rows
            keys = min(math.ceil(keys / STATIC_KEYS) * STATIC_KEYS, capacity)
            advance, k = self._replay, None
        state = [(out.ids[-1], out.cached, out.routed) for out in self.busy]
        state = torch.tensor(state + [(0, 0, 0)] * spare)
        uniform = torch.tensor(self._next_draws(self.busy) + [0.0] * spare)
        device = self.net.device
        self._append(self.busy, advance(upload(state, device), upload(uniform, device), keys, k))

    def _next_draws(self, outs: list[Output]) -> list[float]:
        """The uniform number for the next token of each answer."""
        return [self.draws[out.index][len(out.ids)] for out in outs]

    def _advance(self, state: Tensor, uniform: Tensor, keys: int, k: int | None) -> Tensor:
        """The next tokens [B] of the leading rows.

        Args:
            state: [B, 3] last token, cached tokens, and whether the adapter answers (0 or 1).
            uniform: [B] numbers to draw with.
            keys: how many cached tokens a row sees at most.
            k: how many leading rows the adapter answers; None: those that `state` says, so that
                nothing but values changes between steps.
        """
        net = self.net
        tokens, cached, routed = state.unbind(1)
        if k is None:
            k = routed.to(net.dtype)[:, None, None]
        at = net.positions((len(state), 1), self.cache, cached, keys)
        x = net.run(net.embed(tokens[:, None]), at, range(len(net.layers)), self.adapter, k)
        return sample(net.head(net.norm(x[:, -1])), self.sampling, uniform)

    def _replay(self, state: Tensor, uniform: Tensor, keys: int, k: None) -> Tensor:
        """`_advance` with shapes that come again, on a GPU as a CUDA graph: recorded once, it is
        launched at once, where the host needs longer for a small model's kernels than the GPU."""
        if not state.is_cuda:
            return self._advance(state, uniform, keys, k)
        shape = len(state), keys
        if shape not in self.graphs:
            self._advance(state, uniform, keys, k)  # makes what is made on first use
            graph, inputs = torch.cuda.CUDAGraph(), (state.clone(), uniform.clone())
            with torch.cuda.graph(graph, pool=self.pool):
                self.graphs[shape] = graph, inputs, self._advance(*inputs, keys, k)
        graph, inputs, tokens = self.graphs[shape]
        for mine, given in zip(inputs, (state, uniform)):
            mine.copy_(given)
        graph.replay()
        return tokens

    def _append(self, outs: list[Output], tokens: Tensor) -> None:
        """Note each answer's newly drawn token and report it; the `tolist` is a step's only wait.
        """
        for out, token in zip(outs, tokens.tolist()):
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
            out = self.busy[at]
            if out.ids[-1] in self.stop_ids:
                out.stop = "eos"
            elif len(out.ids) >= out.limit:
                out.stop = "length"
            if out.stop:
                finished.append(out)
                self.new_tokens += len(out.ids)
                self._remove(at)
                del self.draws[out.index]
        return finished


def hidden_states(net: Transformer, rows: Rows, starts: Sequence[int],
                  shared: Sequence[int] | None = None, bar: str | None = None,
                  reader: PrefixReader | None = None) -> tuple[list[Tensor], int]:
    """Post-norm hidden states of each row of ids from position starts[i] to its end, [n_i, d], and
    the number of tokens that went through the model.

    Rows are batched by length under a token budget; the batching depends only on the rows.

    Args:
        shared: leading ids of each row (at most starts[i]) that other rows begin with as well; such
            a beginning runs through the model only once.
        bar: what a progress bar calls this work, if it takes seconds.
        reader: one with an adapter on, or one for several calls, which reads a beginning that they
            share once; by default the base model's.
    """
    shared, context = shared or [0] * len(rows), net.config.max_position_embeddings
    longest = max(map(len, rows), default=0)
    if longest > context:
        raise InputError(f"a text of {longest} tokens is longer than the model's context of "
                         f"{context}; use shorter personas or fewer --max-new-tokens")
    rests = [len(row) - n for row, n in zip(rows, shared)]
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    reader = reader or PrefixReader(net)
    before = reader.tokens
    with torch.inference_mode(), progress_bar(bar, "token", total=sum(rests)) as shown:
        for batch in batches(rests, net.sizes.score_tokens, list(map(len, rows))):
            skip = [shared[i] for i in batch]
            some = [rows[i] for i in batch]
            hidden = net.norm(reader.read(some, skip, fill=False)[0])
            for row, i, n in zip(hidden, batch, skip):
                states[i] = row[starts[i] - n:len(rows[i]) - n].clone()
            shown.update(sum(rests[i] for i in batch))
    return states, reader.tokens - before


def token_log_probabilities(net: Transformer, prompts: Rows, targets: Rows,
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
