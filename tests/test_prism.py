"""prism.py: the adapter's switch, one-pass routing, the files PEFT reads, and the two losses."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import edit_json
from safetensors.torch import load_file, save_file
from tiny import VOCAB, random_prompts, randomize_adapter, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from support import hub
import prism as prism_module
from support.hub import InputError
from model import FAMILIES, Transformer, fingerprint, load
from prism import PRISM, Gate, Router, distill_loss, gate_loss, read_settings
from tokenizer import Tokenizer

LAYERS = 5
MESSAGES = ["Hello there!", "Why is the sky blue at noon, and red in the evening?",
            "Sum 17 and 25.", "Write a poem of four lines on rain.", "Name three rivers.",
            "Is water wet? Explain."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of five layers."""
    return tiny_llama(tmp_path_factory.mktemp("base"), layers=LAYERS)


@pytest.fixture(scope="module")
def net(folder: Path) -> Transformer:
    """The tiny base in fp32."""
    return load(folder, dtype=torch.float32)


@pytest.fixture
def prism(net: Transformer) -> PRISM:
    """The tiny base with a random adapter whose B is not zero."""
    return randomize_adapter(PRISM(net, rank=4, alpha=8.0).eval())


def prompts(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """MESSAGES rendered and right-padded: ids, lengths, masks of the user's text."""
    rendered = [tokenizer.render([{"role": "user", "content": m}], return_user_mask=True)
                for m in MESSAGES]
    longest = max(len(ids) for ids, _ in rendered)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rendered])
    mask = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rendered])
    return ids, torch.tensor([len(ids) for ids, _ in rendered]), mask


def halfway(probability: Tensor, closed: int) -> float:
    """A threshold between two neighbours, below which `closed` of the probabilities lie."""
    below, above = sorted(probability.tolist())[closed - 1:closed + 1]
    assert above - below > 1e-5
    return (below + above) / 2


# --------------------------------------------------------------------------------------------------
# The adapter's switch


@torch.no_grad()
def test_k_zero_is_the_base_model(prism: PRISM, net: Transformer) -> None:
    """prism(ids, 0) is net(ids) bit for bit although B is not zero; k = B is something else."""
    ids, _ = random_prompts(VOCAB, 6, 20)
    base = net(ids)
    assert torch.equal(prism(ids, 0), base)
    assert not torch.allclose(prism(ids, 6), base, atol=0.1)


@torch.no_grad()
def test_fresh_adapter_is_the_base_model(net: Transformer) -> None:
    """A new PRISM has B = 0: even k = B gives the base model's logits, bit for bit."""
    ids, _ = random_prompts(VOCAB, 5, 12)
    assert torch.equal(PRISM(net)(ids, 5), net(ids))


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4])
def test_mixed_batch_rows(prism: PRISM, k: int) -> None:
    """Through all layers: un-gated rows are the base's bit for bit, gated rows the adapter's."""
    ids, _ = random_prompts(VOCAB, 6, 20)
    mixed = prism(ids, k)
    assert torch.equal(mixed[k:], prism(ids, 0)[k:])
    torch.testing.assert_close(mixed[:k], prism(ids, 6)[:k], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("gate_layer", [0, 2])
def test_layers_up_to_the_gate_have_no_adapter(net: Transformer, gate_layer: int) -> None:
    """No LoRA on layers 0..g: what the gate reads is the same on or off; the next layer differs."""
    prism = randomize_adapter(PRISM(net, rank=4, gate_layer=gate_layer))
    assert [lora is None for lora in prism.adapter] == [i <= gate_layer for i in range(LAYERS)]
    ids, _ = random_prompts(VOCAB, 4, 10)
    span = net.span(ids.shape)
    for upto, same in ((gate_layer + 1, True), (gate_layer + 2, False)):
        x = net.embed(ids)
        states = [net.run(x, span, range(upto), prism.adapter, k) for k in (0, 4)]
        assert torch.equal(*states) is same


def test_adapter_is_on_all_seven_projections(net: Transformer) -> None:
    """q, k, v, o, gate, up and down of each adapted layer: rank x (in + out) parameters each."""
    prism = PRISM(net, rank=4)
    c = net.config
    q, kv, mlp = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    d = c.hidden_size
    widths = [(d, q), (d, kv), (d, kv), (q, d), (d, mlp), (d, mlp), (mlp, d)]
    per_layer = sum(4 * (a + b) for a, b in widths)
    assert sum(p.numel() for p in prism.adapter.parameters()) == per_layer * (LAYERS - 1)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in prism.adapter.parameters())
    assert not any(p.requires_grad for p in net.parameters())


