"""lora.py: the gated low-rank layer against plain torch operations, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import GatedLoRALinear, LoRA
from support.cpu import FEW_ROWS

D, OUT, RANK, SCALE = 24, (16, 8, 8), 4, 2.0


def make(out: tuple[int, ...] = OUT, bias: bool = False, dropout: float = 0.0,
         dtype: torch.dtype = torch.float32, d: int = D) -> tuple[GatedLoRALinear, LoRA]:
    """A random layer in `dtype` and an adapter (fp32, or fp64 for an fp64 layer), B not zero."""
    generator = torch.Generator().manual_seed(0)
    layer = GatedLoRALinear(d, out, bias)
    lora = LoRA(d, out, RANK, SCALE, dropout)
    with torch.no_grad():
        for parameter in (*layer.parameters(), *lora.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return layer.to(dtype), lora.to(wide)


def inputs(rows: int, tokens: int = 5, d: int = D, dtype: torch.dtype = torch.float32,
           seed: int = 1) -> Tensor:
    """Random x [rows, tokens, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, d, generator=generator).to(dtype)


def plain(layer: GatedLoRALinear, lora: LoRA, x: Tensor, k: int,
          mask: Tensor | None = None) -> Tensor:
    """What the layer should compute, in plain differentiable operations, projection by projection.

    `mask` [k * T, p * r] multiplies h = x A^T, as dropout does.
    """
    columns, row = [], 0
    for i, b in enumerate(lora.B):
        size = b.shape[0]
        w = layer.weight[row:row + size]
        y = x @ w.t()
        if layer.bias is not None:
            y = y + layer.bias[row:row + size]
        h = x[:k] @ lora.A[i * lora.rank:(i + 1) * lora.rank].t()
        if mask is not None:
            part = mask[:, i * lora.rank:(i + 1) * lora.rank]
            h = h * part.view(k, x.shape[1], lora.rank)
        update = lora.scale * (h @ b.t())
        columns.append(torch.cat((y[:k] + update, y[k:])))
        row += size
    return torch.cat(columns, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_k_zero_is_the_plain_linear_map(dtype: torch.dtype, bias: bool) -> None:
    """k = 0 is F.linear bit for bit, whatever B holds (few bf16 rows on a CPU: see below)."""
    layer, lora = make(bias=bias, dtype=dtype)
    x = inputs(4, FEW_ROWS, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x, lora, 0), expected)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x, lora, 4), expected)


@pytest.mark.parametrize("k", [0, 2, 3])
def test_inner_function_before_the_map(k: int) -> None:
    """The MLP's f(gate) * up would be mapped or differentiated wrongly (values, and in fp64 the
    gradients of both halves, A and every B), or kept while training beside what it came from."""
    layer, lora = make((6, 4), dtype=torch.float64, d=8)
    given = inputs(3, 2, 16, torch.float64).requires_grad_()

    def gated(x: Tensor) -> Tensor:
        return F.silu(x[..., :8]) * x[..., 8:]

    def active(x: Tensor, lora: LoRA, k: int) -> Tensor:
        return layer(x, lora, k, inner=gated)

    product = gated(given)
    torch.testing.assert_close(active(given, lora, k), plain(layer, lora, product, k))
    with torch.no_grad():
        torch.testing.assert_close(active(given, lora, k), plain(layer, lora, product, k))
    upstream = inputs(3, 2, 10, torch.float64, seed=5)
    wanted = [given, *(lora.parameters() if k else ())]
    mine = torch.autograd.grad(active(given, lora, k), wanted, upstream)
    expected = torch.autograd.grad(plain(layer, lora, product, k), wanted, upstream)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if k:
        saved = active(given, lora, k).grad_fn.saved_tensors
        assert any(t is given for t in saved)
        assert not any(t is not None and t.shape == product.shape for t in saved)


def test_fresh_adapter_changes_nothing() -> None:
    """After reset() B is zero and A is not, so a fresh adapter at k = B is the base model."""
    layer, lora = make()
    lora.reset(torch.Generator().manual_seed(3))
    x = inputs(4)
    assert torch.equal(layer(x, lora, 4), layer(x))
    assert float(lora.A.detach().abs().min()) < float(lora.A.detach().abs().max()) <= D**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_mixed_batch_rows(dtype: torch.dtype, k: int) -> None:
    """Un-gated rows are those of k = 0 bit for bit, gated rows match those of k = B."""
    layer, lora = make(dtype=dtype)
    x = inputs(7, dtype=dtype)
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            mixed, off, on = layer(x, lora, k), layer(x, lora, 0), layer(x, lora, 7)
        assert torch.equal(mixed[k:], off[k:])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mixed[:k], on[:k], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(mixed[:k], off[:k], atol=0.1)


