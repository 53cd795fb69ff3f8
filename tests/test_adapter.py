"""adapter.py: the files of an adapter folder, which PEFT reads too, and PEFT's own folders."""

import json
from pathlib import Path
from typing import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import Folders, Tiny, copy_folder, edit_json, edit_tensors, reference
from tiny import VOCAB, random_prompts, randomize_adapter
from torch import Tensor

from generate import router
from model import Transformer, load
from prism import PRISM, distill_loss
from support.adapter import read_settings, to_peft
from support.checkpoint import fingerprint
from support.config import FAMILIES
from support.hub import InputError

LAYERS = 5


@pytest.fixture
def saved(prism: PRISM, tmp_path: Path) -> Path:
    """A saved adapter."""
    prism.save(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_save_and_load_round_trip(folder: Path, tmp_path: Path) -> None:
    """A reloaded adapter would not give equal logits and gate probabilities, bit for bit, or have
    masters that a bf16 base rounded; or prism.json would not say what was true at saving."""
    net = load(folder, dtype=torch.bfloat16)
    prism = randomize_adapter(PRISM(net, 3, 5.0, gate_layer=2, gate_pool="mean"))
    prism.gate.mean.fill_(0.1)
    prism.gate.deviation.fill_(1.7)
    prism.gate.mlp[0].weight.add_(0.01)
    prism.threshold = 0.37
    prism.save(tmp_path)
    again = PRISM.load(tmp_path, net)
    ids, lengths = random_prompts(VOCAB, 5, 14)
    for k in (0, 2, 5):
        assert torch.equal(again(ids, k), prism(ids, k))
    assert torch.equal(again.gate_probability(ids, lengths, ids > 99),
                       prism.gate_probability(ids, lengths, ids > 99))
    assert (again.threshold, again.rank, again.alpha) == (0.37, 3, 5.0)
    for a, b in zip(again.adapter.parameters(), prism.adapter.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert json.loads((tmp_path / "prism.json").read_text()) == {
        "base_model": str(folder.resolve()), "base_source": "folder",
        "base_fingerprint": fingerprint(folder), "rank": 3, "alpha": 5.0, "gate_layer": 2,
        "gate_pool": "mean", "threshold": 0.37, "dtype": "bfloat16"}


@pytest.mark.parametrize("family, gate_layer", [*((family, 0) for family in FAMILIES),
                                                ("llama", 2)])
def test_every_family_equals_peft(family: str, gate_layer: int,
                                  tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """PEFT would compute something else from our files; a projection behind the gate would have no
    adapter; or a gradient not be that of autograd through PEFT's model and a naive KL."""
    folder = tiny_checkpoint(family)
    net, base = load(folder), reference(folder)
    prism = randomize_adapter(PRISM(net, 4, 8.0, gate_layer=gate_layer))
    prism.save(tmp_path)
    ids, _ = random_prompts(net.config.vocab_size, 3, 12)
    plain = base(ids).logits.detach()
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    theirs, mine = model(ids).logits, prism(ids, 3).detach()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert float((mine - plain).abs().max()) > 0.3  # the adapter does a lot here
    assert torch.equal(PRISM.load(tmp_path, net)(ids, 3), mine)

    teacher = torch.randn(36, net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    loss = distill_loss(net.hidden(ids, prism.adapter, 3).flatten(0, 1), teacher, net)
    loss.backward()
    log_p = net.head(teacher).log_softmax(-1)
    naive = F.kl_div(theirs.flatten(0, 1).log_softmax(-1), log_p, reduction="sum", log_target=True)
    naive.backward()
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=0)
    for p in prism.adapter.parameters():
        p.data.copy_(p.grad)
    gradients = to_peft(prism.weights, net.config)
    expected = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()
                if p.requires_grad}
    assert gradients.keys() == expected.keys()
    projections = 4 if net.config.family.fused else 7
    assert len(gradients) == 2 * projections * (len(net.layers) - 1 - gate_layer)
    for name, gradient in gradients.items():
        found = expected[name] * (gradient != 0)  # a fused B is full there, block-diagonal here
        scale = float(found.abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(gradient, found, rtol=0, atol=1e-3 * scale, msg=name)


def test_fused_adapter_that_is_not_block_diagonal(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Phi-3's qkv_proj, trained further elsewhere, may mix the parts: refused, not cut."""
    net = load(tiny_checkpoint("phi3"))
    PRISM(net, 4).save(tmp_path)

    def mix(tensors: dict[str, Tensor]) -> None:
        name = "base_model.model.model.layers.1.self_attn.qkv_proj"
        assert tensors[f"{name}.lora_A.weight"].shape == (12, 64)
        tensors[f"{name}.lora_B.weight"][0, 11] = 1.0  # a query row reads the values' h

    edit_tensors(tmp_path / "adapter_model.safetensors", mix)
    with pytest.raises(InputError, match="layers.1.self_attn.qkv_proj"):
        PRISM.load(tmp_path, net)


ELSEWHERE = {  # PEFT's settings
    "all": {"target_modules": "all-linear"},
    "subset": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1, 3]},
    "expression": {"target_modules": r".*\.[02]\.self_attn\.(q|o)_proj",
                   "exclude_modules": r"model\.layers\.0.*o_proj"},
    "rslora": {"target_modules": ["o_proj", "k_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj", "gate_proj"],
                 "rank_pattern": {"k_proj": 2},
                 "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "gate_proj": 1}},
    "anchored": {"target_modules": ["q_proj", "k_proj", "v_proj"],
                 "rank_pattern": {r"^model\.layers\.[01]\.self_attn\.q_proj": 5, "^q_proj": 9},
                 "alpha_pattern": {r"^model\.layers\.0\.": 50, "^model.layers.0.*k_proj$": 64,
                                   "(q|v)_proj": 20, "v_proj": 1}}}


@pytest.mark.parametrize("family, kind", [*(("llama", kind) for kind in ELSEWHERE if kind != "all"),
                                          ("phi3", "all"), ("gemma2", "all"), ("olmo2", "rslora")])
@torch.no_grad()
def test_an_adapter_trained_elsewhere(family: str, kind: str, tiny_checkpoint: Tiny,
                                      tmp_path: Path) -> None:
    """An adapter of PEFT's would be read wrongly: ranks, alphas, subsets of projections and layers,
    rslora. It has no gate, so every row is gated; saved and loaded again it is the same."""
    folder, theirs = tiny_checkpoint(family), tmp_path / "theirs"
    net, base = load(folder), reference(folder)
    torch.manual_seed(0)  # PEFT draws the weights; some are so large that rounding counts
    peft.get_peft_model(base, peft.LoraConfig(
        **{"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM",
           **ELSEWHERE[kind]})).save_pretrained(theirs)
    ids, lengths = random_prompts(net.config.vocab_size, 4, 16)
    wanted = peft.PeftModel.from_pretrained(reference(folder), theirs).eval()(ids).logits
    prism = PRISM.load(theirs, net)
    torch.testing.assert_close(prism(ids, 4), wanted, rtol=0, atol=3e-4)
    assert float((wanted - net(ids)).abs().max()) > 0.1
    routed = prism.prefill(ids, lengths, "auto")
    torch.testing.assert_close(net.head(routed.hidden), wanted[torch.arange(4), lengths - 1],
                               rtol=0, atol=3e-4)
    assert routed.k == 4
    prism.save(tmp_path / "ours")
    again = PRISM.load(tmp_path / "ours", net)
    assert torch.equal(again(ids, 4), prism(ids, 4)) and again.gate is None
    assert all(router(path)([]) for path in (theirs, tmp_path / "ours"))
    assert read_settings(theirs)["base_model"] == str(folder)


@pytest.fixture(scope="module")
def peft_folder(folder: Path, tmp_path_factory: Folders) -> Path:
    """A folder of PEFT's own for the tiny model."""
    made = tmp_path_factory.mktemp("peft")
    peft.get_peft_model(reference(folder), peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(made)
    return made


@pytest.fixture
def elsewhere(peft_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return copy_folder(peft_folder, tmp_path / "elsewhere")


PEFT_VALUES = {
    "r": [0, "4", 10**9], "lora_alpha": ["8", float("nan")], "use_rslora": ["true"],
    "alpha_pattern": [["q_proj"], {"q_proj(": 3}, {"q_proj": "3"}, {"a{99999999999}": 3}],
    "base_model_name_or_path": [3], "peft_type": ["IA3", None], "use_dora": [True],
    "use_future_variant": [True], "bias": ["all"], "modules_to_save": [["lm_head"]],
    "init_lora_weights": ["pissa"]}


@pytest.mark.parametrize("named, change", [
    *((rf"\b{field}\b", {field: value}) for field, values in PEFT_VALUES.items()
      for value in values),
    ("peft_type .* is missing; it is not an adapter of PEFT", None)],  # as in MLX's file
    ids=lambda value: str(value)[:24])
def test_a_setting_of_peft_that_cannot_be_computed(named: str, change: dict | None,
                                                   net: Transformer, elsewhere: Path) -> None:
    """A value of another type, out of range, or that makes it more than a LoRA (DoRA, trained
    biases) would be ignored, or end in a traceback as in PEFT."""
    edit_json(elsewhere / "adapter_config.json",
              lambda c: c.update(change) if change else c.pop("peft_type"))
    with pytest.raises(InputError, match=named):
        PRISM.load(elsewhere, net)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "PEFT's"])
@pytest.mark.parametrize("change", [
    lambda t, at: t.pop(f"{at}.lora_B.weight"),
    lambda t, at: t.update({f"{at}.lora_A.weight": torch.ones(3, 9)}),
    lambda t, at: t.update({f"{at}.lora_A.weight": t[f"{at}.lora_A.weight"][:0],
                            f"{at}.lora_B.weight": t[f"{at}.lora_B.weight"][:, :0].contiguous()}),
    lambda t, at: t.update({f"{at}.lora_magnitude_vector.weight": torch.ones(4)}),
    lambda t, at: t.clear()], ids=["no-B", "misshapen-A", "rank-0", "unknown", "empty"])
def test_a_tensor_that_does_not_fit(change: Callable, theirs: bool, net: Transformer,
                                    saved: Path) -> None:
    """A missing, misshapen or unknown tensor would not be named, or an empty file be an adapter."""
    if theirs:
        (saved / "prism.json").unlink()
        (saved / "gate.safetensors").unlink()
    assert PRISM.load(saved, net).rank == 4
    edit_tensors(saved / "adapter_model.safetensors",
                 lambda t: change(t, "base_model.model.model.layers.2.mlp.up_proj"))
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj|no LoRA|is missing"):
        PRISM.load(saved, net)


def test_the_same_base_elsewhere(saved: Path, folder: Path, tmp_path: Path) -> None:
    """An adapter would not load onto a copy of its base, onto it in bf16, or for the SHA-256 sums
    that an earlier edition wrote into prism.json."""
    edit_json(saved / "prism.json", lambda p: p.update(sha256={"gate.safetensors": "0" * 64}))
    copy = copy_folder(folder, tmp_path / "copy")
    assert PRISM.load(saved, load(copy, dtype=torch.bfloat16)).rank == 4


@pytest.mark.parametrize("gone", ["adapter_model.safetensors", "gate.safetensors", "prism.json",
                                  "rank", "alpha", "gate_layer", "gate_pool", "threshold",
                                  "base_fingerprint"])
def test_what_is_missing_is_named(saved: Path, net: Transformer, gone: str) -> None:
    """A file of an adapter, or a field of prism.json, that is not there would be made up."""
    if (saved / gone).exists():
        (saved / gone).unlink()
    else:
        edit_json(saved / "prism.json", lambda p: p.pop(gone))
    with pytest.raises(InputError, match=gone):
        PRISM.load(saved, net)
