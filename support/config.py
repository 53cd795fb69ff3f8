"""config.json -> `Config`: what the decoder in model.py needs to know of a checkpoint.

Architectures differ in few places, and each of them is a field of `Config`. What a family leaves to
its name is a row of `FAMILIES`, the only place that knows names of families. Whatever this decoder
would have to ignore is refused by name: a wrong answer costs more than an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import torch

from support.hub import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
# RoPE kinds and the numbers each of them needs beside rope_theta.
ROPE_KINDS = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
# Where a layer's RMSNorms stand, by their names in the checkpoint: before attention, after it (both
# before the sum), before the MLP, after it. Mind that one name means two places.
PRE_NORM = ("input_layernorm", None, "post_attention_layernorm", None)
POST_NORM = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
BOTH_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
              "post_feedforward_layernorm")


# --------------------------------------------------------------------------------------------------
# Reading one field


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
    if value is not None and not isinstance(value, bool):
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


# --------------------------------------------------------------------------------------------------
# Which layers have a sliding window, in files that do not list it by layer (`layer_types`), and
# which layers rotate queries and keys. Every rule gives one true or false a layer.

Rule = Callable[[dict, int, str], list[bool]]


def no_layer(raw: dict, layers: int, where: str) -> list[bool]:
    """No layer has a window."""
    return [False] * layers


def every_layer(raw: dict, layers: int, where: str) -> list[bool]:
    """All layers have the window (Mistral, Phi-3)."""
    return [True] * layers


def upper_layers(raw: dict, layers: int, where: str) -> list[bool]:
    """Layers from max_window_layers on, where use_sliding_window is set (Qwen)."""
    on = _flag(raw, "use_sliding_window", where)
    first = _number(raw, "max_window_layers", where, 28, low=-1)
    return [on and i >= first for i in range(layers)]


def unrotated_layers(raw: dict, layers: int, where: str) -> list[bool]:
    """The layers without positions, where use_sliding_window is set (SmolLM3)."""
    on = _flag(raw, "use_sliding_window", where)
    return [on and not rotated for rotated in rotated_layers(raw, layers, where)]


def by_pattern(raw: dict, layers: int, where: str) -> list[bool]:
    """All but every n-th layer, or as a text spells it: "LLLG" is three local layers, one global
    one, and so on; there the last layer is always global (EXAONE 4, Gemma, OLMo-3)."""
    pattern = raw.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and set(pattern) <= set("LG"):
        local = [pattern[i % len(pattern)] == "L" for i in range(layers)]
        return [*local[:-1], False]
    every = _integer(raw, "sliding_window_pattern", where)
    return [(i + 1) % every != 0 for i in range(layers)]


def rotated_layers(raw: dict, layers: int, where: str) -> list[bool]:
    """Which layers use RoPE: all but SmolLM3's every fourth, or as its list of 0 and 1 says."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        every = _integer(raw, "no_rope_layer_interval", where, default=layers + 1)
        flags = [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(
            flag not in (0, 1) for flag in flags):
        raise InputError(f"{where}: no_rope_layers = {str(flags)[:60]} is not a 0 or 1 a layer")
    return [bool(flag) for flag in flags[:layers]]


def windowed_layers(raw: dict, layers: int, where: str, rule: Rule) -> list[int | None]:
    """Each layer's window in tokens, None for full attention: by layer_types, else by the rule."""
    window, types = raw.get("sliding_window"), raw.get("layer_types")
    if window is not None:
        window = _integer(raw, "sliding_window", where, high=2**30)
    _flag(raw, "use_sliding_window", where)
    if types is None:
        local = [False] * layers if window is None else rule(raw, layers, where)
    elif not isinstance(types, list) or len(types) != layers or any(
            t not in ("full_attention", "sliding_attention") for t in types):
        raise InputError(f"{where}: layer_types = {str(types)[:60]} is not supported")
    else:
        local = [t == "sliding_attention" for t in types]
    return [window if yes else None for yes in local]


# --------------------------------------------------------------------------------------------------
# The families


@dataclass(frozen=True)
class Family:
    """What the name of a family stands for, beside what its config.json says.

    `defaults` are the fields that config.json may leave out, as transformers reads it then; a field
    of NEUTRAL that stands here is computed for this family.
    """

    defaults: dict = field(default_factory=dict)
    norms: tuple[str | None, ...] = PRE_NORM
    qk_norm: str | None = None  # RMSNorm of queries and keys: over each "head", or over "all"
    qkv_bias: bool = False  # q, k and v have a bias, o has none, and no field says so
    fused: bool = False  # the checkpoint has q, k, v in one tensor, and gate and up in one
    norm_offset: float = 0.0  # RMSNorm multiplies by this + weight
    embedding_by_width: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    activation_field: str = "hidden_act"
    windowed: Rule = no_layer  # the layers with a window where no layer_types are given
    nope_beside_windows: bool = False  # in a model with windows, layers without one do not rotate
    local_theta: str | None = None  # layers with a window have a RoPE of their own, of this theta
    misnamed_rope: tuple[str, ...] = ()  # RoPE kinds that mean something else in these files


_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256,
          "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed=every_layer),
    "qwen2": Family(qkv_bias=True, windowed=upper_layers),
    "qwen3": Family(qk_norm="head", windowed=upper_layers),
    "smollm3": Family({"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layers": None,
                       "no_rope_layer_interval": 4}, windowed=unrotated_layers),
    "olmo2": Family({"rms_norm_eps": 1e-5}, POST_NORM, qk_norm="all"),
    "granite": Family({"embedding_multiplier": 1.0, "attention_multiplier": 1.0,
                       "residual_multiplier": 1.0, "logits_scaling": 1.0}),
    "phi3": Family({"rms_norm_eps": 1e-5}, fused=True, windowed=every_layer,
                   misnamed_rope=("yarn",)),  # it is longrope there
    "gemma2": Family(_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                               "sliding_window_pattern": 2},
                     BOTH_NORMS, norm_offset=1.0, embedding_by_width=True,
                     activation_field="hidden_activation", windowed=by_pattern),
    "gemma3_text": Family(_GEMMA | {"final_logit_softcapping": None, "sliding_window_pattern": 6,
                                    "rope_theta": 1e6, "rope_local_base_freq": 1e4},
                          BOTH_NORMS, qk_norm="head", norm_offset=1.0, embedding_by_width=True,
                          activation_field="hidden_activation", windowed=by_pattern,
                          local_theta="rope_local_base_freq"),
    "olmo3": Family({"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096,
                     "sliding_window_pattern": 4}, POST_NORM, qk_norm="all", windowed=by_pattern,
                    local_theta="rope_theta"),  # without rope_scaling, which is for long contexts
    "exaone4": Family({"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
                      POST_NORM, qk_norm="head", windowed=by_pattern, nope_beside_windows=True),
}