def test_settings_out_of_range(net: Transformer) -> None:
    """A gate layer that leaves no layer, a bad pool, rank 0: InputError, before any allocation."""
    for wrong in ({"gate_layer": LAYERS - 1}, {"gate_layer": -1}, {"gate_pool": "max"},
                  {"rank": 0}):
        with pytest.raises(InputError):
            PRISM(net, **wrong)
    PRISM(net, rank=1, gate_layer=LAYERS - 2, gate_pool="mean")


@torch.no_grad()
def test_real_model_switch_and_routing(smollm32: Transformer) -> None:
    """SmolLM2: k = 0 is the base bit for bit, un-gated rows of a mixed batch too, and the gate
    reports the same probability alone and in prefill."""
    prism = randomize_adapter(PRISM(smollm32, rank=2), scale=0.05)
    ids, lengths = random_prompts(smollm32.config.vocab_size, 4, 24)
    base, mixed = smollm32(ids), prism(ids, 2)
    assert torch.equal(prism(ids, 0), base)
    assert torch.equal(mixed[2:], base[2:])
    assert not torch.allclose(mixed[:2], base[:2], atol=0.1)
    routed = prism.prefill(ids, lengths, "auto")
    alone = prism.gate_probability(ids, lengths).tolist()
    assert routed.probability == pytest.approx(alone, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Routing


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("gate_layer", [0, 2])
def test_the_gate_that_is_trained_is_the_gate_that_routes(
        net: Transformer, folder: Path, pool: str, gate_layer: int) -> None:
    """features() gives training the very h(x) that prefill reads on the same batch, and the
    probability is that of an independent reading: transformers' output of the gate layer."""
    prism = randomize_adapter(PRISM(net, 4, gate_pool=pool, gate_layer=gate_layer))
    prism.gate.mean.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    prism.gate.deviation.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    ids, lengths, mask = prompts(Tokenizer(folder))
    mask = mask if pool == "mean" else None
    alone = prism.gate_probability(ids, lengths, mask)
    h = prism.features(ids, lengths, mask)
    torch.testing.assert_close(prism.gate(h).sigmoid(), alone, rtol=0, atol=1e-6)
    for gate in ("auto", "on", "off"):
        routed = prism.prefill(ids, lengths, gate, user_mask=mask)
        assert routed.probability == pytest.approx(alone.tolist(), abs=1e-6)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for i, (row, n) in enumerate(zip(ids, lengths.tolist())):
        states = reference(row[None, :n], output_hidden_states=True).hidden_states
        x = states[gate_layer + 1][0]
        expected = x[-1] if pool == "last" else x[mask[i, :n]].mean(0)
        torch.testing.assert_close(h[i], expected, rtol=1e-4, atol=1e-4)
    assert float(alone.max() - alone.min()) > 1e-3  # prompts differ, or nothing was compared


@torch.no_grad()
@pytest.mark.parametrize("gate", ["auto", "on", "off"])
def test_prefill_reads_every_layer_once(prism: PRISM, gate: str) -> None:
    """Routing costs no second forward: each layer runs exactly once for the whole batch."""
    ids, lengths = random_prompts(VOCAB, 6, 15)
    prism.threshold = halfway(prism.gate_probability(ids, lengths), 3)
    calls: Counter[int] = Counter()
    hooks = [layer.register_forward_hook(lambda m, a, y, i=i: calls.update([i]))
             for i, layer in enumerate(prism.net.layers)]
    try:
        routed = prism.prefill(ids, lengths, gate)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == Counter(range(LAYERS))
    assert routed.k == {"auto": 3, "on": 6, "off": 0}[gate]


@torch.no_grad()
@pytest.mark.parametrize("gate_layer", [0, 2])
def test_mixed_prefill_orders_rows_and_cache(net: Transformer, gate_layer: int) -> None:
    """Gated rows come first, otherwise in input order; hidden states and the cache's rows follow,
    so a decoding step after it equals a full forward of prompt + token."""
    prism = randomize_adapter(PRISM(net, 4, gate_layer=gate_layer))
    ids, lengths = random_prompts(VOCAB, 8, 15)
    alone = prism.gate_probability(ids, lengths)
    probability, prism.threshold = alone.tolist(), halfway(alone, 4)
    cache = net.new_cache(8, 16)
    routed = prism.prefill(ids, lengths, "auto", cache)
    opened = [i for i, p in enumerate(probability) if p >= prism.threshold]
    closed = [i for i, p in enumerate(probability) if p < prism.threshold]
    assert routed.order == opened + closed and routed.k == len(opened) == 4
    assert routed.order != list(range(8))  # or the reordering was not tested
    assert routed.probability == pytest.approx(probability, abs=1e-6)
    order = torch.tensor(routed.order)
    ids, lengths = ids[order], lengths[order]
    rows = torch.arange(8)
    full = prism(ids, routed.k)
    torch.testing.assert_close(net.head(routed.hidden), full[rows, lengths - 1],
                               rtol=1e-4, atol=1e-4)
    # One step further, each row with its own next token at its own position.
    token = torch.arange(100, 108)
    span = net.span((8, 1), cache, lengths, int(lengths.max()) + 1)
    x = net.run(net.embed(token[:, None]), span, range(LAYERS), prism.adapter, routed.k)
    longer = F.pad(ids, (0, 1))
    longer[rows, lengths] = token
    full = prism(longer, routed.k)
    torch.testing.assert_close(net.head(net.norm(x[:, 0])), full[rows, lengths],
                               rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threshold_is_inclusive(prism: PRISM) -> None:
    """R(x) >= threshold opens the gate; just above the probability it stays closed."""
    prism.gate.mlp[4].weight.zero_()
    prism.gate.mlp[4].bias.zero_()  # R(x) is 0.5 whatever x is
    ids, lengths = random_prompts(VOCAB, 3, 9)
    for threshold, k in ((0.4999, 3), (0.5, 3), (0.5001, 0)):
        prism.threshold = threshold
        assert prism.prefill(ids, lengths, "auto").k == k


def test_mean_pool_needs_the_mask(net: Transformer) -> None:
    """A gate that pools by mean says what is missing instead of averaging the padding."""
    ids, lengths = random_prompts(VOCAB, 3, 9)
    with pytest.raises(InputError, match="mask"):
        PRISM(net, gate_pool="mean").gate_probability(ids, lengths)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_padding_does_not_reach_the_gate(net: Transformer, folder: Path, pool: str) -> None:
    """What stands in the padding, and how long it is, leaves every probability as it is."""
    prism = PRISM(net, gate_pool=pool)
    ids, lengths, mask = prompts(Tokenizer(folder))
    first = prism.gate_probability(ids, lengths, mask)
    padding = torch.arange(ids.shape[1])[None] >= lengths[:, None]
    ids = F.pad(ids.masked_fill(padding, 77), (0, 9), value=5)
    again = prism.gate_probability(ids, lengths, F.pad(mask, (0, 9)))
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Files


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


@pytest.fixture
def unchecked(saved: Path) -> Path:
    """The same without its files' checksums, as earlier versions wrote it."""
    edit_json(saved / "prism.json", lambda p: p.pop("sha256"))
    return saved


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
                            "gate_layer", "gate_pool", "threshold", "dtype", "sha256"}
    assert found["base_source"] == "folder" and Path(found["base_model"]) == folder.resolve()
    assert found["base_fingerprint"] == fingerprint(folder)
    assert (found["threshold"], found["dtype"]) == (0.37, "float32")
    assert found["sha256"] == {n: hashlib.sha256((saved / n).read_bytes()).hexdigest()
                               for n in ("adapter_model.safetensors", "gate.safetensors")}


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
    """Issue: LoRA parity with PEFT for each architecture, and the folder loads here again."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_equal_pefts(family: str, tiny_checkpoint: Callable[..., Path],
                                               tmp_path: Path) -> None:
    """One distillation step: the gradient of every A and B is that of autograd through PEFT's model
    and a naive KL of whole logits, whatever stands between an adapted projection and the sum."""
    folder = tiny_checkpoint(family)
    net, base = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prism = randomize_adapter(PRISM(net, 4, 8.0))
    prism.save(tmp_path)
    ids, _ = random_prompts(net.config.vocab_size, 3, 12)
    teacher = states(36, net.config.hidden_size)
    loss = distill_loss(net.hidden(ids, prism.adapter, 3).flatten(0, 1), teacher, net)
    loss.backward()
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    log_q = model(ids).logits.flatten(0, 1).log_softmax(-1)
    log_p = net.head(teacher).log_softmax(-1)
    naive = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    naive.backward()
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=0)
    for p in prism.adapter.parameters():
        p.data.copy_(p.grad)
    mine = prism._adapter_tensors()
    theirs = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()
              if p.requires_grad}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        found = theirs[name] * (gradient != 0)  # a fused B is full there, block-diagonal here
        scale = float(found.abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(gradient, found, rtol=0, atol=1e-3 * scale, msg=name)


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
    edit_json(tmp_path / "prism.json", lambda p: p.pop("sha256"))
    with pytest.raises(InputError, match="layers.1.self_attn.qkv_proj"):
        PRISM.load(tmp_path, net)


ELSEWHERE = {
    "all": {"target_modules": "all-linear"},
    "subset": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1, 3]},
    "rslora": {"target_modules": ["o_proj", "k_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "k_proj", "gate_proj"], "rank_pattern": {"k_proj": 2},
                 "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "gate_proj": 1}},
}


@pytest.mark.parametrize("family, kind", [*(("llama", kind) for kind in ELSEWHERE),
                                          ("phi3", "all"), ("gemma2", "all"), ("olmo2", "rslora")])
def test_an_adapter_trained_elsewhere(family: str, kind: str,
                                      tiny_checkpoint: Callable[..., Path],
                                      tmp_path: Path) -> None:
    """Issue: a PEFT LoRA loads here: ranks, alphas, subsets of projections and layers, rslora. It
    has no gate, so every row is gated; saved and loaded again it is the same."""
    folder = tiny_checkpoint(family)
    net, base = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=3, lora_alpha=7, init_lora_weights=False, task_type="CAUSAL_LM", **ELSEWHERE[kind]))
    model.save_pretrained(tmp_path / "theirs")
    ids, lengths = random_prompts(net.config.vocab_size, 4, 16)
    with torch.no_grad():
        theirs = model.eval()(ids).logits
        prism = PRISM.load(tmp_path / "theirs", net)
        torch.testing.assert_close(prism(ids, 4), theirs, rtol=0, atol=1e-4)
        assert float((theirs - net(ids)).abs().max()) > 0.1
        routed = prism.prefill(ids, lengths, "auto")
        torch.testing.assert_close(net.head(routed.hidden), theirs[torch.arange(4), lengths - 1],
                                   rtol=0, atol=1e-4)
        assert routed.k == 4
        prism.save(tmp_path / "ours")
        again = PRISM.load(tmp_path / "ours", net)
        assert torch.equal(again(ids, 4), prism(ids, 4)) and again.threshold == 0
    assert read_settings(tmp_path / "theirs")["base_model"] == str(folder)


@pytest.mark.parametrize("settings, named", [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias = all"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
], ids=lambda value: str(value)[:30])
def test_an_adapter_that_cannot_be_computed(settings: dict, named: str,
                                            tiny_checkpoint: Callable[..., Path],
                                            tmp_path: Path) -> None:
    """Issue: DoRA, trained biases and whatever else is more than LoRA is refused by name."""
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


def test_adapter_config_names_the_adapted_layers(saved: Path) -> None:
    """PEFT's config targets the seven projections, on layers 1..L-1 only, with our scale."""
    config = peft.LoraConfig.from_pretrained(saved)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                          "up_proj", "down_proj"}
    assert config.layers_to_transform == list(range(1, LAYERS))
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8.0, False)


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
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_damaged_files_are_named(unchecked: Path, net: Transformer, name: str,
                                 damage: str) -> None:
    """A missing, empty, truncated or overwritten file is an InputError that names the file."""
    path = unchecked / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": data[:len(data) // 2],
                          "garbage": b"\xff" * 100}[damage])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        PRISM.load(unchecked, net)


