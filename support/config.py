"""config.json -> `Config`: what the decoder in model.py needs to know of a checkpoint.

Architectures differ in few places, and each of them is a field of `Config`. What a family leaves to
its name is a row of `FAMILIES`, the only place that knows names of families. A field that a
family's row does not have is one that transformers does not read either; what it would compute and
this decoder would not is refused by name: a wrong answer costs more than an error.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Callable

import torch
import torch.nn.functional as F

from support.fields import Fields
from support.hub import InputError

KEPT_TOKENS, KEPT_BYTES = 16384, 2**31  # see `kept_tokens`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**20  # of most sizes, so that an absurd one fails before anything is allocated
TINY = 1e-12  # the least of what must be above zero
# Fields that change the arithmetic, and the values that do not. Where a family's row has one, it is
# computed.
NEUTRAL = {"is_causal": (True,), "is_encoder_decoder": (None, False),
           "use_bidirectional_attention": (None, False), "partial_rotary_factor": (None, 1.0),
           "per_layer_config": (None, {}), "fusion_config": (None, {}),
           "hidden_activation": (None, "silu"), **dict.fromkeys((
               "transformers_weights", "query_pre_attn_scalar", "attention_multiplier",
               "residual_multiplier", "embedding_multiplier", "logits_scaling", "no_rope_layers",
               "final_logit_softcapping", "attn_logit_softcapping", "rope_local_base_freq"),
               (None,))}
QUANTIZED = ("quantization_config", "quantization", "compression_config")  # the last: older files
ACTIVATIONS = {"silu": F.silu, "swish": F.silu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
# RoPE kinds and the numbers each of them needs beside rope_theta, or may have.
ROPE_KINDS = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
# Where a layer's RMSNorms stand (after: before the sum), and their names in the checkpoint. Mind
# that one name means two places.
PRE_NORM = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
POST_NORM = {"after_attention": "post_attention_layernorm",
             "after_mlp": "post_feedforward_layernorm"}
BOTH_NORMS = PRE_NORM | POST_NORM | {"before_mlp": "pre_feedforward_layernorm"}


@dataclass(frozen=True)
class Family:
    """What the name of a family stands for, beside what its config.json says.

    `defaults` are the fields that it reads beside those of `COMMON`, and what transformers takes
    where config.json leaves one out.
    """

    defaults: dict
    norms: dict[str, str] = field(default_factory=PRE_NORM.copy)
    qk_norm: str | None = None  # RMSNorm before RoPE: over each "head", or over "all" together
    qkv_bias: bool = False  # q, k and v have a bias, o has none, and no field says so
    fused: bool = False  # the checkpoint has q, k, v in one tensor, and gate and up in one
    norm_offset: float = 0.0  # RMSNorm multiplies by this + weight; folded into the weight
    embedding_by_width: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    global_every: int = LARGEST  # each n-th layer has no window, where no layer_types are given
    nope_beside_windows: bool = False  # in a model with windows, layers without one do not rotate
    local_theta: float | None = None  # layers with a window have a RoPE of their own; its default
    rope_kinds: tuple[str, ...] = tuple(ROPE_KINDS)
    tokenizer: str | None = None  # the class where tokenizer_config.json names none


# Fields that every family reads. None: required, or what follows from the other fields.
COMMON = {
    "vocab_size": None, "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None,
    "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None,
    "max_position_embeddings": 2048, "original_max_position_embeddings": None,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_theta": 1e4, "rope_parameters": None, "rope_scaling": None, "dtype": None,
    "torch_dtype": None, "eos_token_id": None}
_BIAS = {"attention_bias": False}
_BIASES = _BIAS | {"mlp_bias": False}
_WINDOW = {"sliding_window": 4096, "layer_types": None}
_QWEN = _WINDOW | {"use_sliding_window": False, "max_window_layers": 28, "num_key_value_heads": 32,
                   "max_position_embeddings": 32768}
_OLMO = _BIAS | {"rms_norm_eps": 1e-5}
_GEMMA = _BIAS | _WINDOW | {
    "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": None}
FAMILIES: dict[str, Family] = {
    "llama": Family(_BIASES),
    "mistral": Family(_WINDOW | {"num_key_value_heads": 8, "max_position_embeddings": 2**17}),
    "qwen2": Family(_QWEN, qkv_bias=True, tokenizer="Qwen2"),
    "qwen3": Family(_QWEN | _BIAS | {"head_dim": 128}, qk_norm="head", tokenizer="Qwen2"),
    "smollm3": Family(_BIASES | _WINDOW | {
        "sliding_window": None, "use_sliding_window": False, "no_rope_layers": None,
        "no_rope_layer_interval": 4, "tie_word_embeddings": True, "num_key_value_heads": 4,
        "rope_theta": 2e6, "max_position_embeddings": 32768}),
    "olmo2": Family(_OLMO, POST_NORM, qk_norm="all"),
    "granite": Family(_BIASES | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0,
                                 "residual_multiplier": 1.0, "logits_scaling": 1.0}),
    "phi3": Family({"rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 4096},
                   fused=True, rope_kinds=("default",)),
    "gemma2": Family(_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                               "max_position_embeddings": 8192},
                     BOTH_NORMS, norm_offset=1.0, embedding_by_width=True,
                     global_every=2, tokenizer="Gemma"),
    "gemma3_text": Family(_GEMMA | {"sliding_window_pattern": 6, "rope_theta": 1e6,
                                    "rope_local_base_freq": None,
                                    "max_position_embeddings": 2**17},
                          BOTH_NORMS, qk_norm="head", norm_offset=1.0, embedding_by_width=True,
                          local_theta=1e4, tokenizer="Gemma"),
    "olmo3": Family(_OLMO | _WINDOW | {"rope_theta": 5e5}, POST_NORM, qk_norm="all",
                    global_every=4, local_theta=5e5),
    "exaone4": Family(_WINDOW | {"rms_norm_eps": 1e-5, "sliding_window_pattern": 4,
                                 "num_key_value_heads": 32},
                      POST_NORM, qk_norm="head", nope_beside_windows=True),
}


@dataclass
class Config:
    """What the decoder needs to know of a checkpoint's `config.json`.

    `ropes` has the merged rotary setting with its `rope_type` and `rope_theta`, and another one if
    layers with a window have their own (Gemma 3, OLMo-3); `windows` has one entry a layer, the
    width of its sliding window in tokens or None for full attention.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    ropes: list[dict]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: Callable  # of the MLP's gate
    embedding_scale: float  # Gemma, Granite: factor on what is embedded
    attention_scale: float | None  # factor on q k^T; None is the usual head_dim^-0.5
    attention_cap: float | None  # Gemma 2: scores become cap * tanh(scores / cap)
    final_cap: float | None  # Gemma 2: the same for the logits
    residual_scale: float  # Granite: factor on what attention and MLP add
    logits_divisor: float  # Granite: folded into the last norm's weight when loading
    windows: list[int | None]
    rotated: list[bool]  # SmolLM3, EXAONE 4: layers that rotate queries and keys
    dtype: torch.dtype
    eos_token_ids: list[int]

    @classmethod
    def from_json(cls, raw: dict, where: str = "config.json") -> "Config":
        """Read both spellings in circulation: top-level `rope_theta` / `rope_scaling` /
        `torch_dtype`, and `rope_parameters` / `dtype`. InputError on an unknown model_type or RoPE
        kind, or on a field whose value this decoder would have to ignore, by name.
        """
        family = _family(raw, where)
        known = COMMON | family.defaults
        fields = Fields({name: raw.get(name, known[name]) for name in known}, where)
        size = partial(fields.integer, low=1, high=LARGEST)
        scale = partial(fields.number, low=TINY, high=1e12)
        layers = fields.integer("num_hidden_layers", 1, 2**10)
        rotated = _rotated_layers(fields, layers)
        windows = _windows(fields, family, rotated)
        if family.nope_beside_windows and fields.values["sliding_window"] is not None:
            rotated = [window is not None for window in windows]
        bias = fields.flag("attention_bias")
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", default=heads)
        head_dim = size("head_dim", default=max(hidden // heads, 1))
        if heads % kv_heads or head_dim % 2:
            raise InputError(f"{where}: {heads} query heads cannot share {kv_heads} key/value "
                             f"heads of width {head_dim}")
        embedding = hidden**0.5 if family.embedding_by_width else 1.0
        divisor = scale("query_pre_attn_scalar", default=None)
        attention = None if divisor is None else divisor**-0.5
        return cls(
            family=family, vocab_size=fields.integer("vocab_size", 1, 2**22), hidden_size=hidden,
            intermediate_size=size("intermediate_size"), num_layers=layers, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=head_dim, windows=windows, rotated=rotated,
            max_position_embeddings=fields.integer("max_position_embeddings", 1, 2**30),
            rms_norm_eps=fields.number("rms_norm_eps", 0, 1), ropes=_ropes(fields, family),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=bias or family.qkv_bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias"),
            activation=_activation(fields), dtype=_dtype(fields),
            eos_token_ids=fields.integers("eos_token_id", 0, 2**22),
            embedding_scale=scale("embedding_multiplier", default=embedding),
            attention_scale=scale("attention_multiplier", default=attention),
            attention_cap=scale("attn_logit_softcapping", default=None),
            final_cap=scale("final_logit_softcapping", default=None),
            residual_scale=scale("residual_multiplier", default=1.0),
            logits_divisor=scale("logits_scaling", default=1.0))

    @property
    def projections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The four stacked projections of every layer: name -> (input width, output widths)."""
        d, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"qkv_proj": (d, (q, kv, kv)), "o_proj": (q, (d,)),
                "gate_up_proj": (d, (wide, wide)), "down_proj": (wide, (d,))}


def _family(raw: dict, where: str) -> Family:
    """The row of FAMILIES that is meant; raises on what cannot be computed here, by name."""
    kind, fields = raw.get("model_type"), Fields(raw, where)
    for name, value in raw.items():
        if "experts" in name and value:
            fields.refuse(name, f"makes it a mixture-of-experts model (model_type {kind!r}), which "
                                "is not supported")
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
            fields.refuse(name, "is not supported")
    return family


def tokenizer_class(raw: dict) -> str | None:
    """The class of a config.json's tokenizer, where tokenizer_config.json names none."""
    kind = raw.get("model_type")
    return FAMILIES[kind].tokenizer if isinstance(kind, str) and kind in FAMILIES else None


def _rotated_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers use RoPE: all but SmolLM3's every fourth, or as its list of 0 and 1 says."""
    if fields.values.get("no_rope_layers") is None:
        every = fields.integer("no_rope_layer_interval", 1, LARGEST, default=LARGEST)
        return [(i + 1) % every != 0 for i in range(layers)]
    flags = fields.integers("no_rope_layers", 0, 1)
    if len(flags) < layers:
        fields.refuse("no_rope_layers", "is not a 0 or 1 a layer")
    return [bool(flag) for flag in flags[:layers]]


def _windows(fields: Fields, family: Family, rotated: list[bool]) -> list[int | None]:
    """Each layer's window in tokens, None for full attention: by layer_types.

    In files without it, no layer has one where use_sliding_window is off; else those without
    positions have it (SmolLM3), those from max_window_layers on (Qwen), or all but every n-th.
    """
    values, layers = fields.values, len(rotated)
    window = fields.integer("sliding_window", 1, 2**30, default=None)
    types = values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(
                t not in ("full_attention", "sliding_attention") for t in types):
            fields.refuse("layer_types", "is not supported")
        local = [t == "sliding_attention" for t in types]
    elif window is None or ("use_sliding_window" in values
                            and not fields.flag("use_sliding_window")):
        local = [False] * layers
    elif "no_rope_layers" in values:
        local = [not yes for yes in rotated]
    else:
        first, every = 0, family.global_every
        if "sliding_window_pattern" in values:
            every = fields.integer("sliding_window_pattern", 1, LARGEST)
        if "max_window_layers" in values:
            first = fields.integer("max_window_layers", 0, LARGEST)
        local = [i >= first and (i + 1) % every != 0 for i in range(layers)]
    return [window if yes else None for yes in local]


def _activation(fields: Fields) -> Callable:
    """What bends the MLP's gate; Gemma calls it otherwise than the others."""
    field_name = "hidden_activation" if "hidden_activation" in fields.values else "hidden_act"
    name = fields.text(field_name)
    if name not in ACTIVATIONS:
        fields.refuse(field_name, "is not supported")
    return ACTIVATIONS[name]


def _dtype(fields: Fields) -> torch.dtype:
    """What the checkpoint is stored in; fp32 where nothing says so."""
    name = fields.text("dtype", None) or fields.text("torch_dtype", "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"{fields.where}: dtype {name[:60]!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _ropes(fields: Fields, family: Family) -> list[dict]:
    """The rotary setting, from either spelling, and that of the layers with a window if the family
    has two; a top-level rope_scaling is then the other layers'.

    Where both spellings stand in one file, transformers takes the older one, rope_scaling.
    """
    old, new = fields.object("rope_scaling"), fields.object("rope_parameters")
    theta = fields.number("rope_theta", 0, 1e12)
    by_layer_type = any(isinstance(value, dict) for value in new.values())
    if family.local_theta is None:
        if by_layer_type:
            fields.refuse("rope_parameters", "(by layer type) is not supported")
        name = "original_max_position_embeddings"
        original = {} if fields.values[name] is None else {name: fields.values[name]}
        return [_rope((old or new) | original, theta, fields, family)]
    if new and not by_layer_type:
        fields.refuse("rope_parameters", "has no full_attention and sliding_attention")
    if "type" in old and "rope_type" not in old:
        fields.refuse("rope_scaling", "has type in place of rope_type, which transformers ignores")
    by_type = Fields(new, f"{fields.where}: rope_parameters")
    full = _rope(by_type.object("full_attention") | old, theta, fields, family)
    if not full.get("truncate", True):  # transformers takes it for true here
        raise InputError(f"{fields.where}: truncate = false is not supported in rope_parameters")
    local_theta = fields.number("rope_local_base_freq", 0, 1e12, family.local_theta)
    return [full, _rope(by_type.object("sliding_attention"), local_theta, fields, family)]


def _rope(given: dict, theta: float, fields: Fields, family: Family) -> dict:
    """What `rope_frequencies` reads of a rotary setting; raises on a kind we do not compute."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in family.rope_kinds:
        raise InputError(f"{fields.where}: rope_type {str(kind)[:60]!r} is not supported "
                         f"(supported: {', '.join(family.rope_kinds)})")
    rope = Fields({"rope_theta": theta} | given, f"{fields.where}: rope_type {kind}")
    rope.number("partial_rotary_factor", 1, 1, default=1)
    found = {"rope_type": kind, "rope_theta": rope.number("rope_theta", 1 + TINY, 1e12)}
    for name in ROPE_KINDS[kind]:
        found[name] = rope.number(name, TINY, 1e12)
    if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        rope.refuse("low_freq_factor", "is not below high_freq_factor")
    if kind == "yarn":
        found |= {name: rope.number(name, 0, 1e12, default=None) for name in YARN_OPTIONS}
        # A null is false to transformers, but where a family has two settings.
        given_null = "truncate" in given and family.local_theta is None
        found["truncate"] = rope.flag("truncate", default=not given_null)
    if kind != "default":
        found["original_max_position_embeddings"] = rope.integer(
            "original_max_position_embeddings", 1, 2**30, fields.values["max_position_embeddings"])
    return found


def cache_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def kept_tokens(config: Config, dtype: torch.dtype) -> int:
    """Tokens of shared beginnings whose keys and values are held while scoring, at most."""
    return min(KEPT_TOKENS, KEPT_BYTES // cache_bytes(config, dtype))