# --------------------------------------------------------------------------------------------------
# The config


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
    local_rope: dict | None  # Gemma 3, OLMo-3: the rotary setting of the layers with a window
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    fused: bool  # Phi-3: the checkpoint, too, has q, k, v in one tensor, and gate and up
    norms: tuple[str | None, ...]  # which RMSNorms a layer has (see PRE_NORM)
    qk_norm: str | None  # RMSNorm before RoPE: over each "head" (Qwen3, Gemma 3), "all" (OLMo)
    norm_offset: float  # Gemma: RMSNorm multiplies by this + weight; folded into the weight
    activation: str  # of the MLP's gate: "silu" or "gelu" (in tanh's approximation)
    embedding_scale: float  # Gemma, Granite: factor on what is embedded
    attention_scale: float | None  # factor on q k^T; None is the usual head_dim^-0.5
    attention_cap: float | None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_cap: float | None  # Gemma 2: the same for the logits
    residual_scale: float  # Granite: factor on what attention and MLP add
    logits_divisor: float  # Granite: folded into the last norm's weight when loading
    windows: list[int | None]
    rotated: list[bool]  # SmolLM3, EXAONE 4: layers that rotate queries and keys
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
        family = _family(raw, where)
        raw = family.defaults | raw
        layers = _integer(raw, "num_hidden_layers", where, high=2**10)
        windows = windowed_layers(raw, layers, where, family.windowed)
        rotated = rotated_layers(raw, layers, where)
        if family.nope_beside_windows and raw.get("sliding_window") is not None:
            rotated = [window is not None for window in windows]
        rope, local_rope = _ropes(raw, family, where)
        bias = _flag(raw, "attention_bias", where)
        return cls(
            model_type=raw["model_type"],
            vocab_size=_integer(raw, "vocab_size", where, high=2**22),
            intermediate_size=_integer(raw, "intermediate_size", where),
            max_position_embeddings=_integer(raw, "max_position_embeddings", where, default=2048,
                                             high=2**30),
            rms_norm_eps=_number(raw, "rms_norm_eps", where, 1e-6, high=1.0),
            num_layers=layers, windows=windows, rotated=rotated, rope=rope, local_rope=local_rope,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
            qkv_bias=bias or family.qkv_bias, o_bias=bias and not family.qkv_bias,
            mlp_bias=_flag(raw, "mlp_bias", where), fused=family.fused, norms=family.norms,
            qk_norm=family.qk_norm, norm_offset=family.norm_offset,
            activation=_activation(raw, family, where), dtype=_dtype(raw, where),
            eos_token_ids=token_ids(raw, "eos_token_id", where),
            **_heads(raw, where), **_scales(raw, family, where))

    @property
    def projections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The four stacked projections of every layer: name -> (input width, output widths)."""
        d, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"qkv_proj": (d, (q, kv, kv)), "o_proj": (q, (d,)),
                "gate_up_proj": (d, (wide, wide)), "down_proj": (wide, (d,))}


def _family(raw: dict, where: str) -> Family:
    """The row of FAMILIES that is meant; raises on what cannot be computed here, by name."""
    kind = raw.get("model_type")
    for name, value in raw.items():
        if "experts" in name and value:
            raise InputError(f"{where}: {name} = {str(value)[:60]}: mixture-of-experts models "
                             f"(model_type {kind!r}) are not supported")
        if name in QUANTIZED and value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            by = f" by {method}" if method else ""
            raise InputError(f"{where}: {name}: checkpoints quantized{by} are not supported; take "
                             "the model's release in bfloat16, float16 or float32")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{where}: model_type {kind!r} is not supported (supported: "
                         f"{', '.join(FAMILIES)})")
    family = FAMILIES[kind]
    for name, neutral in NEUTRAL.items():
        if name in raw and raw[name] not in neutral and name not in family.defaults:
            raise InputError(f"{where}: {name} = {str(raw[name])[:60]} is not supported")
    return family


def _heads(raw: dict, where: str) -> dict[str, int]:
    """The width of the hidden states, and the heads that they are read with."""
    hidden = _integer(raw, "hidden_size", where)
    heads = _integer(raw, "num_attention_heads", where)
    kv_heads = _integer(raw, "num_key_value_heads", where, default=heads)
    head_dim = _integer(raw, "head_dim", where, default=max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise InputError(f"{where}: {heads} query heads cannot share {kv_heads} key/value heads "
                         f"of width {head_dim}")
    return {"hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads,
            "head_dim": head_dim}


def _scales(raw: dict, family: Family, where: str) -> dict[str, float | None]:
    """The factors and caps that some families have."""
    embedding = raw["hidden_size"]**0.5 if family.embedding_by_width else 1.0
    divisor = _factor(raw, "query_pre_attn_scalar", where, None)
    attention = None if divisor is None else divisor**-0.5
    return {"embedding_scale": _factor(raw, "embedding_multiplier", where, embedding),
            "attention_scale": _factor(raw, "attention_multiplier", where, attention),
            "attention_cap": _factor(raw, "attn_logit_softcapping", where, None),
            "final_cap": _factor(raw, "final_logit_softcapping", where, None),
            "residual_scale": _factor(raw, "residual_multiplier", where, 1.0),
            "logits_divisor": _factor(raw, "logits_scaling", where, 1.0)}


def _activation(raw: dict, family: Family, where: str) -> str:
    """What bends the MLP's gate."""
    name = str(raw.get(family.activation_field) or "silu")
    if name not in ACTIVATION_NAMES:
        raise InputError(f"{where}: {family.activation_field} = {name[:60]} is not supported")
    return ACTIVATION_NAMES[name]