@torch.no_grad()
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gate.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "swapped"])
def test_files_that_were_changed_are_named(saved: Path, net: Transformer, tmp_path: Path, name: str,
                                           damage: str) -> None:
    """One flipped bit, or the file of another run, fits every tensor: the checksum tells, for the
    whole adapter and for the gate alone. An adapter of an earlier version has none, and loads."""
    path = saved / name
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        randomize_adapter(PRISM(net, rank=4, alpha=8.0, seed=9)).save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(InputError, match=f"{name}: not as it was written.*restore it"):
        PRISM.load(saved, net)
    if name == "gate.safetensors":
        with pytest.raises(InputError, match=f"{name}: not as it was written"):
            Router(saved)
    edit_json(saved / "prism.json", lambda p: p.pop("sha256"))
    ids, lengths = random_prompts(VOCAB, 5, 14)
    assert PRISM.load(saved, net)(ids, 2).isfinite().all()
    assert Router(saved).probability(ids, lengths, None).isfinite().all()


def test_missing_unexpected_and_misshapen_tensors(unchecked: Path, net: Transformer) -> None:
    """Names and shapes must agree exactly; the error names the tensor."""
    path = unchecked / "adapter_model.safetensors"
    whole = load_file(path)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    for wrong in ({n: t for n, t in whole.items() if n != name},
                  whole | {name.replace("layers.2", "layers.0"): whole[name].clone()},
                  whole | {name: whole[name][:, :3].contiguous()}):
        save_file(wrong, path)
        with pytest.raises(InputError, match=r"layers\.[02]\.mlp\.up_proj\.lora_B"):
            PRISM.load(unchecked, net)


