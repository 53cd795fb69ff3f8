"""prism.py: the adapter's switch, one-pass routing, the files PEFT reads, and the two losses."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB, random_prompts, randomize_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from generate import gate_inputs
from model import Transformer, load
from prism import PRISM, Gate, distill_loss, gate_loss
from support import cpu
from support.hub import InputError
from support.messages import conversation
from tokenizer import Tokenizer
import prism as prism_module

LAYERS = 5
MESSAGES = ["Hello there!", "Why is the sky blue at noon, and red in the evening?",
            "Sum 17 and 25.", "Write a poem of four lines on rain.", "Name three rivers.",
            "Is water wet? Explain."]


@torch.no_grad()
@pytest.mark.parametrize("model", ["net", "smollm32"])
def test_rows_without_the_adapter_are_the_base(model: str, request: pytest.FixtureRequest) -> None:
    """Through all layers: k = 0, the rows from k on of a mixed batch, or k = B of a fresh adapter
    would not be the base's logits bit for bit; or gated rows would not be those of k = B."""
    net = request.getfixturevalue(model)
    prism = randomize_adapter(PRISM(net, rank=4, alpha=8.0))
    ids, _ = random_prompts(net.config.vocab_size, 6, 20)
    base, on = net(ids), prism(ids, 6)
    assert torch.equal(prism(ids, 0), base) and torch.equal(PRISM(net)(ids, 6), base)
    assert not torch.allclose(on, base, atol=0.1)
    for k in (1, 4):
        mixed = prism(ids, k)
        assert torch.equal(mixed[k:], base[k:])
        torch.testing.assert_close(mixed[:k], on[:k], rtol=1e-4, atol=1e-3)


def test_settings_out_of_range(net: Transformer) -> None:
    """A gate layer that leaves no layer, a bad pool or rank 0 would be taken; or a gate that pools
    by mean would average the padding for want of a mask."""
    for wrong in ({"gate_layer": LAYERS - 1}, {"gate_layer": -1}, {"gate_pool": "max"},
                  {"rank": 0}):
        with pytest.raises(InputError):
            PRISM(net, **wrong)
    prism = PRISM(net, rank=1, gate_layer=LAYERS - 2, gate_pool="mean")
    with pytest.raises(InputError, match="mask"):
        prism.gate_probability(*random_prompts(VOCAB, 3, 9))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("gate_layer", [0, 2])
def test_the_gate_that_is_trained_is_the_gate_that_routes(
        net: Transformer, tok: Tokenizer, folder: Path, pool: str, gate_layer: int) -> None:
    """The gate would be trained on another h(x) than prefill reads on the same padded batch, or on
    another than transformers' output of the gate layer for the prompt alone, adapter on or off."""
    prism = randomize_adapter(PRISM(net, 4, gate_pool=pool, gate_layer=gate_layer))
    prism.gate.mean.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    prism.gate.deviation.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    talks = list(map(conversation, MESSAGES))
    ids, lengths, mask = gate_inputs(pool, tok, talks, torch.device("cpu"))
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
@pytest.mark.parametrize("gate_layer", [0, 2])
@pytest.mark.parametrize("gate, opened", [("auto", 3), ("on", 6), ("off", 0)])
def test_prefill_is_one_pass(net: Transformer, gate_layer: int, gate: str, opened: int) -> None:
    """A layer would run twice; R(x) = threshold not open the gate; or gated rows not come first,
    each class in input order, with their states. (test_engine.py has the cache.)"""
    prism = randomize_adapter(PRISM(net, 4, gate_layer=gate_layer))
    ids, lengths = random_prompts(VOCAB, 6, 15)
    probability = prism.prefill(ids, lengths, "off").probability
    prism.threshold = sorted(probability)[3]
    calls: Counter[int] = Counter()
    hooks = [layer.register_forward_hook(lambda m, a, y, i=i: calls.update([i]))
             for i, layer in enumerate(net.layers)]
    routed = prism.prefill(ids, lengths, gate)
    for hook in hooks:
        hook.remove()
    assert calls == Counter(range(LAYERS))
    rows = range(6)
    order = sorted(rows, key=lambda i: probability[i] < prism.threshold)
    assert order != list(rows)  # or the reordering was not tested
    assert routed.order == (order if gate == "auto" else list(rows))
    assert routed.k == opened and routed.probability == probability
    order = torch.tensor(routed.order)
    full = prism(ids[order], routed.k)[torch.arange(6), lengths[order] - 1]
    torch.testing.assert_close(net.head(routed.hidden), full, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Losses


def naive_kl(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float,
             cap: float | None = None) -> Tensor:
    """T^2 sum KL(teacher || student) by torch's own functions on full logits."""
    logits = [h @ weight.t() for h in (student, teacher)]
    if cap is not None:
        logits = [cap * (z / cap).tanh() for z in logits]
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in logits)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows", [1, 7, 51])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_distill_loss_is_the_naive_kl(folder: Path, monkeypatch: pytest.MonkeyPatch, rtol: float,
                                      dtype: torch.dtype, rows: int, temperature: float,
                                      cap: float | None) -> None:
    """Chunks of `rows` tokens, three worked on at once, would not give the value and gradient of
    KL(teacher || student) on full logits, soft-capped ones, too; or the loss of bf16 states be
    bf16's, or the gradient not have the student's dtype."""
    net = load(folder, dtype=dtype)
    monkeypatch.setattr(net.config, "final_cap", cap)
    monkeypatch.setattr(prism_module, "KL_CHUNK_ELEMENTS", rows * VOCAB)
    monkeypatch.setattr(cpu, "CACHED_ELEMENTS", 3 * VOCAB)
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 50, 32, generator=generator).to(dtype)
    student.requires_grad_()
    mine = distill_loss(student, teacher, net, temperature)
    (3 * mine).backward()
    reference = student.detach().float().requires_grad_()
    naive = naive_kl(reference, teacher.float(), net.lm_head.float(), temperature, cap)
    (3 * naive).backward()
    assert mine.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(mine, naive, rtol=rtol, atol=0)
    scale = float(reference.grad.abs().max())
    torch.testing.assert_close(student.grad.float(), reference.grad, rtol=0, atol=rtol * scale)
    assert mine.item() > 50 * 0.01 and teacher.grad is None