def _dtype(raw: dict, where: str) -> torch.dtype:
    """What the checkpoint is stored in; fp32 where nothing says so."""
    name = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    name = "float32" if name is None else str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"{where}: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


# --------------------------------------------------------------------------------------------------
# Rotary settings


def _ropes(raw: dict, family: Family, where: str) -> tuple[dict, dict | None]:
    """The rotary setting, from either spelling, and that of the layers with a window if the family
    has two; a top-level rope_scaling is then the other layers'."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {name} = {str(value)[:60]!r} is not an object")
    by_layer_type = any(isinstance(value, dict) for value in new.values())
    if family.local_theta is None:
        if by_layer_type:
            raise InputError(f"{where}: rope_parameters by layer type are not supported")
        return _rope(raw, family, where, {"rope_theta": 10000.0, **old}, new), None
    if new and not by_layer_type:
        raise InputError(f"{where}: rope_parameters have no full_attention and sliding_attention")
    full = _rope(raw, family, where, old, new.get("full_attention") or {})
    local = _rope(raw | {"rope_theta": raw[family.local_theta]}, family, where, {},
                  new.get("sliding_attention") or {})
    return full, local


def _rope(raw: dict, family: Family, where: str, old: dict, new: dict) -> dict:
    """The rotary setting as one dict: `new` before the top-level rope_theta before `old`; raises on
    a kind we do not compute."""
    if not isinstance(new, dict):
        raise InputError(f"{where}: rope_parameters of a layer type are not an object")
    rope = {**old, **new}
    if "rope_theta" not in new and raw.get("rope_theta") is not None:
        rope["rope_theta"] = raw["rope_theta"]
    kind = rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if not isinstance(kind, str) or kind not in ROPE_KINDS or kind in family.misnamed_rope:
        raise InputError(f"{where}: rope_type {kind!r} is not supported "
                         f"(supported: {', '.join(ROPE_KINDS)})")
    at = f"{where}: rope_type {kind}"
    for name in ROPE_KINDS[kind]:
        _number(rope, name, at)
    _number(rope, "rope_theta", at, low=1.0)
    for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name) is not None:
            _number(rope, name, at, low=-1e-9)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(f"{at}: low_freq_factor is not below high_freq_factor")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor is not supported")
    trained = raw.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    rope.setdefault("original_max_position_embeddings", trained or 2048)
    _number(rope, "original_max_position_embeddings", at)
    return rope