@pytest.mark.parametrize("field", ["rank", "alpha", "gate_layer", "gate_pool", "threshold",
                                   "base_fingerprint"])
def test_prism_json_with_missing_or_wrong_fields(saved: Path, net: Transformer,
                                                 field: str) -> None:
    """A field that is missing or of the wrong type is named in the InputError."""
    path = saved / "prism.json"
    good = json.loads(path.read_text())
    for wrong in ({n: v for n, v in good.items() if n != field}, good | {field: [1]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=field):
            PRISM.load(saved, net)


def test_no_adapter_folder(net: Transformer, tmp_path: Path) -> None:
    """A folder that is not there, and one without an adapter, are InputErrors that name it."""
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=folder.name):
            PRISM.load(folder, net)


# --------------------------------------------------------------------------------------------------
# Losses


@pytest.fixture(scope="module")
def net1000(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A tiny base with a vocabulary of 1000, in fp32."""
    return load(tiny_llama(tmp_path_factory.mktemp("v1000"), vocab=1000), dtype=torch.float32)


def states(n: int, d: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random post-norm hidden states [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator).to(dtype)


def naive_kl(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float,
             cap: float | None = None) -> Tensor:
    """T^2 sum KL(teacher || student) by torch's own functions on full logits."""
    logits = [h @ weight.t() for h in (student, teacher)]
    if cap is not None:
        logits = [cap * (z / cap).tanh() for z in logits]
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in logits)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("rows", [1, 7, 50, 51])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_distill_loss_is_the_naive_kl(net1000: Transformer, monkeypatch: pytest.MonkeyPatch,
                                      rows: int, temperature: float, cap: float | None) -> None:
    """Chunks of `rows` tokens, three worked on at once, give the value and gradient of the full
    computation, to 1e-5, with soft-capped logits, too."""
    monkeypatch.setattr(net1000.config, "final_cap", cap)
    monkeypatch.setattr(prism_module, "KL_CHUNK_ELEMENTS", rows * 1000)
    monkeypatch.setattr(prism_module, "KL_BLOCK_ELEMENTS", 3 * 1000)
    student, teacher = states(50, seed=1).requires_grad_(), states(50, seed=2)
    mine = distill_loss(student, teacher, net1000, temperature)
    (3 * mine).backward()
    reference = student.detach().clone().requires_grad_()
    naive = naive_kl(reference, teacher, net1000.lm_head, temperature, cap)
    (3 * naive).backward()
    torch.testing.assert_close(mine, naive, rtol=1e-5, atol=0)
    scale = float(reference.grad.abs().max())
    torch.testing.assert_close(student.grad, reference.grad, rtol=0, atol=1e-5 * scale)
    assert mine.item() > 50 * 0.01 and teacher.grad is None


