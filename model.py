"""A decoder-only transformer from `config.json` and safetensors: the frozen base model of PRISM.

One decoder serves all families of support/config.py; what differs between them is a field of
`Config`. The forward pass is in pieces (`embed`, `run`, `head`) because PRISM runs the first
layers, reads its gate there, and only then decides what the others do. Every layer takes the
adapter and the number `k` of leading rows it applies to (see lora.py), and the KV cache as well.

What was simplified: inference and adapter training only (base weights never need a gradient), no
tensor parallelism, no mixture of experts, no rotation of a part of each head or that changes with
the length (longrope), and a sliding window is a mask over a full-length cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import GatedLoRALinear
from support.attention import additive_mask, attend, rope_frequencies
from support.checkpoint import (HEAD, check_headers, checkpoint_files, copy_weights, destinations,
                                head_is_copy)
from support.config import BOTH_NORMS, Config
from support.cpu import linear, rms_norm
from support.hub import InputError, read_json, resolve

Generator = torch.Generator | None  # of LoRA dropout masks, while training
Modules = nn.ModuleDict | None  # the LoRA modules of one layer, by projection


@dataclass(frozen=True)
class Sizes:
    """How much runs at once. The defaults are for CPUs; a GPU takes more
    (`support.estimate.choose_sizes`).

    Results depend on the numbers in their last bits, so that a run never changes them.
    """

    slots: int = 32  # rows that an engine decodes together
    score_tokens: int = 4096  # padded tokens in a scoring batch
    score_logits: int = 2**23  # logits made at once while scoring: 32 MB in fp32
    train_tokens: int = 4096  # padded tokens in a micro-batch of training
    recompute: bool = False  # training computes layers twice, to keep less; no result depends on it


class KVCache:
    """Keys and values of every layer, one row per slot, left-aligned, allocated once.

    `kv`: [L, slots, 2 Hkv, capacity, D], a slot's key heads and then its value heads, so that one
    call stores or moves both; zeroed: a masked NaN would still poison attention.
    """

    def __init__(self, net: "Transformer", slots: int, capacity: int):
        config = net.config
        shape = (config.num_layers, slots, 2 * config.num_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=net.device, dtype=net.dtype)

    def write(self, layer: int, kv: Tensor, positions: Tensor) -> None:
        """Store keys and values kv [B, T, 2 Hkv, D] of the leading B slots at positions [B, T]."""
        rows = torch.arange(len(kv), device=kv.device)[:, None]
        self.kv[layer][rows, :, positions] = kv

    def read(self, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Views [rows, Hkv, length, D] of the leading slots' keys and values."""
        return self.kv[layer, :rows, :, :length].chunk(2, dim=1)

    def reorder(self, order: Tensor, layers: int) -> None:
        """Slot i of the first `layers` layers becomes what slot order[i] was."""
        self.kv[:layers] = self.kv[:layers, order]

    def copy(self, row: int, source: "KVCache", source_row: int, length: int) -> None:
        """Overwrite the first `length` positions of slot `row` with those of `source_row`."""
        self.kv[:, row, :, :length] = source.kv[:, source_row, :, :length]