def test_an_adapter_that_answered_can_be_trained() -> None:
    """What is cached in inference mode serves training as well."""
    layer, lora = make(dtype=torch.bfloat16)
    x = inputs(4, FEW_ROWS, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x, lora, 4)
    layer(x, lora, 4).float().square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in lora.parameters())


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_formula(k: int, bias: bool) -> None:
    """y = x W^T + bias + scale (x A_i^T) B_i^T on the leading k rows, in fp64, to 1e-12."""
    layer, lora = make(bias=bias, dtype=torch.float64)
    x = inputs(5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, lora, k), plain(layer, lora, x, k), rtol=1e-12, atol=1e-12)


def test_hand_computed_numbers() -> None:
    """d = 2, one output, rank 1, scale 3: numbers worked out by hand."""
    layer, lora = GatedLoRALinear(2, (1,)), LoRA(2, (1,), 1, 3.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 10.0]]))
        lora.A.copy_(torch.tensor([[2.0, -1.0]]))
        lora.B[0].copy_(torch.tensor([[5.0]]))
    x = torch.tensor([[[1.0, 1.0]], [[2.0, 3.0]]])
    # row 0: 11 + 3 * (2 - 1) * 5 = 26; row 1: 32, and with the adapter 32 + 3 * (4 - 3) * 5 = 47
    assert layer(x, lora, 1).flatten().tolist() == [26.0, 32.0]
    assert layer(x, lora, 2).flatten().tolist() == [26.0, 47.0]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("out", [(5,), (4, 2, 3)])
def test_gradcheck(k: int, out: tuple[int, ...]) -> None:
    """The written backward agrees with numerical differentiation in fp64, for x, A and every B."""
    layer, lora = make(out, bias=True, dtype=torch.float64, d=6)
    x = inputs(3, 2, 6, torch.float64).requires_grad_()

    def run(x: Tensor, a: nn.Parameter, *bs: nn.Parameter) -> Tensor:
        # A new adapter each time: gradcheck changes values without a trace in the version counter.
        fresh = LoRA(6, out, RANK, SCALE)
        fresh.A, fresh.B = a, nn.ParameterList(bs)
        return layer(x, fresh, k)

    assert torch.autograd.gradcheck(run, (x, lora.A, *lora.B))


