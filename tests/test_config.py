"""config.py: what a config.json says, and that nothing which would have to be ignored is read."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Callable

import pytest
from conftest import FAMILY_EXTRAS
from test_model import to_legacy_spelling

from support.config import FAMILIES, Config
from support.hub import InputError, read_json

ROOT = Path(__file__).parent.parent
TinyFactory = Callable[..., Path]


def raw(tiny_checkpoint: TinyFactory, family: str = "llama", **changes: object) -> dict:
    """The config.json of a tiny checkpoint, with some of its fields changed."""
    return read_json(tiny_checkpoint(family) / "config.json") | changes


def test_nothing_else_knows_a_family() -> None:
    """A new family would have to be looked for in more places than its row in the table: no other
    product module compares a model_type, or anything with the name of a family."""
    names = {*FAMILIES, "gemma", "gemma3", "qwen", "llama", "olmo", "exaone", "phi", "model_type"}
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) or (
                    isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ("startswith", "endswith")):
                words = {getattr(part, "value", None) for part in ast.walk(node)
                         if isinstance(part, ast.Constant)}
                words |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                if words & names:
                    found.append(f"{path.name}:{node.lineno}")
    assert [line for line in found if not line.startswith("config.py")] == []


def test_every_family_is_tried() -> None:
    """A row of the table without a tiny checkpoint would be in no parity test."""
    assert FAMILY_EXTRAS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "su"])
@pytest.mark.parametrize("legacy", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_unknown_rope_kind_is_refused_by_name(kind: str, legacy: bool,
                                              tiny_checkpoint: TinyFactory) -> None:
    """A RoPE kind that is not computed would be ignored, in either spelling."""
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 2.0}
    config = raw(tiny_checkpoint, rope_parameters=rope)
    if legacy:
        to_legacy_spelling(config)
    with pytest.raises(InputError, match=kind):
        Config.from_json(config)


@pytest.mark.parametrize("field, value, named", [
    ("model_type", "gpt2", "gpt2"), ("model_type", None, "model_type"),
    ("hidden_act", "gelu", "hidden_act"), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("num_attention_heads", 3, "heads"), ("hidden_size", 0, "hidden_size"),
    ("hidden_size", "64", "hidden_size"), ("vocab_size", None, "vocab_size"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quantized by gptq"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantized"), ("dtype", "int8", "int8"),
    ("num_local_experts", 4, "num_local_experts.*mixture"),
    ("n_routed_experts", 64, "mixture"), ("no_rope_layers", [1, 0, 1, 1], "no_rope_layers"),
    ("num_hidden_layers", 10**9, "num_hidden"),
], ids=lambda value: str(value)[:20])
def test_config_that_cannot_be_computed_is_refused(field: str, value: object, named: str,
                                                   tiny_checkpoint: TinyFactory) -> None:
    """An architecture, a size or a format that this decoder has not would be answered with
    nonsense, or with a traceback."""
    with pytest.raises(InputError, match=named):
        Config.from_json(raw(tiny_checkpoint, **{field: value}))


@pytest.mark.parametrize("family, field, value", [
    ("smollm3", "no_rope_layers", [1, 0]), ("smollm3", "no_rope_layers", [1, 2, 1, 1]),
    ("smollm3", "attn_logit_softcapping", 30.0), ("granite", "logits_scaling", 0),
    ("granite", "residual_multiplier", "0.4"), ("gemma2", "hidden_activation", "gelu"),
    ("gemma2", "use_bidirectional_attention", True), ("gemma2", "final_logit_softcapping", -1.0),
    ("gemma3_text", "attn_logit_softcapping", 30.0), ("llama", "rope_local_base_freq", 10.0),
    ("gemma3_text", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
    ("llama", "rope_parameters", {"full_attention": {"rope_theta": 500.0}}),
    ("phi3", "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
    ("phi3", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    ("phi3", "rope_parameters", {"partial_rotary_factor": 0.75}),
    ("olmo3", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
    ("exaone4", "sliding_window_pattern", "LXLG"), ("exaone4", "attn_logit_softcapping", 30.0),
], ids=lambda value: str(value)[:20])
def test_family_field_that_cannot_be_computed(family: str, field: str, value: object,
                                              tiny_checkpoint: TinyFactory) -> None:
    """A family's own field with a value that makes no sense, or one that only others have, would
    be ignored."""
    named = {"rope_parameters": "longrope|yarn|partial_rotary|rope_parameters"}.get(field, field)
    config = raw(tiny_checkpoint, family, **{field: value})
    if field == "sliding_window_pattern":
        config.pop("layer_types")
    with pytest.raises(InputError, match=named):
        Config.from_json(config)


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 500.0},
    {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    {"rope_type": "yarn", "rope_theta": 500.0, "factor": "four"},
], ids=["linear-without-factor", "llama3-without-ramp", "yarn-with-words"])
def test_rope_setting_without_its_numbers(rope: dict, tiny_checkpoint: TinyFactory) -> None:
    """A rotary setting that lacks a number would end in a traceback."""
    with pytest.raises(InputError, match="factor"):
        Config.from_json(raw(tiny_checkpoint, rope_parameters=rope))
