"""adapter.py: the files of an adapter folder, which PEFT reads too, and PEFT's own folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import peft
import pytest
import torch
from conftest import edit_json
from safetensors.torch import load_file, save_file
from tiny import VOCAB, random_prompts, randomize_adapter, tiny_llama
from transformers import AutoModelForCausalLM

from generate import router
from model import Transformer, load
from prism import PRISM
from support.adapter import read_settings
from support.checkpoint import fingerprint
from support.config import FAMILIES
from support.hub import InputError

LAYERS = 5


@pytest.fixture
def saved(prism: PRISM, tmp_path: Path) -> Path:
    """A saved adapter, its gate changed and its threshold moved, too."""
    with torch.no_grad():
        prism.gate.mean.fill_(0.1)
        prism.gate.deviation.fill_(1.7)
        prism.gate.mlp[0].weight.add_(0.01)
    prism.threshold = 0.37
    prism.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_save_and_load_round_trip(prism: PRISM, net: Transformer, saved: Path) -> None:
    """A reloaded adapter gives equal logits and gate probabilities, bit for bit."""
    again = PRISM.load(saved, net)
    ids, lengths = random_prompts(VOCAB, 5, 14)
    for k in (0, 2, 5):
        assert torch.equal(again(ids, k), prism(ids, k))
    assert torch.equal(again.gate_probability(ids, lengths), prism.gate_probability(ids, lengths))
    assert (again.threshold, again.rank, again.alpha) == (0.37, 4, 8.0)
    assert not again.training


@torch.no_grad()
def test_round_trip_of_other_settings(net: Transformer, tmp_path: Path) -> None:
    """gate_layer, gate_pool, rank and alpha come back from prism.json."""
    prism = randomize_adapter(PRISM(net, 3, 5.0, gate_layer=2, gate_pool="mean"))
    prism.save(tmp_path)
    again = PRISM.load(tmp_path, net)
    assert (again.rank, again.alpha, again.gate_layer, again.gate_pool) == (3, 5.0, 2, "mean")
    ids, _ = random_prompts(VOCAB, 4, 9)
    assert torch.equal(again(ids, 4), prism(ids, 4))


@torch.no_grad()
def test_masters_are_saved_in_fp32(folder: Path, tmp_path: Path) -> None:
    """Under a bf16 base the file holds the fp32 masters, not their bf16 copies."""
    half = load(folder, dtype=torch.bfloat16)
    prism = randomize_adapter(PRISM(half, rank=4))
    prism.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert torch.equal(tensors[name], prism.adapter[1]["o_proj"].B[0])
    assert not torch.equal(tensors[name], tensors[name].bfloat16().float())


def test_prism_json_fields(saved: Path, folder: Path) -> None:
    """prism.json has the fields of INTERFACE.md with what was true at saving."""
    found = json.loads((saved / "prism.json").read_text())
    assert found.keys() == {"base_model", "base_source", "base_fingerprint", "rank", "alpha",
                            "gate_layer", "gate_pool", "threshold", "dtype"}
    assert found["base_source"] == "folder" and Path(found["base_model"]) == folder.resolve()
    assert found["base_fingerprint"] == fingerprint(folder)
    assert (found["threshold"], found["dtype"]) == (0.37, "float32")


@torch.no_grad()
@pytest.mark.parametrize("gate_layer", [0, 2])
def test_peft_loads_the_adapter(net: Transformer, folder: Path, tmp_path: Path,
                                gate_layer: int) -> None:
    """PEFT on transformers' model gives the logits of the gate forced on, within 1e-4 in fp32."""
    prism = randomize_adapter(PRISM(net, 4, 8.0, gate_layer=gate_layer))
    prism.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, _ = random_prompts(VOCAB, 4, 16)
    plain = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    mine = prism(ids, 4)
    torch.testing.assert_close(theirs(ids).logits, mine, rtol=0, atol=1e-4)
    assert float((mine - plain).abs().max()) > 1  # the adapter does a lot here
    names = [n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")]
    assert len(names) == 7 * (LAYERS - 1 - gate_layer)
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in names} == set(
        range(gate_layer + 1, LAYERS))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_of_every_family(family: str, tiny_checkpoint: Callable[..., Path],
                                                tmp_path: Path) -> None:
    """PEFT would compute something else from our files in one of the families."""
    folder = tiny_checkpoint(family)
    net, base = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prism = randomize_adapter(PRISM(net, 4, 8.0))
    prism.save(tmp_path)
    ids, _ = random_prompts(net.config.vocab_size, 4, 16)
    plain = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
    mine = prism(ids, 4)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)
    assert float((mine - plain).abs().max()) > 0.3
    assert torch.equal(PRISM.load(tmp_path, net)(ids, 4), mine)


def test_fused_adapter_that_is_not_block_diagonal(tiny_checkpoint: Callable[..., Path],
                                                  tmp_path: Path) -> None:
    """Phi-3's qkv_proj, trained further elsewhere, may mix the parts: refused, not cut."""
    net = load(tiny_checkpoint("phi3"))
    PRISM(net, 4).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.qkv_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (12, 64)
    tensors[f"{name}.lora_B.weight"][0, 11] = 1.0  # a query row reads the values' h
    save_file(tensors, path)
    with pytest.raises(InputError, match="layers.1.self_attn.qkv_proj"):
        PRISM.load(tmp_path, net)