@pytest.mark.parametrize("k", [1, 4])
def test_dropout_gradients_match_autograd(k: int) -> None:
    """With the same mask on h, value and gradients are those of plain operations."""
    layer, lora = make(bias=True, dropout=0.4, dtype=torch.float64)
    x = inputs(4, dtype=torch.float64).requires_grad_()
    generator = torch.Generator().manual_seed(11)
    y = layer(x, lora, k, generator)
    keep = 1 - lora.dropout
    mask = torch.empty(k * 5, RANK * len(OUT), dtype=torch.float64)
    mask.bernoulli_(keep, generator=torch.Generator().manual_seed(11)).div_(keep)
    expected = plain(layer, lora, x, k, mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    wanted = (x, lora.A, *lora.B)
    for mine, reference in zip(torch.autograd.grad((y * weights).sum(), wanted),
                               torch.autograd.grad((expected * weights).sum(), wanted)):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_dropout_is_off_without_a_generator_and_unbiased_with_one() -> None:
    """No generator: no dropout. With one: the mean over many masks is the undropped output."""
    layer, lora = make(dropout=0.5, dtype=torch.float64)
    x = inputs(4, dtype=torch.float64)
    still = layer(x, lora, 4).detach()
    torch.testing.assert_close(still, plain(layer, lora, x, 4), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([layer(x, lora, 2, generator) for _ in range(2000)])
    assert torch.equal(draws[0, 2:], layer(x, lora, 0)[2:])  # never on un-gated rows
    error = (draws[:, :2].mean(0) - still[:2]) / (draws[:, :2].std(0) / math.sqrt(len(draws)))
    assert float(error.abs().max()) < 6  # standard errors
    assert float(draws[:, :2].std(0).min()) > 0


def test_base_weights_get_no_gradient() -> None:
    """W and bias stay without a gradient, and x's still flows through W to the layers below."""
    layer, lora = make(bias=True)
    x = inputs(4).requires_grad_()
    layer(x, lora, 2).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    for got in (x.grad, lora.A.grad, *(b.grad for b in lora.B)):
        assert float(got.abs().max()) > 0
    assert all(float(row.abs().max()) > 0 for row in x.grad)  # un-gated rows too


def test_master_gradients_are_fp32_under_a_bf16_base() -> None:
    """A bf16 base gives fp32 gradients of A and B, close to those of the same values in fp64."""
    layer, lora = make(dtype=torch.bfloat16)
    x = inputs(4, dtype=torch.bfloat16).requires_grad_()
    weights = inputs(4, d=sum(OUT), dtype=torch.bfloat16, seed=5)
    y = layer(x, lora, 4)
    assert y.dtype == torch.bfloat16
    (y * weights).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    exact, exact_lora = make(dtype=torch.float64)
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
        for mine, theirs in zip(exact_lora.parameters(), lora.parameters()):
            mine.copy_(theirs.bfloat16())
    y = plain(exact, exact_lora, x.detach().double(), 4)
    (y * weights.double()).sum().backward()
    for mine, theirs in zip(lora.parameters(), exact_lora.parameters()):
        assert mine.dtype == mine.grad.dtype == torch.float32
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=0.02 * scale)


def test_gradients_accumulate_in_fp32() -> None:
    """Thousands of tiny micro-batch gradients add up although each is far below bf16's step."""
    layer, lora = make((1,), dtype=torch.bfloat16, d=2)
    lora.scale = 1.0
    big = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    layer(big, lora, 1).sum().backward()
    first = lora.B[0].grad.clone()
    for _ in range(50):  # each adds 1/1024 of the first: bf16 has 8 bits
        (layer(big, lora, 1) / 1024).sum().backward()
    torch.testing.assert_close(lora.B[0].grad, first * (1 + 50 / 1024), rtol=1e-3, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
def test_cast_follows_in_place_updates(foreach: bool) -> None:
    """The cast copy is made once, and again after an optimizer step or a copy_ into a master."""
    layer, lora = make(dtype=torch.bfloat16)
    x = inputs(4, dtype=torch.bfloat16)
    first = lora.cast(torch.bfloat16)
    assert all(a is b for a, b in zip(first, lora.cast(torch.bfloat16)))  # nothing changed
    before = layer(x, lora, 4)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, foreach=foreach)
    before.float().square().sum().backward()
    optimizer.step()
    for cast, master in zip(lora.cast(torch.bfloat16), lora.parameters()):
        assert torch.equal(cast, master.detach().bfloat16())
    assert not torch.equal(layer(x, lora, 4), before)
    with torch.no_grad():  # loading writes into views of A
        for part in lora.A.split(RANK):
            part.copy_(torch.zeros_like(part))
    assert torch.equal(layer(x, lora, 4), layer(x, lora, 0))
    assert lora.cast(torch.float32)[0].dtype == torch.float32  # another dtype is another copy


def test_stacked_projections_equal_separate_ones() -> None:
    """q, k, v in one stacked layer are three separate layers, values and gradients."""
    layer, lora = make(bias=True, dtype=torch.float64)
    x = inputs(4, dtype=torch.float64).requires_grad_()
    y = layer(x, lora, 3)
    weights = inputs(4, d=sum(OUT), dtype=torch.float64, seed=9)
    (y * weights).sum().backward()
    dx, row = torch.zeros_like(x), 0
    for i, size in enumerate(OUT):
        single, adapter = GatedLoRALinear(D, (size,), bias=True), LoRA(D, (size,), RANK, SCALE)
        single, adapter = single.double(), adapter.double()
        with torch.no_grad():
            single.weight.copy_(layer.weight[row:row + size])
            single.bias.copy_(layer.bias[row:row + size])
            adapter.A.copy_(lora.A[i * RANK:(i + 1) * RANK])
            adapter.B[0].copy_(lora.B[i])
        z = x.detach().clone().requires_grad_()
        part = single(z, adapter, 3)
        torch.testing.assert_close(part, y[..., row:row + size], rtol=1e-12, atol=1e-12)
        (part * weights[..., row:row + size]).sum().backward()
        torch.testing.assert_close(adapter.B[0].grad, lora.B[i].grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(adapter.A.grad, lora.A.grad[i * RANK:(i + 1) * RANK],
                                   rtol=1e-10, atol=1e-10)
        dx, row = dx + z.grad, row + size
    torch.testing.assert_close(dx, x.grad, rtol=1e-10, atol=1e-10)


def test_inputs_that_are_not_contiguous() -> None:
    """A transposed view as input and an expanded gradient give the values of their copies."""
    layer, lora = make(dtype=torch.float64)
    base = inputs(5, 4, dtype=torch.float64)
    results = []
    for x in (base.transpose(0, 1), base.transpose(0, 1).contiguous()):
        lora.zero_grad()
        x = x.detach().requires_grad_()
        y = layer(x, lora, 3)
        y.sum().backward()  # its gradient is one number, expanded
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in lora.parameters())))
    for mine, copy in zip(*results):
        torch.testing.assert_close(mine, copy, rtol=1e-12, atol=1e-12)


def test_reset_depends_on_the_generator_only() -> None:
    """The same seed draws the same A, another seed another one, and the global state is unused."""
    _, lora = make()
    drawn = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        lora.reset(torch.Generator().manual_seed(seed))
        drawn.append(lora.A.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