@dataclass
class Positions:
    """Where a block of tokens stands and what it may see: the same for every layer.

    `rotary` has cos and sin [B, T, 1, D] of each rotary setting, for `rotate`; `masks` maps a
    layer's window width to its mask [B or 1, 1, T, S], added to the scores, or to None for plain
    causal attention; `positions` [B, T] is where a cache takes new keys and values; `length` is S,
    the number of cached positions to attend over.
    """

    rotary: list[tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor | None]
    cache: KVCache | None
    positions: Tensor
    length: int


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        # Gemma's in fp32: in bf16 a small weight would be lost beside the 1 it is added to.
        dtype = torch.float32 if config.family.norm_offset else config.dtype
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; q, k and v are one stacked projection."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.width = config.head_dim
        self.layer, self.window = layer, config.windows[layer]
        self.rotated = config.rotated[layer]
        self.rope = int(len(config.ropes) > 1 and self.window is not None)
        self.scale = config.attention_scale
        self.cap = config.attention_cap
        d, (q, kv, _) = config.projections["qkv_proj"]
        self.qkv_proj = GatedLoRALinear(d, (q, kv, kv), config.qkv_bias, config.dtype)
        self.o_proj = GatedLoRALinear(q, (d,), config.o_bias, config.dtype)
        self.q_norm = self.k_norm = None
        if config.family.qk_norm is not None:
            if config.family.qk_norm == "head":
                q = kv = self.width
            self.q_norm = RMSNorm(q, config)
            self.k_norm = RMSNorm(kv, config)

    def forward(self, x: Tensor, at: Positions, lora: Modules, k: int | Tensor,
                generator: Generator) -> Tensor:
        """x [B, T, d] -> [B, T, d]; writes the keys and values to at.cache if there is one."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x, lora and lora["qkv_proj"], k, generator)
        qkv = qkv.view(B, T, -1, self.width)  # [B, T, H + 2 Hkv, D]
        both, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None:
            both = self.normalise(both)
        if self.rotated:
            both = rotate(both, *at.rotary[self.rope])  # queries and keys in one call
        queries, keys = both.split((self.heads, self.kv_heads), dim=2)
        if at.cache is None:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, Hkv, T, D]
        else:
            at.cache.write(self.layer, torch.cat((keys, values), dim=2), at.positions)
            keys, values = at.cache.read(self.layer, B, at.length)  # [B, Hkv, S, D]
        queries, mask = queries.transpose(1, 2), at.masks[self.window]
        y = attend(queries, keys, values, mask, self.scale, self.cap)  # [B, H, T, D]
        y = y.transpose(1, 2).reshape(B, T, self.heads * self.width)
        return self.o_proj(y, lora and lora["o_proj"], k, generator)

    def normalise(self, both: Tensor) -> Tensor:
        """RMSNorm of queries and keys [B, T, H + Hkv, D], over each head or over all together."""
        normed = []
        parts = both.split((self.heads, self.kv_heads), dim=2)
        for part, norm in zip(parts, (self.q_norm, self.k_norm)):
            wide = part.reshape(*part.shape[:2], -1, len(norm.weight))  # [B, T, heads or 1, width]
            normed.append(norm(wide).view(part.shape))
        return torch.cat(normed, dim=2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, D], first half paired with second (as HF stores them).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin); `sin` brings its signs along.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class MLP(nn.Module):
    """The gated feed-forward layer, down(f(gate(x)) * up(x)); gate and up are stacked."""

    def __init__(self, config: Config):
        super().__init__()
        d, widths = config.projections["gate_up_proj"]
        self.gate_up_proj = GatedLoRALinear(d, widths, config.mlp_bias, config.dtype)
        self.down_proj = GatedLoRALinear(widths[0], (d,), config.mlp_bias, config.dtype)
        self.f = config.activation

    def forward(self, x: Tensor, lora: Modules, k: int | Tensor,
                generator: Generator) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        gate_up = self.gate_up_proj(x, lora and lora["gate_up_proj"], k, generator)
        return self.down_proj(gate_up, lora and lora["down_proj"], k, generator, self.gated)

    def gated(self, gate_up: Tensor) -> Tensor:
        """f(gate) * up, [..., m], of the two stacked halves [..., 2 m]: what `down_proj` maps, and
        what it computes again for the backward pass instead of keeping it."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.f(gate) * up


class Block(nn.Module):
    """One decoder layer: attention and MLP, each with a norm before it, after it, or both."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.scale = config.residual_scale
        for place in BOTH_NORMS:  # all places
            norm = nn.Identity()
            if place in config.family.norms:
                norm = RMSNorm(config.hidden_size, config)
            self.add_module(place, norm)

    def forward(self, x: Tensor, at: Positions, lora: Modules = None, k: int | Tensor = 0,
                generator: Generator = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]; `lora` holds this layer's adapter, for the leading k rows."""
        y = self.self_attn(self.before_attention(x), at, lora, k, generator)
        x = torch.add(x, self.after_attention(y), alpha=self.scale)
        y = self.mlp(self.before_mlp(x), lora, k, generator)
        return torch.add(x, self.after_mlp(y), alpha=self.scale)