Q1, SELF = "model.layers.1.self_attn.q_proj", "self_attn"
ELSEWHERE = {  # and what is written into adapter_config.json afterwards
    "all": {"target_modules": "all-linear"},
    "subset": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1, 3]},
    "one-layer": {"target_modules": ["self_attn.q_proj"], "layers_to_transform": 2,
                  "layers_pattern": ["h", "layers"]},
    "full-name": {"target_modules": [Q1, "v_proj"], "layers_to_transform": [0],
                  "layers_pattern": "layers"},
    "expression": {"target_modules": r".*\.[02]\.self_attn\.(q|o)_proj",
                   "exclude_modules": r"model\.layers\.0.*o_proj"},
    "excluded": {"target_modules": "ALL-linear", "exclude_modules": ["2.mlp.up_proj", SELF]},
    "rslora": {"target_modules": ["o_proj", "k_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj", "gate_proj"], "rank_pattern": {"k_proj": 2},
                 "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "gate_proj": 1}},
    "anchored": {"target_modules": ["q_proj", "k_proj", "v_proj"],
                 "rank_pattern": {r"^model\.layers\.[01]\.self_attn\.q_proj": 5, "^q_proj": 9},
                 "alpha_pattern": {r"^model\.layers\.0\.": 50, "^model.layers.0.*k_proj$": 64,
                                   "(q|v)_proj": 20, "v_proj": 1}},
    "no-scale": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"q_proj": 0}},
    "backwards": {"target_modules": ["q_proj", "k_proj"], "lora_alpha": -5.5},
}
LATER = {"all": {"target_modules": ["q_proj", "mlp.up_proj"]},
         "subset": {"layers_to_transform": [1]}, "patterns": {"exclude_modules": ["q_proj"]},
         "backwards": {"target_modules": r".*\d.*k_proj"}}


@pytest.mark.parametrize("family, kind", [*(("llama", kind) for kind in ELSEWHERE),
                                          ("phi3", "all"), ("gemma2", "all"), ("olmo2", "rslora")])
@torch.no_grad()
def test_an_adapter_trained_elsewhere(family: str, kind: str,
                                      tiny_checkpoint: Callable[..., Path],
                                      tmp_path: Path) -> None:
    """An adapter of PEFT's would be read wrongly: ranks, alphas, subsets of projections and layers,
    rslora. It has no gate, so every row is gated; saved and loaded again it is the same."""
    folder, theirs = tiny_checkpoint(family), tmp_path / "theirs"
    net, base = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)  # PEFT draws the weights; some are so large that rounding counts
    peft.get_peft_model(base, peft.LoraConfig(
        **{"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM",
           **ELSEWHERE[kind]})).save_pretrained(theirs)
    ids, lengths = random_prompts(net.config.vocab_size, 4, 16)
    for changes in ({}, LATER.get(kind, {}) if family == "llama" else {}):
        edit_json(theirs / "adapter_config.json", lambda c: c.update(changes))
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = peft.PeftModel.from_pretrained(base, theirs).eval()(ids).logits
        prism = PRISM.load(theirs, net)
        torch.testing.assert_close(prism(ids, 4), wanted, rtol=0, atol=1e-4)
        assert float((wanted - net(ids)).abs().max()) > 0.1
    routed = prism.prefill(ids, lengths, "auto")
    torch.testing.assert_close(net.head(routed.hidden), wanted[torch.arange(4), lengths - 1],
                               rtol=0, atol=1e-4)
    assert routed.k == 4
    prism.save(tmp_path / "ours")
    again = PRISM.load(tmp_path / "ours", net)
    assert torch.equal(again(ids, 4), prism(ids, 4)) and again.gate is None
    assert all(router(path)([]) for path in (theirs, tmp_path / "ours"))
    assert read_settings(theirs)["base_model"] == str(folder)