def test_gate_loss_is_balanced_cross_entropy() -> None:
    """gate_loss would not be the BCE of sigmoid(logits), half of it for wins and half for losses,
    worked out by hand with a target between 0 and 1; or overflow far out."""
    logits, targets = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.25, 0.0])
    s = [1 / (1 + math.exp(-z)) for z in (0.0, 2.0, -1.0)]
    wins = -(math.log(s[0]) + 0.25 * math.log(s[1])) / 1.25
    losses = -(0.75 * math.log(1 - s[1]) + math.log(1 - s[2])) / 1.75
    expected = (wins + losses) / 2
    assert gate_loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)
    far = gate_loss(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0]))
    assert far.item() == pytest.approx(200.0)


@torch.no_grad()
def test_gate_standardises_what_it_reads() -> None:
    """The gate would not be (h - mean) / deviation, then 2 -> 128 -> 64 -> 1 with GELU."""
    gate = Gate(2)
    first, second, third = gate.mlp[0], gate.mlp[2], gate.mlp[4]
    assert [tuple(m.weight.shape) for m in (first, second, third)] == [(128, 2), (64, 128), (1, 64)]
    gate.mean.copy_(torch.tensor([1.0, 2.0]))
    gate.deviation.copy_(torch.tensor([2.0, 4.0]))
    h = torch.tensor([[5.0, -6.0], [1.0, 2.0]])
    z = torch.tensor([[2.0, -2.0], [0.0, 0.0]])  # ((5 - 1) / 2, (-6 - 2) / 4); the mean itself
    for layer in (first, second):
        z = layer(z)
        z = z * (1 + (z / math.sqrt(2)).erf()) / 2
    torch.testing.assert_close(gate(h), third(z)[:, 0], rtol=1e-5, atol=1e-6)
    assert gate(h.bfloat16()).dtype == torch.float32


def test_gate_and_adapter_are_seeded(net: Transformer) -> None:
    """Another seed would draw the same gate or A, or the global state would be used."""
    torch.manual_seed(5)
    one, other = PRISM(net, 4, seed=3), PRISM(net, 4, seed=4)
    torch.manual_seed(6)
    for a, b in zip(one.parameters(), PRISM(net, 4, seed=3).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.gate.mlp[0].weight, other.gate.mlp[0].weight)
    assert not torch.equal(one.adapter[1]["o_proj"].A, other.adapter[1]["o_proj"].A)