class Transformer(nn.Module):
    """The frozen decoder. `net(ids)` gives logits; its pieces let PRISM stop between layers."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.name: str | None = None  # what load() was asked for, and
        self.folder: Path | None = None  # where it was found; kept so that adapters can name it
        self.sizes = Sizes()  # a run may choose others
        shape, dtype = (config.vocab_size, config.hidden_size), config.dtype
        self.embed_tokens = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.ropes: list[tuple[Tensor, float]] = []  # in fp32 always, hence no buffers
        for rope in config.ropes:
            inverse, scale = rope_frequencies(rope, config.head_dim)
            self.ropes.append((inverse.to(self.device), scale))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in and the layers compute in."""
        return self.embed_tokens.dtype

    def flops(self, tokens: int, scored: int) -> int:
        """Floating-point operations of `tokens` through all layers and `scored` through the head:
        two for each weight; attention's own, small next to that for short texts, are left out."""
        layers = sum(p.numel() for p in self.layers.parameters())
        return 2 * (layers * tokens + self.lm_head.numel() * scored)

    def positions(self, shape: Sequence[int], cache: KVCache | None = None,
                  start: Tensor | None = None, length: int | None = None) -> Positions:
        """Rotary tables, masks and places in the cache of a [B, T] block of tokens.

        Args:
            start: [B] tokens already in the cache of each row; None means 0, and a length of T.
            length: cached positions to attend over, at least max(start) + T; given by the caller,
                who knows it as a host number, so that no device value has to be waited for.
        """
        B, T = shape
        S = T if length is None else length
        positions = torch.arange(T, device=self.device).expand(B, T)
        seen = positions[:1]  # every row sees the same
        if start is not None:
            seen = positions = positions + start[:, None]
        # A kernel's own causal mask will do where nothing was read before.
        causal = start is None and self.config.attention_cap is None
        masks = {}
        for window in set(self.config.windows):
            masks[window] = None
            if not causal or (window is not None and T > window):
                masks[window] = additive_mask(seen, S, window, self.dtype)
        return Positions(self.rotary_tables(positions), masks, cache, positions, S)

    def rotary_tables(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [B, T, 1, D] at positions [B, T], for each rotary setting; see `rotate`."""
        tables = []
        for inverse, scale in self.ropes:
            angles = positions[..., None, None].float() * inverse.to(positions.device)
            cos, sin = angles.cos() * scale, angles.sin() * scale
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # [B, T, 1, D]
            tables.append((cos.to(self.dtype), sin.to(self.dtype)))
        return tables

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, d]."""
        x, scale = F.embedding(ids, self.embed_tokens), self.config.embedding_scale
        if scale == 1:
            return x
        # The scale is rounded to the dtype first, as transformers does for Gemma.
        return x * float(torch.tensor(scale, dtype=x.dtype, device="cpu"))

    def run(self, x: Tensor, at: Positions, layers: range, adapter: Sequence | None = None,
            k: int | Tensor = 0, generator: Generator = None) -> Tensor:
        """Run x [B, T, d] through the given layers.

        Args:
            adapter: one entry a layer, its LoRA modules or None; None altogether is the base model.
            k: the adapter applies to the leading k rows, or to those that a column [B, 1, 1] marks.
            generator: source of LoRA dropout masks while training, else None.
        """
        for i in layers:
            lora = adapter and adapter[i]
            if lora is not None and self.sizes.recompute and torch.is_grad_enabled():
                x = recomputed(self.layers[i], x, at, lora, k, generator)
            else:
                x = self.layers[i](x, at, lora, k, generator)
        return x

    def hidden(self, ids: Tensor, adapter: Sequence | None = None, k: int = 0,
               generator: Generator = None) -> Tensor:
        """Right-padded ids [B, T] -> post-norm hidden states [B, T, d], the head's own input; the
        adapter is on for the leading k rows, with dropout if there is a generator."""
        x, at = self.embed(ids), self.positions(ids.shape)
        x = self.run(x, at, range(len(self.layers)), adapter, k, generator)
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Post-norm hidden states [..., d] -> logits [..., V].

        A non-contiguous slice is copied first: the bf16 GEMM on one took 11.6 s, on the copy 0.04.
        """
        return self.capped(linear(x.contiguous(), self.lm_head))

    def head_exact(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits [n, len(ids)] of a few tokens from post-norm states x [n, d], in fp32.

        In bf16 the logits of like tokens are often equal (of 1,529 MMLU questions 353 had two best
        letters), and then the first would always win.
        """
        return self.capped(x.float() @ self.lm_head[list(ids)].float().t())

    def capped(self, logits: Tensor) -> Tensor:
        """Soft-capped logits, where the family has that (Gemma)."""
        cap = self.config.final_cap
        if cap is None:
            return logits
        return (logits / cap).tanh() * cap

    def forward(self, ids: Tensor) -> Tensor:
        """The base model's logits [B, T, V] of right-padded ids [B, T]."""
        return self.head(self.hidden(ids))


def recomputed(block: Block, x: Tensor, at: Positions, lora: nn.ModuleDict, k: int,
               generator: Generator) -> Tensor:
    """One layer of which only the input is kept for the backward pass, and the rest computed again
    there, dropout masks included (gradient checkpointing, arXiv 1604.06174): the same gradients for
    nearly half more arithmetic and a fraction of the memory."""
    state = None if generator is None else generator.get_state()

    def run(x: Tensor) -> Tensor:
        if generator is not None:
            generator.set_state(state)
        return block(x, at, lora, k, generator)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


# --------------------------------------------------------------------------------------------------
# Loading


def load(name: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype | None = None, layers: int | None = None) -> Transformer:
    """Load a base model: eval mode, frozen, tensors copied one by one into place.

    Args:
        name: a model id or a local folder (see hub.resolve).
        dtype: what to compute in; None takes the checkpoint's own.
        layers: load only so many decoder layers, and no head: all that a gate needs.

    InputError on a missing, unexpected or wrongly shaped tensor, or an unsupported config.
    """
    folder = resolve(name)
    config = Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    files = checkpoint_files(folder)
    if layers is not None and layers > config.num_layers:
        raise InputError(f"{folder}: it has {config.num_layers} layers, not the {layers} asked for")
    tied, holds_head = config.tie_word_embeddings, HEAD in files
    config.tie_word_embeddings = tied and not holds_head
    with torch.device("meta"):  # shapes only: everything is checked before memory is asked for
        net = Transformer(config)
    check_headers(folder, destinations(net, config), files)
    config.dtype = dtype or config.dtype
    config.num_layers = layers or config.num_layers
    # A tied model's head of its own is used, as by transformers; most of them are copies.
    if layers is not None or (tied and holds_head and head_is_copy(files)):
        config.tie_word_embeddings = True
    with torch.device(device):
        net = Transformer(config)
    copy_weights(destinations(net, config), files)
    for module in net.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.add_(config.family.norm_offset)
    # Folded into the final norm, so that losses and samplers need not know of it.
    net.norm.weight.data.div_(config.logits_divisor)
    net.name, net.folder = str(name), folder
    return net.eval()