@pytest.fixture
def elsewhere(folder: Path, tmp_path: Path) -> Path:
    """A folder of PEFT's own for the tiny model."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


PEFT_VALUES = {
    "r": [0, -1, "4", 1.5, True, [], 10**9, 3],
    "lora_alpha": ["8", [], True, float("nan"), float("inf"), {}],
    "alpha_pattern": [["q_proj"], "q_proj", 3, {"q_proj(": 3}, {"q_proj": "3"}, {"q_proj": None},
                      {"q_proj": float("nan")}, {"(?i)q_proj": 3}, {"a{99999999999}": 3}],
    "rank_pattern": [["q_proj"], {"[": 2}, {"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": 2}],
    "target_modules": [3, [3], {}, "q_proj(", None, [], "", ["up_proj"], ".*up_proj"],
    "exclude_modules": [3, [3], "q_proj(", {"a": 1}, ".*", ["q_proj", "v_proj"]],
    "layers_to_transform": ["1", [1, "x"], 1.5, -1, [7]],
    "layers_pattern": [3, [3], "layers("], "use_rslora": ["true", 1, []],
    "base_model_name_or_path": [3, ["x"], {}], "use_future_variant": [True, {"a": 1}],
    "modules_to_save": ["lm_head", ["score"]], "peft_type": ["IA3", 3, None], "bias": ["all", 3]}


@pytest.mark.parametrize("field, value", [
    (field, value) for field, values in PEFT_VALUES.items() for value in values],
    ids=lambda value: str(value)[:24])
def test_a_setting_of_peft_that_makes_no_sense(field: str, value: object, net: Transformer,
                                               elsewhere: Path) -> None:
    """A value of another type, out of range, a broken expression, one that targets nothing or fits
    no tensor: each is named in one error, where PEFT ends in a traceback or an empty adapter."""
    edit_json(elsewhere / "adapter_config.json",
              lambda c: c.update({"layers_to_transform": [0], field: value}))
    with pytest.raises(InputError, match=f"{field}|adapter_model.safetensors"):
        PRISM.load(elsewhere, net)


@pytest.mark.parametrize("settings", [
    {"rank": 16, "alpha": 32.0, "dropout": 0.05},
    {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}],
    ids=["old", "new"])
def test_an_adapter_of_mlx(settings: dict, net: Transformer, elsewhere: Path) -> None:
    """MLX writes a file of the same name; what is said to be wrong with it would be a field that
    only PEFT's has."""
    (elsewhere / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="peft_type .* is missing; it is not an adapter of PEFT"):
        PRISM.load(elsewhere, net)


@pytest.mark.parametrize("settings, named", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias = "),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = .pissa"),
], ids=lambda value: str(value)[:30])
def test_an_adapter_that_cannot_be_computed(settings: dict, named: str,
                                            tiny_checkpoint: Callable[..., Path],
                                            tmp_path: Path) -> None:
    """DoRA, trained biases and whatever else is more than LoRA is refused by name."""
    folder = tiny_checkpoint("llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(
        **{"r": 3, "target_modules": ["q_proj"], **settings})).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=named):
        PRISM.load(tmp_path, load(folder))


@pytest.mark.parametrize("change", [
    lambda t, at: t.pop(f"{at}.lora_B.weight"), lambda t, at: t.update({f"{at}.lora_A.weight":
                                                                         torch.ones(3, 9)}),
    lambda t, at: t.update({f"{at}.lora_magnitude_vector.weight": torch.ones(4)}),
    lambda t, at: t.clear()], ids=["no-B", "misshapen-A", "unknown", "empty"])
def test_a_broken_adapter_from_elsewhere(change: Callable, net: Transformer, saved: Path) -> None:
    """A tensor that is missing, misshapen or unknown is named; an empty file is no adapter."""
    (saved / "prism.json").unlink(), (saved / "gate.safetensors").unlink()
    assert PRISM.load(saved, net).rank == 4
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors, "base_model.model.model.layers.2.mlp.up_proj")
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj|no LoRA"):
        PRISM.load(saved, net)


def test_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    """Same shape, other weights: the fingerprint differs and loading is an InputError."""
    other = load(tiny_llama(tmp_path / "other", seed=9, layers=LAYERS), dtype=torch.float32)
    with pytest.raises(InputError, match="trained on"):
        PRISM.load(saved, other)


def test_same_base_in_another_place_or_precision(saved: Path, folder: Path,
                                                 tmp_path: Path) -> None:
    """A copy of the base, and the base in bf16, are still the base."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert PRISM.load(saved, load(copy, dtype=torch.bfloat16)).rank == 4


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gate.safetensors", "prism.json"])
def test_missing_files_are_named(saved: Path, net: Transformer, name: str) -> None:
    """A missing file is an InputError that names it."""
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        PRISM.load(saved, net)


def test_a_checksum_of_an_earlier_version_is_not_needed(saved: Path, net: Transformer) -> None:
    """Adapters published with SHA-256 sums in prism.json would no longer load."""
    edit_json(saved / "prism.json", lambda p: p.update(sha256={"gate.safetensors": "0" * 64}))
    assert PRISM.load(saved, net).threshold == 0.37


def test_missing_unexpected_and_misshapen_tensors(saved: Path, net: Transformer) -> None:
    """Names and shapes must agree exactly; the error names the tensor."""
    path = saved / "adapter_model.safetensors"
    whole = load_file(path)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    for wrong in ({n: t for n, t in whole.items() if n != name},
                  whole | {name.replace("layers.2", "layers.0"): whole[name].clone()},
                  whole | {name: whole[name][:, :3].contiguous()}):
        save_file(wrong, path)
        with pytest.raises(InputError, match=r"layers\.[02]\.mlp\.up_proj\.lora_B"):
            PRISM.load(saved, net)


@pytest.mark.parametrize("field", ["rank", "alpha", "gate_layer", "gate_pool", "threshold",
                                   "base_fingerprint"])
def test_prism_json_without_a_field(saved: Path, net: Transformer, field: str) -> None:
    """A field that is missing is named in the InputError."""
    edit_json(saved / "prism.json", lambda p: p.pop(field))
    with pytest.raises(InputError, match=field):
        PRISM.load(saved, net)