def test_distill_loss_is_forward_kl(net1000: Transformer) -> None:
    """The teacher's distribution weighs the log ratio: the two directions differ."""
    a, b = states(20, seed=1), 2 * states(20, seed=2)
    forward, reverse = distill_loss(a, b, net1000), distill_loss(b, a, net1000)
    p, q = ((x @ net1000.lm_head.t()).softmax(-1) for x in (b, a))
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(), rtol=1e-4, atol=0)
    assert abs(forward.item() / reverse.item() - 1) > 0.05


def test_distill_loss_of_a_model_with_itself(net1000: Transformer) -> None:
    """KL(p || p) is zero and so is its gradient."""
    student = states(50).requires_grad_()
    loss = distill_loss(student, student.detach().clone(), net1000, 1.5)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and float(student.grad.abs().max()) < 1e-6


def test_distill_loss_gradcheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored gradient agrees with numerical differentiation in fp64, across chunks."""
    net = load(tiny_llama(tmp_path, vocab=300, layers=2), dtype=torch.float64)
    monkeypatch.setattr(prism_module, "KL_CHUNK_ELEMENTS", 2 * 300)
    monkeypatch.setattr(prism_module, "KL_BLOCK_ELEMENTS", 300)
    student = (0.5 * states(3, dtype=torch.float64)).requires_grad_()
    teacher = 0.5 * states(3, seed=1, dtype=torch.float64)
    for temperature, net.config.final_cap in ((1.0, None), (2.5, None), (1.0, 2.0), (2.5, 2.0)):
        assert torch.autograd.gradcheck(
            lambda s: distill_loss(s, teacher, net, temperature), (student,))


def test_temperature_scaling(net1000: Transformer) -> None:
    """The factor T^2: for hot T the loss tends to half the variance of the logits' difference
    under the uniform distribution, which no longer depends on T."""
    student, teacher = states(10, seed=1), states(10, seed=2)
    difference = ((teacher - student) @ net1000.lm_head.t()).double()
    limit = 0.5 * difference.var(-1, unbiased=False).sum().item()
    for temperature in (300.0, 600.0):
        loss = distill_loss(student, teacher, net1000, temperature).item()
        assert loss == pytest.approx(limit, rel=0.05)


def test_distill_loss_under_bf16(net1000: Transformer, folder: Path) -> None:
    """bf16 states and head: computed in fp32 from bf16 logits, close to the fp32 value; the
    gradient has the student's dtype."""
    net = load(folder, dtype=torch.bfloat16)
    student = states(30, seed=1, dtype=torch.bfloat16).requires_grad_()
    teacher = states(30, seed=2, dtype=torch.bfloat16)
    loss = distill_loss(student, teacher, net)
    loss.backward()
    exact = naive_kl(student.detach().float(), teacher.float(), net.lm_head.float(), 1.0)
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_gate_loss_is_binary_cross_entropy() -> None:
    """gate_loss is the mean BCE of sigmoid(logits), worked out by hand, and stable far out."""
    logits, targets = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])
    s = [1 / (1 + math.exp(-z)) for z in (0.0, 2.0, -1.0)]
    expected = -(math.log(s[0]) + math.log(1 - s[1]) + math.log(1 - s[2])) / 3
    assert gate_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    probabilities = torch.rand(40, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(40) % 3 == 0).float()
    torch.testing.assert_close(gate_loss(probabilities.logit(), targets),
                               F.binary_cross_entropy(probabilities, targets))
    far = gate_loss(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0]))
    assert far.item() == pytest.approx(200.0)


