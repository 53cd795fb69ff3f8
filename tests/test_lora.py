"""lora.py: the gated low-rank layer against plain torch operations, forward and backward."""

from copy import deepcopy
from typing import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora import GatedLoRALinear, LoRA
from support.cpu import FEW_ROWS, linear

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
    """What the layer should compute, in plain differentiable operations.

    `mask` [k * T, p * r] multiplies h = x A^T, as dropout does.
    """
    y, h = x @ layer.weight.t(), x[:k] @ lora.A.t()
    if layer.bias is not None:
        y = y + layer.bias
    if mask is not None:
        h = h * mask.view(h.shape)
    updates = [lora.scale * part @ b.t() for part, b in zip(h.split(RANK, dim=-1), lora.B)]
    return torch.cat((y[:k] + torch.cat(updates, -1), y[k:]))


def turned(x: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def assert_same(mine: Tensor, expected: Tensor, wanted: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients for a random upstream one (not contiguous), in fp64."""
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(5)
    upstream = turned(torch.randn(mine.shape, generator=generator, dtype=mine.dtype))
    found = torch.autograd.grad(mine, wanted, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [5, FEW_ROWS])
def test_rows_without_adapter_are_plain(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    """The adapter would reach rows that have none: k = 0, the rows from k on, and all rows of a
    fresh adapter, whose B is zero and whose A is not, are the linear map's bit for bit."""
    layer, lora = make(bias=bias, dtype=dtype)
    x = inputs(7, tokens, dtype=dtype)
    off = linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), off) and torch.equal(layer(x, lora, 0), off)
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            for k in (1, 3, 6):
                mixed = layer(x, lora, k)
                assert torch.equal(mixed[k:], off[k:])
                assert not torch.allclose(mixed[:k], off[:k], atol=0.1)
    fresh = LoRA(D, OUT, RANK, SCALE)
    assert torch.equal(layer(x, fresh, 7), off)
    assert float(fresh.A.detach().abs().min()) < float(fresh.A.detach().abs().max()) <= D**-0.5


def gated(x: Tensor) -> Tensor:
    """The MLP's f(gate) * up, as an `inner` function."""
    return F.silu(x[..., :D]) * x[..., D:]


def untouched(x: Tensor) -> Tensor:
    """The same tensor."""
    return x


@pytest.mark.parametrize(("turn", "inner"), [
    (untouched, None), (untouched, gated), (turned, None)], ids=["x", "inner", "not contiguous"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("k", [0, 2, 5])
def test_gradcheck_of_the_formula(k: int, dropout: float, bias: bool, turn: Callable,
                                  inner: Callable | None) -> None:
    """y = x W^T + bias + scale (x A_i^T * mask) B_i^T on the leading k rows, in fp64: a value, or
    the gradient of x, of A or of a B_i would be wrong; W would have one; or an answer, which has no
    generator, would be drawn with dropout."""
    layer, lora = make(bias=bias, dropout=dropout, dtype=torch.float64)
    x = inputs(5, d=2 * D if inner else D, dtype=torch.float64).requires_grad_()
    seen, mask, generator = (inner or untouched)(x), None, torch.Generator().manual_seed(11)
    if dropout:
        mask = torch.empty(k * 5, RANK * len(OUT), dtype=torch.float64)
        mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    y = layer(turn(x), lora, k, generator.manual_seed(11), inner)
    assert_same(y, plain(layer, lora, seen, k, mask), (x, *(lora.parameters() if k else ())))
    assert not layer.weight.requires_grad and not (bias and layer.bias.requires_grad)
    still = plain(layer, lora, seen, k).detach()
    assert torch.allclose(y[:k], still[:k]) is not (dropout > 0 and k > 0)
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            answer = layer(turn(x), lora, k, inner=inner).detach()
        torch.testing.assert_close(answer, still, rtol=1e-12, atol=1e-12)


def test_master_gradients_are_fp32_under_a_bf16_base() -> None:
    """Gradients of A and B would be rounded to bf16, so that small ones of micro-batches are lost,
    or far from those of the same values in fp64."""
    layer, lora = make(dtype=torch.bfloat16)
    exact, exact_lora = deepcopy(layer).double(), deepcopy(lora).bfloat16().double()
    x = inputs(4, dtype=torch.bfloat16).requires_grad_()
    weights = inputs(4, d=sum(OUT), dtype=torch.bfloat16, seed=5)
    y = layer(x, lora, 4)
    (y * weights).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    y = plain(exact, exact_lora, x.detach().double(), 4)
    (y * weights.double()).sum().backward()
    for mine, theirs in zip(lora.parameters(), exact_lora.parameters()):
        assert mine.dtype == mine.grad.dtype == torch.float32
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=0.02 * scale)


@pytest.mark.parametrize("foreach", [False, True])
def test_cast_follows_in_place_updates(foreach: bool) -> None:
    """The stacked copy would be made again for nothing, be stale after an optimizer's step or a
    copy_ into a master, or, made while answering, be of no use to train beside."""
    layer, lora = make(dtype=torch.bfloat16)
    x = inputs(4, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x, lora, 4)
    first = lora.stacked(torch.bfloat16)
    assert all(a is b for a, b in zip(first, lora.stacked(torch.bfloat16)))  # nothing changed
    before = layer(x, lora, 4)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, foreach=foreach)
    before.float().square().sum().backward()
    optimizer.step()
    A, block = lora.stacked(torch.bfloat16)
    B = lora.B[0].detach() * lora.scale
    assert torch.equal(A, lora.A.detach().bfloat16())
    assert torch.equal(block[:len(B), :B.shape[1]], B.bfloat16())
    with torch.no_grad():  # loading writes into views of A
        for part in lora.A.split(RANK):
            part.copy_(torch.zeros_like(part))
        assert torch.equal(layer(x, lora, 4), layer(x, lora, 0))
    assert lora.stacked(torch.float32)[0].dtype == torch.float32  # another dtype is another copy
