"""A decoder-only transformer from `config.json` and safetensors: the frozen base model of PRISM.

One decoder serves all families in `DEFAULTS`; what differs between them is a field of `Config`. The
forward pass is in pieces (`embed`, `run`, `head`) because PRISM runs the first layers, reads its
gate there, and only then decides what the others do. Every layer takes the adapter and the number
`k` of leading rows it applies to (see lora.py); the KV cache is an argument, too.

What was simplified: inference and adapter training only (base weights never need a gradient), no
tensor parallelism, no mixture of experts, no rotation of a part of each head or that changes with
the length (longrope), and a sliding window is a mask over a full-length cache.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.hub import InputError, read_json, resolve
from lora import GatedLoRALinear, few_rows, linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256,
         "hidden_activation": "gelu_pytorch_tanh"}
# The supported families and what their config.json may leave out, as transformers reads it then. A
# field that stands here is computed for this family; for the others see NEUTRAL.
DEFAULTS: dict[str, dict] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layers": None,
                "no_rope_layer_interval": 4},
    "olmo2": {"rms_norm_eps": 1e-5},
    "granite": {"embedding_multiplier": 1.0, "attention_multiplier": 1.0,
                "residual_multiplier": 1.0, "logits_scaling": 1.0},
    "phi3": {"rms_norm_eps": 1e-5},
    "gemma2": GEMMA | {"sliding_window": 4096, "attn_logit_softcapping": 50.0,
                       "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA | {"sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6,
                            "rope_local_base_freq": 1e4, "final_logit_softcapping": None}}
FAMILIES = tuple(DEFAULTS)
# Fields that change the arithmetic, and the values that do not: for families that lack the field.
NEUTRAL = {"hidden_activation": (None, "silu"), "query_pre_attn_scalar": (None,),
           "partial_rotary_factor": (None, 1.0), "attention_multiplier": (None,),
           "residual_multiplier": (None,), "embedding_multiplier": (None,),
           "logits_scaling": (None,), "final_logit_softcapping": (None,),
           "attn_logit_softcapping": (None,), "no_rope_layers": (None,),
           "rope_local_base_freq": (None,), "is_encoder_decoder": (None, False),
           "use_bidirectional_attention": (None, False)}
QUANTIZED = ("quantization_config", "quantization", "compression_config")  # the last: older files
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
# Where a layer's RMSNorms stand, by their names in the checkpoint: before attention, after it (both
# before the sum), before the MLP, after it. Mind that one name means two places.
PRE_NORM = ("input_layernorm", None, "post_attention_layernorm", None)
BOTH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm")
NORMS = {"olmo2": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
         "gemma2": BOTH, "gemma3_text": BOTH}
# Our stacked projections -> the names of their parts in a Hugging Face model's layer
PARTS = {"qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "o_proj": ("self_attn.o_proj",), "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
         "down_proj": ("mlp.down_proj",)}
FUSED = {"qkv_proj": ("self_attn.qkv_proj",), "gate_up_proj": ("mlp.gate_up_proj",)}
# RoPE kinds and the numbers each of them needs beside rope_theta.
ROPE_KINDS = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights may be stored in
FINGERPRINT_ELEMENTS = 64  # of the first and the middle row of each tensor


@dataclass
class Config:
    """What the decoder needs to know of a checkpoint's `config.json`.

    `rope` is the merged rotary setting with its `rope_type` and `rope_theta`; `windows` has one
    entry a layer, the width of its sliding window in tokens or None for full attention.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict
    local_rope: dict | None  # Gemma 3: the rotary setting of the layers with a window
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    fused: bool  # Phi-3: the checkpoint, too, has q, k, v in one tensor, and gate and up
    norms: tuple[str | None, ...]  # which RMSNorms a layer has (see PRE_NORM)
    qk_norm: str | None  # RMSNorm before RoPE: over each "head" (Qwen3, Gemma 3), "all" (OLMo-2)
    norm_offset: float  # Gemma: RMSNorm multiplies by this + weight; folded into the weight
    activation: str  # of the MLP's gate, a name in lora.ACTIVATIONS
    embedding_scale: float  # Gemma, Granite: factor on what is embedded
    attention_scale: float | None  # factor on q k^T; None is the usual head_dim^-0.5
    attention_cap: float | None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_cap: float | None  # Gemma 2: the same for the logits
    residual_scale: float  # Granite: factor on what attention and MLP add
    logits_divisor: float  # Granite: folded into the last norm's weight when loading
    windows: list[int | None]
    rotated: list[bool]  # SmolLM3: layers that rotate queries and keys; the others get no positions
    dtype: torch.dtype
    eos_token_ids: list[int] = field(default_factory=list)

    @classmethod
    def from_json(cls, raw: dict, where: str = "config.json") -> "Config":
        """Read both spellings in circulation: top-level `rope_theta` / `rope_scaling` /
        `torch_dtype`, and `rope_parameters` / `dtype`.

        Raises:
            InputError: unknown model_type, RoPE kind, or a field whose value this decoder would
                have to ignore, by name.
        """
        kind = raw.get("model_type")
        _refuse(raw, where)
        raw = DEFAULTS[kind] | raw
        heads = _integer(raw, "num_attention_heads", where)
        hidden = _integer(raw, "hidden_size", where)
        layers = _integer(raw, "num_hidden_layers", where, high=2**10)
        kv_heads = _integer(raw, "num_key_value_heads", where, default=heads)
        head_dim = _integer(raw, "head_dim", where, default=max(hidden // heads, 1))
        if heads % kv_heads or head_dim % 2:
            raise InputError(f"{where}: {heads} query heads cannot share {kv_heads} key/value "
                             f"heads of width {head_dim}")
        gemma, scale = "gemma" in kind, _factor(raw, "query_pre_attn_scalar", where, None)
        bias = _flag(raw, "attention_bias", where) or kind == "qwen2"
        rope, local_rope = _ropes(raw, where)
        name = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
        name = "float32" if name is None else str(name).removeprefix("torch.")
        if name not in DTYPES:
            raise InputError(f"{where}: dtype {name!r} is not one of {', '.join(DTYPES)}")
        return cls(
            model_type=kind, vocab_size=_integer(raw, "vocab_size", where, high=2**22),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size", where),
            num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
            max_position_embeddings=_integer(raw, "max_position_embeddings", where, default=2048,
                                             high=2**30),
            rms_norm_eps=_number(raw, "rms_norm_eps", where, 1e-6, high=1.0),
            rope=rope, local_rope=local_rope,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
            qkv_bias=bias, o_bias=bias and kind != "qwen2",
            mlp_bias=_flag(raw, "mlp_bias", where), fused=kind == "phi3",
            norms=NORMS.get(kind, PRE_NORM),
            qk_norm={"qwen3": "head", "gemma3_text": "head", "olmo2": "all"}.get(kind),
            norm_offset=float(gemma), activation=_activation(raw, where),
            embedding_scale=_factor(raw, "embedding_multiplier", where,
                                    hidden**0.5 if gemma else 1.0),
            attention_scale=_factor(raw, "attention_multiplier", where, scale and scale**-0.5),
            attention_cap=_factor(raw, "attn_logit_softcapping", where, None),
            final_cap=_factor(raw, "final_logit_softcapping", where, None),
            residual_scale=_factor(raw, "residual_multiplier", where, 1.0),
            logits_divisor=_factor(raw, "logits_scaling", where, 1.0),
            windows=_windows(raw, kind, layers, where), rotated=_rotated(raw, layers, where),
            dtype=DTYPES[name],
            eos_token_ids=token_ids(raw, "eos_token_id", where))


def _refuse(raw: dict, where: str) -> None:
    """Raise on what cannot be computed here, by name."""
    kind = raw.get("model_type")
    for name, value in raw.items():
        if "experts" in name and value:
            raise InputError(f"{where}: {name} = {str(value)[:60]}: mixture-of-experts models "
                             f"(model_type {kind!r}) are not supported")
        if name in QUANTIZED and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise InputError(f"{where}: {name}: checkpoints quantized"
                             f"{f' by {method}' if method else ''} are not supported; take the "
                             "model's release in bfloat16, float16 or float32")
    if kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not supported (supported: "
                         f"{', '.join(FAMILIES)})")
    for name, neutral in NEUTRAL.items():
        if name in raw and raw[name] not in neutral and name not in DEFAULTS[kind]:
            raise InputError(f"{where}: {name} = {str(raw[name])[:60]} is not supported")


def _activation(raw: dict, where: str) -> str:
    """The name in lora.ACTIVATIONS of what bends the MLP's gate."""
    key = "hidden_activation" if "gemma" in raw["model_type"] else "hidden_act"
    name = str(raw.get(key) or "silu")
    if name not in ACTIVATION_NAMES:
        raise InputError(f"{where}: {key} = {name[:60]} is not supported")
    return ACTIVATION_NAMES[name]


def _integer(raw: dict, name: str, where: str, default: int | None = None,
             high: int = 2**20) -> int:
    """A positive integer field up to `high`, so that an absurd size fails before any allocation."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InputError(f"{where}: {name} = {str(value)[:60]!r} is not an integer in [1, {high}]")
    return value


def _number(raw: dict, name: str, where: str, default: float | None = None, low: float = 0.0,
            high: float = 1e12) -> float:
    """A finite number above `low`, up to `high`; NaN is neither."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high:
        raise InputError(f"{where}: {name} = {str(value)[:60]!r} is not a number in ({low:g}, "
                         f"{high:g}]")
    return float(value)


def _factor(raw: dict, name: str, where: str, default: float | None) -> float | None:
    """A positive number, or the default where the field is missing or null."""
    return default if raw.get(name) is None else _number(raw, name, where)


def _flag(raw: dict, name: str, where: str) -> bool:
    """A true or false; the text "false" would count as true."""
    value = raw.get(name)
    if value not in (None, True, False) or isinstance(value, (int, float)) != isinstance(
            value, bool):
        raise InputError(f"{where}: {name} = {str(value)[:60]!r} is neither true nor false")
    return bool(value)


def token_ids(raw: dict, name: str, where: str) -> list[int]:
    """A field that holds a token id, a list of them, or nothing."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise InputError(f"{where}: {name} = {str(value)[:60]!r} is not a token id or a list of "
                         "them")
    return ids


def _windows(raw: dict, kind: str, layers: int, where: str) -> list[int | None]:
    """Each layer's sliding-window width: by `layer_types`, else by the family's older fields."""
    window = raw.get("sliding_window")
    if window is not None:
        window = _integer(raw, "sliding_window", where, high=2**30)
    on = _flag(raw, "use_sliding_window", where)
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(
                t not in ("full_attention", "sliding_attention") for t in types):
            raise InputError(f"{where}: layer_types = {str(types)[:60]} is not supported")
        return [window if t == "sliding_attention" else None for t in types]
    if kind in ("qwen2", "qwen3"):
        # transformers' own default for this field
        first = _number(raw, "max_window_layers", where, 28, low=-1)
        return [window if on and i >= first else None for i in range(layers)]
    if kind == "smollm3":  # the layers without RoPE
        return [window if on and not r else None for r in _rotated(raw, layers, where)]
    if "gemma" in kind:  # all but every second or, in Gemma 3, sixth
        every = _integer(raw, "sliding_window_pattern", where, default=2)
        return [window if (i + 1) % every else None for i in range(layers)]
    return [window if kind in ("mistral", "phi3") else None] * layers


def _rotated(raw: dict, layers: int, where: str) -> list[bool]:
    """Which layers use RoPE: all but SmolLM3's every fourth, or as its list of 0 and 1 says."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        every = _integer(raw, "no_rope_layer_interval", where, default=layers + 1)
        flags = [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(
            flag not in (0, 1) for flag in flags):
        raise InputError(f"{where}: no_rope_layers = {str(flags)[:60]} is not a 0 or 1 a layer")
    return [bool(flag) for flag in flags[:layers]]


def _ropes(raw: dict, where: str) -> tuple[dict, dict | None]:
    """The rotary setting, from either spelling, and Gemma 3's own of the layers with a window."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {name} = {str(value)[:60]!r} is not an object")
    nested = any(isinstance(value, dict) for value in new.values())
    if raw["model_type"] != "gemma3_text":
        if nested:
            raise InputError(f"{where}: rope_parameters by layer type are not supported")
        return _rope_setting(raw, where, {"rope_theta": 10000.0, **old}, new), None
    if new and not nested:
        raise InputError(f"{where}: rope_parameters have no full_attention and sliding_attention")
    local = {"rope_theta": raw["rope_local_base_freq"]}
    return (_rope_setting(raw, where, old, new.get("full_attention") or {}),
            _rope_setting(raw | {"rope_theta": None}, where, local,
                          new.get("sliding_attention") or {}))


def _rope_setting(raw: dict, where: str, old: dict, new: dict) -> dict:
    """The rotary setting as one dict: `new` before the top-level rope_theta before `old`; raises on
    a kind we do not compute."""
    if not isinstance(new, dict):
        raise InputError(f"{where}: rope_parameters of a layer type are not an object")
    rope = {**old, **new}
    if "rope_theta" not in new and raw.get("rope_theta") is not None:
        rope["rope_theta"] = raw["rope_theta"]
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    # Phi-3 files say "yarn" for what is longrope.
    if not isinstance(rope["rope_type"], str) or rope["rope_type"] not in ROPE_KINDS or (
            raw["model_type"] == "phi3" and rope["rope_type"] == "yarn"):
        raise InputError(f"{where}: rope_type {rope['rope_type']!r} is not supported "
                         f"(supported: {', '.join(ROPE_KINDS)})")
    at = f"{where}: rope_type {rope['rope_type']}"
    for name in ROPE_KINDS[rope["rope_type"]]:
        _number(rope, name, at)
    _number(rope, "rope_theta", at, low=1.0)
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name) is not None:
            _number(rope, name, at, low=-1e-9)
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{at}: low_freq_factor is not below high_freq_factor")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor is not supported")
    rope.setdefault("original_max_position_embeddings",
                    raw.get("original_max_position_embeddings")
                    or raw.get("max_position_embeddings", 2048))
    _number(rope, "original_max_position_embeddings", at)
    return rope


def rope_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin.

    Sources: RoFormer (arXiv 2104.09864) for `default`; position interpolation (2306.15595) for
    `linear`; YaRN (2309.00071) for `yarn`; Llama 3.1's released code for `llama3`.
    """
    base, kind = float(rope["rope_theta"]), rope["rope_type"]
    # On the CPU by name: a net is first built on the meta device, where nothing has a value.
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    inverse = 1.0 / base ** (2 * index / head_dim)
    if kind == "default":
        return inverse, 1.0
    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":  # long wavelengths interpolated, short ones kept, a ramp between
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        rotations = trained * inverse / (2 * math.pi)  # turns made within the trained context
        ramp = ((rotations - low) / (high - low)).clamp(0, 1)
        return inverse * (ramp + (1 - ramp) / factor), 1.0

    def dimension(rotations: float) -> float:
        """The (fractional) frequency index that makes that many turns in the trained context."""
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    attention, over, under = (rope.get(n) for n in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = (_yarn_scale(factor, over) / _yarn_scale(factor, under) if over and under
                     else _yarn_scale(factor, 1.0))
    return inverse * (1 - ramp) + inverse / factor * ramp, float(attention)


def _yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(factor) + 1 (its section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class KVCache:
    """Keys and values of every layer, one row per slot, left-aligned, allocated once.

    `kv`: [L, slots, 2 Hkv, capacity, D], a slot's key heads and then its value heads, so that one
    call stores or moves both; zeroed: a masked NaN would still poison attention.
    """

    def __init__(self, config: Config, slots: int, capacity: int, device: torch.device | str,
                 dtype: torch.dtype):
        shape = (config.num_layers, slots, 2 * config.num_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def index(self, positions: Tensor) -> Tensor:
        """Where `write` puts what stands at `positions` [B, T]: [B * T * 2 Hkv], made once for all
        layers (8 us a layer instead of 16 with row, head and position given apart)."""
        heads, capacity = self.kv.shape[2:4]
        rows = torch.arange(len(positions), device=positions.device)[:, None, None]
        head = rows * heads + torch.arange(heads, device=positions.device)  # [B, 1, 2 Hkv]
        return (head * capacity + positions[:, :, None]).flatten()

    def write(self, layer: int, kv: Tensor, index: Tensor) -> None:
        """Store keys and values kv [B, T, 2 Hkv, D] of the leading B slots at `index`."""
        self.kv[layer].view(-1, kv.shape[-1]).index_copy_(0, index, kv.flatten(0, 2))

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
class Span:
    """What every layer needs to know of the tokens it is given: where they stand, what they see.

    `rotary` has cos and sin [B, T, 1, D] of each rotary setting, for `rotate`; `masks` maps a
    layer's window width to its mask [B or 1, 1, T, S], added to the scores, or to None for plain
    causal attention; `index` says where the cache takes new keys and values (None without a cache);
    `keys` is S, the number of cached positions to attend over.
    """

    rotary: list[tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor | None]
    cache: KVCache | None
    index: Tensor | None
    keys: int


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width].

        On a CPU `rms_norm` is nine kernels, `layer_norm` one: and [x, -x] has mean 0 and variance
        mean(x^2), so that its layer norm is the RMS norm (2 of 35 ms of a decoding step). For many
        rows the fewest and least memory count: 4,096 of width 576 take half of `rms_norm`'s time.
        """
        width = x.shape[-1]
        if few_rows(x):
            both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * width,), eps=self.eps)
            return (both[..., :width] * self.weight).to(x.dtype)
        if x.is_cpu:
            y = x.to(torch.float32, copy=True)
            norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
            scale = (norm.square() / width + self.eps).rsqrt()
            times = Tensor.mul if torch.is_grad_enabled() else Tensor.mul_
            return times(times(y, scale), self.weight).to(x.dtype)
        wide = x.to(self.weight.dtype)  # fp32 in Gemma, see `load`
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; q, k and v are one stacked projection."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.width = config.head_dim
        self.layer, self.window = layer, config.windows[layer]
        self.rotated = config.rotated[layer]
        self.rope = int(config.local_rope is not None and self.window is not None)
        self.scale, self.cap = config.attention_scale, config.attention_cap
        q, kv = self.heads * self.width, self.kv_heads * self.width
        self.qkv_proj = GatedLoRALinear(config.hidden_size, (q, kv, kv), config.qkv_bias)
        self.o_proj = GatedLoRALinear(q, (config.hidden_size,), config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.per_head = config.qk_norm == "head"
            self.q_norm, self.k_norm = (RMSNorm(self.width if self.per_head else size,
                                                config.rms_norm_eps) for size in (q, kv))

    def forward(self, x: Tensor, span: Span, lora: nn.ModuleDict | None, k: int,
                generator: torch.Generator | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]; writes the keys and values to span.cache if there is one."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x, lora and lora["qkv_proj"], k, generator)
        qkv = qkv.contiguous().view(B, T, -1, self.width)  # [B, T, H + 2 Hkv, D]
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None:
            q, key = qk.split((self.heads, self.kv_heads), dim=2)
            if self.per_head:
                qk = torch.cat((self.q_norm(q), self.k_norm(key)), dim=2)
            else:  # [B, T, H * D] and [B, T, Hkv * D]
                q, key = self.q_norm(q.flatten(2)), self.k_norm(key.flatten(2))
                qk = torch.cat((q, key), dim=2).view(B, T, -1, self.width)
        if self.rotated:
            qk = rotate(qk, *span.rotary[self.rope])  # queries and keys in one call
        q, key = qk.split((self.heads, self.kv_heads), dim=2)
        if span.cache is None:
            key, v = key.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, T, D]
        else:
            span.cache.write(self.layer, torch.cat((key, v), dim=2), span.index)
            key, v = span.cache.read(self.layer, B, span.keys)
        q, mask = q.transpose(1, 2), span.masks[self.window]
        if self.cap is None:
            y = attend(q, key, v, mask, self.scale)  # [B, H, T, D]
        else:
            y = attend_capped(q, key, v, mask, self.scale, self.cap)
        y = y.transpose(1, 2).reshape(B, T, self.heads * self.width)
        return self.o_proj(y, lora and lora["o_proj"], k, generator)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, D], first half paired with second (as HF stores them).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin); `sin` brings its signs along.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
           scale: float | None = None) -> Tensor:
    """Attention of q [B, H, T, D] over k, v [B, Hkv, S, D]; mask None means causal with S = T, and
    scale None D^-0.5.

    While decoding (T = 1), many query heads that share a key head become query rows: one reading of
    the keys serves them all, in a kernel that needs no `enable_gqa`. On a CPU, 8 rows at 520 keys,
    that takes 214 instead of 291 us with 7 heads to a key head, but 318 instead of 257 with 3.
    """
    B, H, T, D = q.shape
    group = H // k.shape[1]
    if T == 1 and mask is not None and (q.is_cuda or group > 4):
        y = F.scaled_dot_product_attention(q.view(B, -1, group, D), k, v, attn_mask=mask,
                                           scale=scale)
        return y.reshape(B, H, T, D)
    if q.is_cuda and group > 1 and (mask is not None or q.dtype == torch.float32):
        # There only the flash kernel shares keys, and it takes neither; without it all scores of a
        # layer would be in memory at once.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          scale=scale, enable_gqa=group > 1)


def attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None,
                  cap: float) -> Tensor:
    """`attend` with scores cap * tanh(scores / cap), in fp32: torch has no fused kernel for it."""
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, D)  # [B, Hkv, H / Hkv * T, D]: a key head's queries are rows
    scores = (q @ k.transpose(2, 3)).float() * ((D**-0.5 if scale is None else scale) / cap)
    scores = (scores.tanh() * cap).view(B, k.shape[1], -1, T, k.shape[2]) + mask[:, :, None]
    weights = scores.softmax(-1).to(v.dtype).view(B, k.shape[1], -1, k.shape[2])
    return (weights @ v).view(B, H, T, D)


class MLP(nn.Module):
    """The gated feed-forward layer, down(f(gate(x)) * up(x)); gate and up are stacked."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = GatedLoRALinear(config.hidden_size, (width, width), config.mlp_bias)
        self.down_proj = GatedLoRALinear(width, (config.hidden_size,), config.mlp_bias,
                                         activation=config.activation)

    def forward(self, x: Tensor, lora: nn.ModuleDict | None, k: int,
                generator: torch.Generator | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        gate_up = self.gate_up_proj(x, lora and lora["gate_up_proj"], k, generator)
        return self.down_proj(gate_up, lora and lora["down_proj"], k, generator)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each with a norm before it, after it, or both."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.scale = config.residual_scale
        self.norms = [RMSNorm(config.hidden_size, config.rms_norm_eps) if name else None
                      for name in config.norms]
        for name, norm in zip(config.norms, self.norms):
            if name:
                setattr(self, name, norm)  # so that torch and the loader find it

    @property
    def linears(self) -> dict[str, GatedLoRALinear]:
        """The four stacked projections by name: what an adapter is made for."""
        return {"qkv_proj": self.self_attn.qkv_proj, "o_proj": self.self_attn.o_proj,
                "gate_up_proj": self.mlp.gate_up_proj, "down_proj": self.mlp.down_proj}

    def forward(self, x: Tensor, span: Span, lora: nn.ModuleDict | None = None, k: int = 0,
                generator: torch.Generator | None = None) -> Tensor:
        """x [B, T, d] -> [B, T, d]; `lora` holds this layer's adapter, for the leading k rows."""
        before, after, before_mlp, after_mlp = self.norms
        y = self.self_attn(x if before is None else before(x), span, lora, k, generator)
        y = y if after is None else after(y)
        # The new term first: a sum takes its layout, transposed while decoding (see lora.linear).
        x = (y if self.scale == 1 else y * self.scale) + x
        y = self.mlp(x if before_mlp is None else before_mlp(x), lora, k, generator)
        y = y if after_mlp is None else after_mlp(y)
        return (y if self.scale == 1 else y * self.scale) + x


class Transformer(nn.Module):
    """The frozen decoder. `net(ids)` gives logits; its pieces let PRISM stop between layers."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.name: str | None = None  # what load() was asked for, and
        self.folder: Path | None = None  # where it was found; kept so that adapters can name it
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else nn.Parameter(
            torch.empty(shape), requires_grad=False)
        found = [rope_frequencies(rope, config.head_dim)
                 for rope in (config.rope, config.local_rope) if rope is not None]
        self.rope_scales = [scale for _, scale in found]
        # lists: they must survive meta and bf16
        self.inverse_frequencies = [inverse.tolist() for inverse, _ in found]
        self._inverse: Tensor | None = None  # the same on the device, made when first asked for

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in and the layers compute in."""
        return self.embed_tokens.dtype

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty KV cache of `slots` rows of `capacity` positions for this model."""
        return KVCache(self.config, slots, capacity, self.device, self.dtype)

    def flops(self, tokens: int, scored: int) -> int:
        """Floating-point operations of `tokens` through all layers and `scored` through the head:
        two for each weight; attention's own, small next to that for short texts, are left out."""
        layers = sum(p.numel() for p in self.layers.parameters())
        return 2 * (layers * tokens + self.lm_head.numel() * scored)

    def span(self, shape: Sequence[int], cache: KVCache | None = None,
             start: Tensor | None = None, keys: int | None = None) -> Span:
        """Positions, rotary tables and masks of a [B, T] block of tokens.

        Args:
            start: [B] tokens already in the cache of each row; None means 0 everywhere.
            keys: cached positions to attend over, at least max(start) + T; given by the caller, who
                knows it as a host number, so that no device value has to be waited for.
        """
        B, T = shape
        positions = torch.arange(T, device=self.device).expand(B, T)
        if start is not None:
            positions = positions + start[:, None]
        if self._inverse is None or self._inverse.device != self.device:
            self._inverse = torch.tensor(self.inverse_frequencies, device=self.device)
        rotary = []
        for inverse, scale in zip(self._inverse, self.rope_scales):
            angles = positions[..., None, None].float() * inverse  # [B, T, 1, D / 2], in fp32
            cos, sin = angles.cos() * scale, angles.sin() * scale
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # [B, T, 1, D]
            rotary.append((cos.to(self.dtype), sin.to(self.dtype)))
        S = T if keys is None else keys
        plain = (start is None and (cache is None or S == T)  # a kernel's own causal mask will do
                 and self.config.attention_cap is None)
        seen = positions if start is not None else positions[:1]  # every row sees the same
        masks = {w: None if plain and (w is None or T <= w) else _mask(seen, S, w, self.dtype)
                 for w in set(self.config.windows)}
        index = None if cache is None else cache.index(positions)
        return Span(rotary, masks, cache, index, S)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, d]."""
        x, scale = F.embedding(ids, self.embed_tokens), self.config.embedding_scale
        # Rounded first: what Gemma's states are, in bf16, a multiple of.
        return x if scale == 1 else x * float(torch.tensor(scale, dtype=x.dtype, device="cpu"))

    def run(self, x: Tensor, span: Span, layers: range, adapter: Sequence | None = None, k: int = 0,
            generator: torch.Generator | None = None, recompute: bool = False) -> Tensor:
        """Run x [B, T, d] through the given layers.

        Args:
            adapter: one entry a layer, its LoRA modules or None; None altogether is the base model.
            k: the adapter applies to the leading k rows.
            generator: source of LoRA dropout masks while training, else None.
            recompute: keep only each adapted layer's input for the backward pass and compute the
                rest again there (gradient checkpointing, arXiv 1604.06174): the same gradients for
                a third more arithmetic and a fraction of the memory.
        """
        for i in layers:
            lora = adapter[i] if adapter is not None and k > 0 else None
            run = _recomputed if recompute and lora is not None else Block.__call__
            x = run(self.layers[i], x, span, lora, k, generator)
        return x

    def hidden(self, ids: Tensor, adapter: Sequence | None = None, k: int = 0,
               generator: torch.Generator | None = None, recompute: bool = False) -> Tensor:
        """Right-padded ids [B, T] -> post-norm hidden states [B, T, d], the head's own input."""
        span = self.span(ids.shape)
        x = self.run(self.embed(ids), span, range(len(self.layers)), adapter, k, generator,
                     recompute)
        return self.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Post-norm hidden states [..., d] -> logits [..., V].

        A non-contiguous slice is copied first: the bf16 GEMM on one took 11.6 s, on the copy 0.04.
        The result of few rows is a transposed view, which what samples from it would read slowly.
        """
        return self.capped(linear(x.contiguous(), self.lm_head).contiguous())

    def head_exact(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        """Logits [n, len(ids)] of a few tokens from post-norm states x [n, d], in fp32.

        In bf16 the logits of like tokens are often equal (of 1,529 MMLU questions 353 had two best
        letters), and then the first would always win.
        """
        return self.capped(x.float() @ self.lm_head[list(ids)].float().t())

    def capped(self, logits: Tensor) -> Tensor:
        """Soft-capped logits, where the family has that (Gemma)."""
        cap = self.config.final_cap
        return logits if cap is None else (logits / cap).tanh() * cap

    def forward(self, ids: Tensor) -> Tensor:
        """The base model's logits [B, T, V] of right-padded ids [B, T]."""
        return self.head(self.hidden(ids))


def _recomputed(block: Block, x: Tensor, span: Span, lora: nn.ModuleDict, k: int,
                generator: torch.Generator | None) -> Tensor:
    """One layer whose inner activations are dropped and computed again in the backward pass, with
    the dropout masks of the first time."""
    state = None if generator is None else generator.get_state()

    def run(x: Tensor) -> Tensor:
        if generator is not None:
            generator.set_state(state)
        return block(x, span, lora, k, generator)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def _mask(positions: Tensor, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, keys]: 0 where the query at positions [B, T] may see the key at that index, else
    -inf. Added as it is; a boolean mask would be turned into this once more in every layer."""
    distance = positions[:, None, :, None] - torch.arange(keys, device=positions.device)
    hidden = distance < 0
    hidden = hidden if window is None else hidden | (distance >= window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy from the host without waiting: a GPU reads pinned memory while the host goes on."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def choose_device(name: str = "auto") -> torch.device:
    """"auto" is cuda if present, else cpu; anything else is taken at its word.

    Raises:
        InputError: not a device that torch has here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory and work are asked about without naming it
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """"auto" is bf16 where the hardware computes in it, else fp32; fp16 only if asked for."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InputError(f"--dtype {name}: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


# --------------------------------------------------------------------------------------------------
# Loading


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from model.safetensors or from the index of a sharded checkpoint.

    Raises:
        InputError: no weights, an index that names a missing file or one outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        check_inside(single)
        with _open(single) as file:
            return {name: single for name in file.keys()}
    if not index.is_file():
        raise InputError(f"{folder}: neither model.safetensors nor {index.name} is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: no weight_map")
    files = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not (
                shard.isprintable() and len(shard) < 256):
            raise InputError(f"{index}: {str(shard)[:80]!r} is not the name of a file in this "
                             "folder")
        if not (folder / shard).is_file():
            raise InputError(f"{index}: shard {shard} is missing")
        files[name] = folder / shard
    for path in set(files.values()):
        check_inside(path)
    return files


def check_inside(path: Path) -> None:
    """InputError if a weights file is a link out of its folder. In the hub's own cache, every file
    of snapshots/<commit> is a link into the blobs beside them."""
    home = path.parent.resolve()
    homes = {home} | ({home.parents[1] / "blobs"} if home.parent.name == "snapshots" else set())
    if path.resolve().parent not in homes:
        raise InputError(f"{path}: a link that leads out of its folder, to {path.resolve()}; copy "
                         "the file there if that is meant")


def _open(path: Path) -> safe_open:
    """Open a safetensors file; a broken one is an InputError that names it."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def parts(config: Config) -> dict[str, tuple[str, ...]]:
    """Our stacked projections -> the names of their parts in a Hugging Face model's layer."""
    return PARTS | FUSED if config.fused else PARTS


def destinations(net: Transformer) -> dict[str, tuple[Tensor, int, int]]:
    """Checkpoint tensor name -> (our parameter, first row, number of rows).

    This is where the stacked q/k/v and gate/up find their parts; everything else maps whole, and
    so do these if the checkpoint has them fused (then in the order in which we stack them).
    """
    c, found = net.config, {}

    def whole(name: str, parameter: Tensor) -> None:
        found[name] = (parameter, 0, parameter.shape[0])

    def stacked(prefix: str, names: Sequence[str], linear: GatedLoRALinear) -> None:
        row = 0
        sizes = linear.out_features if len(names) > 1 else (sum(linear.out_features),)
        for name, size in zip(names, sizes):
            for kind in ("weight", "bias"):
                if getattr(linear, kind) is not None:
                    found[f"{prefix}.{name}.{kind}"] = (getattr(linear, kind), row, size)
            row += size

    whole("model.embed_tokens.weight", net.embed_tokens)
    whole("model.norm.weight", net.norm.weight)
    if not c.tie_word_embeddings:
        whole("lm_head.weight", net.lm_head)
    for i, block in enumerate(net.layers):
        at = f"model.layers.{i}"
        for name, module in block.named_modules():
            if isinstance(module, RMSNorm):
                whole(f"{at}.{name}.weight", module.weight)
        for name, module in block.linears.items():
            stacked(at, parts(c)[name], module)
    return found


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, file by file: only one tensor is held beside the net."""
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in (n for n, p in files.items() if p == path):
                yield name, file.get_tensor(name)


def check_shapes(expected: dict[str, tuple[Tensor, int, int]], files: dict[str, Path]) -> None:
    """Compare the files' headers with the net, before anything of its size is allocated.

    Raises:
        InputError: a tensor of another shape, or one that is not floating point.
    """
    for path in sorted(set(files.values())):
        with _open(path) as file:
            present = set(file.keys())
            for name in (n for n, p in files.items() if p == path):
                if name not in present:
                    raise InputError(f"{path}: tensor {name} is in the index but not in the file")
                found, (parameter, _, rows) = file.get_slice(name), expected[name]
                shape = [rows, *parameter.shape[1:]]
                if found.get_shape() != shape or found.get_dtype() not in FLOATING:
                    raise InputError(f"{path}: tensor {name} is {found.get_dtype()} "
                                     f"{found.get_shape()}, expected floating point {shape}")


def load(name: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype | None = None, layers: int | None = None) -> Transformer:
    """Load a base model: eval mode, frozen, tensors copied one by one into place.

    Args:
        name: a model id or a local folder (see hub.resolve).
        dtype: what to compute in; None takes the checkpoint's own.
        layers: load only so many decoder layers, and no head: all that a gate needs.

    Raises:
        InputError: a missing, unexpected or wrongly shaped tensor, or an unsupported config.
    """
    folder = resolve(name)
    config = Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        net = Transformer(config)
    files = checkpoint_files(folder)
    expected = destinations(net)
    ignored = {n for n in files if n.endswith("rotary_emb.inv_freq")}  # derived, in old checkpoints
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # a copy of the embedding
    missing, unexpected = sorted(expected.keys() - files), sorted(files.keys() - expected - ignored)
    if missing or unexpected:
        kind, names = ("missing", missing) if missing else ("unexpected", unexpected)
        raise InputError(f"{folder}: {kind} tensor {names[0]}"
                         + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    check_shapes(expected, {n: p for n, p in files.items() if n in expected})
    if layers is not None:
        config = replace(config, num_layers=layers, tie_word_embeddings=True)
        with torch.device("meta"):
            net = Transformer(config)
    net.config.dtype = dtype or config.dtype
    # Not `to_empty`, whose first call imports 480 modules of torch: 34 MB, half a second.
    # Gemma's norms stay in fp32: in bf16 a small weight would be lost beside the 1 it is added to.
    empty = {n: torch.empty(p.shape, device=device, dtype=torch.float32 if config.norm_offset
                            and "norm" in n else net.config.dtype)
             for n, p in net.named_parameters()}
    net.load_state_dict(empty, strict=False, assign=True)  # a tied head is not among them
    if config.tie_word_embeddings:
        net.lm_head = net.embed_tokens
    expected = destinations(net)
    files = {n: p for n, p in files.items() if n in expected}
    for tensor_name, tensor in _tensors(files):
        parameter, row, rows = expected[tensor_name]
        part = parameter.data[row:row + rows].copy_(tensor)
        # One NaN makes every answer nonsense. A sum shows it, at a twentieth of isfinite's time.
        if not math.isfinite(part.sum()) and not bool(part.isfinite().all()):
            raise InputError(f"{files[tensor_name]}: tensor {tensor_name} holds NaN or infinity in "
                             f"{str(part.dtype).removeprefix('torch.')}; the file is damaged, or "
                             "needs another --dtype")
    for module in net.modules() if config.norm_offset else ():
        if isinstance(module, RMSNorm):
            module.weight.data.add_(config.norm_offset)
    if config.logits_divisor != 1:  # a head that knows nothing of it serves every loss and sampler
        net.norm.weight.data.div_(config.logits_divisor)
    net.name, net.folder = str(name), folder
    return net.eval()


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the start of two rows of every tensor: cheap, and in
    practice different for different weights. Identifies the base an adapter was trained on."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, path in sorted(checkpoint_files(folder).items()):
        with _open(path) as file:
            rows = file.get_slice(name)
            if not rows.get_shape():
                raise InputError(f"{path}: tensor {name} has no dimensions")
            for row in (0, rows.get_shape()[0] // 2):
                part = rows[row:row + 1].flatten()[:FINGERPRINT_ELEMENTS].contiguous()
                digest.update(name.encode() + part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
