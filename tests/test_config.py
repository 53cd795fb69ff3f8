"""config.py: what a config.json says, and that nothing which would have to be ignored is read."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Tiny, copy_folder, edit_json
from test_model import TOLERANCE, assert_parity, assert_same, oracle, random_ids
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from model import load
from support.config import COMMON, FAMILIES, NEUTRAL, Config
from support.hub import InputError, read_json

ROOT = Path(__file__).parent.parent


def raw(tiny_checkpoint: Tiny, family: str = "llama", **changes: object) -> dict:
    """The config.json of a tiny checkpoint, with some of its fields changed."""
    return read_json(tiny_checkpoint(family) / "config.json") | changes


def test_nothing_else_knows_a_family() -> None:
    """A new family would have to be looked for in more places than its row in the table: no other
    product module has the name of one, or asks for a model_type."""
    name = re.compile(rf"""["']({'|'.join(FAMILIES)}|gemma|gemma3|qwen)["']|model_type""")
    found = {path.name for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"))
             if name.search(path.read_text(encoding="utf-8"))}
    assert found == {"config.py", "hub.py"}  # which writes a config.json


LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 2.0}
# Refused where no row of the table computes it: a value that changes what transformers computes.
REFUSED = {"is_encoder_decoder": True, "use_bidirectional_attention": True, "is_causal": False,
           "per_layer_config": {"1": {"intermediate_size": 48}}, "partial_rotary_factor": 0.5,
           "transformers_weights": "other.safetensors"}


@pytest.mark.parametrize("family, field, value, named", [
    ("llama", "model_type", None, "model_type"), ("llama", "hidden_act", "gelu", "hidden_act"),
    ("llama", "num_attention_heads", 3, "heads"), ("llama", "vocab_size", None, "vocab_size"),
    ("llama", "quantization_config", {"bits": 4}, "quantization_config"),
    ("llama", "quantization_config", {"quant_method": "gptq"}, "quantized by gptq"),
    ("llama", "quantization", {"group_size": 64, "bits": 4}, "quantized"),
    ("llama", "num_local_experts", 4, "num_local_experts.*mixture"),
    ("llama", "rope_parameters", LONGROPE, "longrope"),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}, "dynamic"),
    ("llama", "rope_parameters", {"full_attention": {"rope_theta": 500.0}}, "rope_parameters"),
    ("gemma3_text", "rope_parameters", {"rope_theta": 5.0}, "rope_parameters"),
    ("gemma3_text", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
    ("olmo3", "rope_scaling", {"rope_type": "yarn", "factor": 4.0, "truncate": False}, "truncate"),
    ("phi3", "rope_parameters", LONGROPE, "longrope"),
    ("phi3", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "yarn"),
    ("phi3", "rope_parameters", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    *((family, field, value, field) for family, field, value in [
        ("llama", "no_rope_layers", [1, 0, 1, 1]), ("llama", "rope_local_base_freq", 10.0),
        ("smollm3", "no_rope_layers", [1, 0]), ("smollm3", "no_rope_layers", [1, 2, 1, 1]),
        ("smollm3", "attn_logit_softcapping", 30.0), ("granite", "logits_scaling", 0),
        ("granite", "residual_multiplier", "0.4"), ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "final_logit_softcapping", -1.0), ("exaone4", "sliding_window_pattern", "LLLG"),
        ("gemma3_text", "sliding_window_pattern", None),
        ("gemma3_text", "attn_logit_softcapping", 30.0),
        *((family, *fate) for family in FAMILIES for fate in REFUSED.items())])
], ids=lambda value: str(value)[:20])
def test_config_that_cannot_be_computed(family: str, field: str, value: object, named: str,
                                        tiny_checkpoint: Tiny) -> None:
    """An architecture, a size or a format that this decoder has not, a field that transformers
    computes and we do not, or only in other families, or a value that makes no sense would be
    ignored, or end in a traceback."""
    config = raw(tiny_checkpoint, family, **{field: value})
    if field == "sliding_window_pattern":
        config.pop("layer_types")
    with pytest.raises(InputError, match=named):
        Config.from_json(config)


# --------------------------------------------------------------------------------------------------
# What happens to every field of transformers' config classes