def test_gate_standardises_what_it_reads() -> None:
    """z = (h - mean) / deviation, then 2 -> 128 -> 64 -> 1 with GELU, by hand on two inputs."""
    gate = Gate(2)
    first, second, third = gate.mlp[0], gate.mlp[2], gate.mlp[4]
    assert [tuple(m.weight.shape) for m in (first, second, third)] == [(128, 2), (64, 128), (1, 64)]
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.mean.copy_(torch.tensor([1.0, 2.0]))
        gate.deviation.copy_(torch.tensor([2.0, 4.0]))
        first.weight[0, 0], first.weight[1, 1] = 1.0, 1.0
        second.weight[0, 0], second.weight[1, 1] = 1.0, 1.0
        third.weight[0, 0], third.weight[0, 1], third.bias[0] = 3.0, -5.0, 0.25

    def gelu(z: float) -> float:
        return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))

    # h = (5, -6): z = ((5 - 1) / 2, (-6 - 2) / 4) = (2, -2)
    expected = 3 * gelu(gelu(2.0)) - 5 * gelu(gelu(-2.0)) + 0.25
    h = torch.tensor([[5.0, -6.0], [1.0, 2.0]])  # the second is the mean itself: z = 0
    assert gate(h).tolist() == pytest.approx([expected, 0.25], rel=1e-6)
    assert gate(h.bfloat16()).dtype == torch.float32


def test_gate_and_adapter_are_seeded(net: Transformer) -> None:
    """One seed draws one gate and one A; another seed others; the global state is untouched."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (PRISM(net, 4, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(one.gate.mlp[0].weight, other.gate.mlp[0].weight)
    assert not torch.equal(one.adapter[1]["o_proj"].A, other.adapter[1]["o_proj"].A)


def test_base_source_of_the_default_model(smollm32: Transformer, tmp_path: Path) -> None:
    """An adapter for the default model records its name, where it came from and its weights."""
    smollm32.name, name = hub.DEFAULT_MODEL, smollm32.name
    try:
        PRISM(smollm32, rank=1).save(tmp_path)
    finally:
        smollm32.name = name
    found = json.loads((tmp_path / "prism.json").read_text())
    assert found["base_model"] == hub.DEFAULT_MODEL
    assert found["base_source"] == hub.base_source(smollm32.folder, hub.DEFAULT_MODEL)
    assert found["base_source"] in ("hub", "gguf-q4_1")
    assert found["base_fingerprint"] == fingerprint(smollm32.folder)