# Computed: another value that a tiny checkpoint can be built with.
COMPUTED = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 20, "rms_norm_eps": 0.03,
    "max_position_embeddings": 512, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "silu",
    "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
    "embedding_multiplier": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7,
    "logits_scaling": 0.5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 30, "sliding_window": 6, "use_sliding_window": True,
    "max_window_layers": 2, "sliding_window_pattern": 3,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "no_rope_layers": [0, 1, 1, 0, 1], "no_rope_layer_interval": 3, "eos_token_id": [3, 5],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 900.0, "factor": 8.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dtype": "bfloat16"}
BY_LAYER_TYPE = {"full_attention": {"rope_type": "yarn", "rope_theta": 900.0, "factor": 4.0},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}
ROPES = {"phi3": {"rope_type": "default", "rope_theta": 900.0}, "gemma3_text": BY_LAYER_TYPE,
         "olmo3": BY_LAYER_TYPE}
# Neutral: another value, which changes no logit.
UNREAD = {
    "attention_dropout": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5, "initializer_range": 0.5,
    "use_cache": False, "bos_token_id": 7, "pad_token_id": 9, "chunk_size_feed_forward": 3,
    "pretraining_tp": 2, "architectures": ["Other"], "problem_type": "regression",
    "id2label": {"0": "a"}, "label2id": {"a": 0}, "output_attentions": True, "return_dict": True,
    "output_hidden_states": True, "transformers_version": "4.0.0", "_name_or_path": "other",
    "_sliding_window_pattern": 2}
EXCEPTIONS = {("gemma3_text", "attn_logit_softcapping"): NEUTRAL,  # transformers reads it nowhere
              ("phi3", "original_max_position_embeddings"): UNREAD}  # of longrope only


def fields_of(family: str) -> set[str]:
    """The fields that transformers' config class of a family writes."""
    return set(AutoConfig.for_model(family).to_dict())


def computed(family: str) -> dict[str, object]:
    """The computed fields that a family has, each with another value."""
    found = COMPUTED | {"rope_parameters": ROPES.get(family, COMPUTED["rope_parameters"])}
    mine = {name for name in fields_of(family) if (family, name) not in EXCEPTIONS}
    if family == "mistral":  # transformers makes a Ministral of it where there are layer_types
        mine.add("layer_types")
    return {name: value for name, value in found.items() if name in mine}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_a_fate(family: str) -> None:
    """A field that a new version of transformers brings would be dropped without a look."""
    fates = [name for table in (COMPUTED, UNREAD, REFUSED) for name in table]
    assert len(fates) == len(set(fates)) and set(REFUSED) <= NEUTRAL.keys()
    excepted = {name for kind, name in EXCEPTIONS if kind == family}
    assert fields_of(family) - set(fates) - excepted == {"model_type"}
    assert FAMILIES[family].defaults.keys() - COMMON.keys() - set(COMPUTED) == (
        {"rope_local_base_freq"} if family == "gemma3_text" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_computed_as_by_transformers(family: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A field would be ignored, or computed otherwise (a window ignored, off by one or on other
    layers, in contexts of three): each changes our Config, and with all of them changed the logits
    are transformers'."""
    changes = computed(family)
    base = raw(tiny_checkpoint, family)
    for name in ("layer_types", "no_rope_layers"):  # they hide the rules behind them
        base.pop(name, None)
    if "layer_types" in changes:
        base |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for name, value in changes.items():
        value = False if name == "use_sliding_window" else value
        assert Config.from_json(base | {name: value}) != Config.from_json(base), name
    del changes["dtype"]
    types = changes.pop("layer_types", None)
    if types is not None:
        changes["layer_types"] = None
    folder = copy_folder(tiny_checkpoint(family, **changes), tmp_path / "c")
    edit_json(folder / "config.json", lambda c: c.pop("layer_types", None))
    assert_parity(folder)
    if types is not None:
        edit_json(folder / "config.json",
                  lambda c: c.update(layer_types=[*types, "full_attention"]))
        assert_parity(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_transformers_ignores(family: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """What transformers ignores would be computed: neutral fields, and those of other families."""
    mine = FAMILIES[family].defaults.keys() | COMMON.keys() | NEUTRAL.keys()
    others = {name: value for name, value in COMPUTED.items() if name not in mine}
    changes = UNREAD | others
    folder = copy_folder(tiny_checkpoint(family), tmp_path / "c")
    ids, before = random_ids(2, 24), Config.from_json(raw(tiny_checkpoint, family))
    theirs = oracle(folder, ids)
    edit_json(folder / "config.json", lambda c: c.update(changes))
    assert Config.from_json(read_json(folder / "config.json")) == before
    assert (oracle(folder, ids) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_left_out_or_null(family: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A field left out, or null, would be read otherwise than transformers' class fills it in."""
    folder = copy_folder(tiny_checkpoint(family), tmp_path / "c")
    whole, compared = read_json(folder / "config.json"), 0
    for name in [*whole, "rope_theta"]:
        for gone in ([name], [name, "layer_types", "rope_parameters", "no_rope_layers"]):
            left = {n: v for n, v in whole.items() if n not in gone}
            for changed in (left, left | {name: None}):
                (folder / "config.json").write_text(json.dumps(changed))
                try:
                    filled = AutoConfig.from_pretrained(folder).to_dict()
                    theirs = Config.from_json(json.loads(json.dumps(filled, default=str)))
                    ours = Config.from_json(changed)
                except (InputError, ValueError, TypeError, KeyError, AttributeError,
                        ZeroDivisionError, StrictDataclassError):
                    continue  # one of the two refuses it
                assert replace(ours, eos_token_ids=[]) == replace(theirs, eos_token_ids=[]), changed
                compared += 1
    assert compared > 40


LLAMA3, YARN = COMPUTED["rope_parameters"], {"rope_type": "yarn", "factor": 4.0}
LONG = YARN | {"rope_theta": 5000.0, "original_max_position_embeddings": 64}
KINDS = [
    {"rope_type": "default", "rope_theta": 1000.0},
    {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    LLAMA3 | {"rope_theta": 5000.0, "original_max_position_embeddings": 64},
    LONG, YARN | {"rope_theta": 5000.0}, LONG | {"attention_factor": 0.8},
    LONG | {"factor": 16.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    LONG | {"beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}, LONG | {"truncate": None}]
SPELLINGS = [
    {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 700},
    {"rope_parameters": None, "rope_scaling": YARN | {"rope_theta": 30.0}, "rope_theta": 700},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}, "rope_scaling": YARN},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 700.0},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64},
     "original_max_position_embeddings": 32},
    {"rope_parameters": None, "rope_theta": 700.0},
    {"rope_parameters": BY_LAYER_TYPE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"full_attention": LLAMA3}, "rope_theta": 700.0}]


@pytest.mark.parametrize("family, spelling", [
    *(("llama", {"rope_parameters": rope}) for rope in KINDS),
    *(("llama", {"rope_parameters": None, "rope_scaling": rope}) for rope in KINDS),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gemma3_text", {  # as released
        "layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 3,
        "rope_parameters": None, "rope_theta": 2000.0, "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("olmo3", {"rope_parameters": BY_LAYER_TYPE | {"full_attention": {  # which is YaRN's alone
        "rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0, "truncate": False}}}),
    ("olmo3", {"rope_parameters": BY_LAYER_TYPE | {"full_attention": LONG | {"truncate": None}}}),
    ("exaone4", {"layer_types": ["full_attention"] * 4}),
    ("exaone4", {"layer_types": ["full_attention"] * 4, "sliding_window": None}),
    *((family, some) for family in ("llama", "gemma3_text", "olmo3") for some in SPELLINGS)],
    ids=lambda value: " ".join([value] if isinstance(value, str) else value))
def test_rope_and_layers(family: str, spelling: dict, tiny_checkpoint: Tiny,
                         tmp_path: Path) -> None:
    """Positions would be wrong in one RoPE kind, or the wrong one of two spellings be taken; or, of
    OLMo-3's one theta, that of the layers without a window for those with one, which transformers
    gives its default; or Gemma 3's released files, a pattern and three fields, be read wrongly;
    or EXAONE 4's, which rotates no queries and keys on full layers beside windows, and all without
    any: no field says so."""
    folder, ids = copy_folder(tiny_checkpoint(family), tmp_path / "c"), random_ids(2, 24)
    other = oracle(folder, ids)
    edit_json(folder / "config.json", lambda c: c.update(spelling))
    try:
        ours = load(folder)
    except InputError:
        rope = spelling["rope_parameters"]
        assert rope and (family in ROPES) != ("full_attention" in rope)
        return
    theirs = oracle(folder, ids)
    assert_same(ours(ids), theirs)
    assert (theirs - other).abs().max() > 100 * TOLERANCE  # the setting is worth far more
