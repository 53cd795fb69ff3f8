"""The gated low-rank layer: one frozen linear map, and LoRA on the leading rows of the batch only.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds a trainable product of two thin matrices to a frozen
weight: `y = x W^T + scale * (x A^T) B^T`, scale = alpha / rank. PRISM switches it on per query, so
the batch is ordered *gated rows first*, and every call is told `k`, the number of leading rows that
the adapter applies to. It is an argument, never a module state: k = 0 is the base model, k = B the
adapted one, anything between a mixed batch whose rows from k on are the base model's, bit for bit.

Projections that read the same input are stacked (q, k, v; gate and up): one frozen GEMM, one GEMM
with the stacked A, then, to train, one small `addmm_` into each projection's columns, or, to
answer, one product with all B at once. What was simplified: no merging into W (in bf16 it loses
most of a small update) and no per-projection rank.
"""

from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from support.cpu import linear


class LoRA(nn.Module):
    """The trainable half of one `GatedLoRALinear`: fp32 master weights A and B.

    Args:
        in_features: width d of the input.
        out_features: output width of each stacked projection.
        rank: LoRA rank r.
        scale: alpha / rank.
        dropout: probability of dropping an entry of `h = x A^T` while training.
        generator: source of A.

    Shapes: `A` [p * r, d] for p stacked projections, `B[i]` [out_features[i], r]. A starts uniform
    (Kaiming, as in the LoRA paper's code) and B at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: Sequence[int], rank: int, scale: float,
                 dropout: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        A = torch.empty(len(out_features) * rank, in_features)
        bound = in_features**-0.5
        self.A = nn.Parameter(A.uniform_(-bound, bound, generator=generator))
        self.B = nn.ParameterList(nn.Parameter(torch.zeros(o, rank)) for o in out_features)
        self._stacked: tuple | None = None  # what `stacked` made last, and of what

    def stacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, and all scale * B_i in one block-diagonal matrix [sum o_i, p * r], to answer with.

        Made once per change of the masters. One product with it, zeros included, costs less than
        one for each projection.
        """
        # Not self.A and self.B: looking those up is slow, and this runs in every layer of a step.
        masters = (*self._parameters.values(), *self.B._parameters.values())
        # torch counts the writes to each tensor; one that was replaced has another address.
        state = dtype, [(p._version, p.data_ptr()) for p in masters]
        if self._stacked is None or self._stacked[0] != state:
            block = torch.block_diag(*(b.detach() * self.scale for b in self.B))
            self._stacked = state, self.A.detach().to(dtype), block.to(dtype)
        return self._stacked[1:]


class GatedLoRAFunction(torch.autograd.Function):
    """Forward and backward of `GatedLoRALinear` with gradients for x, A and B, none for W.

    Of what grows with the tokens it saves x (with an `inner` function what that was given), h and
    m. With s = scale, m = dropout mask (already divided by 1 - p) and rows [:k]:
        y = x W^T (+ bias);   h = (x A^T) * m;   y_i += s h_i B_i^T
        dh_i = s dy_i B_i;    dB_i = s dy_i^T h_i;   da = dh * m;   dA = da^T x;   dx = dy W + da A
    The gradients of A and B come back in the masters' fp32, so micro-batches accumulate in fp32.
    """

    @staticmethod
    def forward(ctx, given, weight, bias, inner, k, lora, generator, *masters):
        """x [B, T, d] -> y [B, T, sum o_i]; `masters` are (A, *Bs) in fp32."""
        x = given if inner is None else inner(given)
        A, *Bs = (master.to(x.dtype) for master in masters)
        y = linear(x, weight, bias)
        h = x[:k].flatten(0, -2) @ A.t()  # [k * T, p * r]
        mask = None
        if generator is not None and lora.dropout > 0:
            keep = 1.0 - lora.dropout
            mask = torch.empty_like(h).bernoulli_(keep, generator=generator).div_(keep)
            h = h * mask
        y_rows = y[:k].view(-1, y.shape[-1])
        for B, columns, ranks in projections(Bs):
            y_rows[:, columns].addmm_(h[:, ranks], B.t(), alpha=lora.scale)
        ctx.save_for_backward(given, h, weight, mask, A, *Bs)
        ctx.k, ctx.scale, ctx.inner = k, lora.scale, inner
        return y

    @staticmethod
    def backward(ctx, dy):
        """dy [B, T, sum o_i] -> gradients of x, A and every B_i."""
        given, h, weight, mask, A, *Bs = ctx.saved_tensors
        x, k = given, ctx.k
        if ctx.inner is not None:
            with torch.enable_grad():
                given = given.detach().requires_grad_()
                x = ctx.inner(given)
        wide = torch.promote_types(A.dtype, torch.float32)
        dy_rows = dy[:k].flatten(0, -2)
        dh, dBs = torch.empty_like(h), []
        for B, columns, ranks in projections(Bs):
            dy_i = dy_rows[:, columns]
            dh[:, ranks] = (dy_i @ B).mul_(ctx.scale)
            dBs.append((h[:, ranks].t() @ dy_i).t().to(wide).mul_(ctx.scale))
        if mask is not None:
            dh.mul_(mask)  # da
        dA = (dh.t() @ x.detach()[:k].flatten(0, -2)).to(wide)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx[:k].view(-1, dx.shape[-1]).addmm_(dh, A)
            if ctx.inner is not None:
                (dx,) = torch.autograd.grad(x, given, dx)
        return dx, None, None, None, None, None, None, dA, *dBs


def projections(Bs: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice, slice]]:
    """Each B_i [o_i, r] of a stack, the columns of y that are its own, and those of h."""
    column = 0
    for i, B in enumerate(Bs):
        width, rank = B.shape
        yield B, slice(column, column + width), slice(i * rank, (i + 1) * rank)
        column += width


class GatedLoRALinear(nn.Module):
    """One or more frozen linear projections of the same input, stacked, with LoRA on leading rows.

    Args:
        in_features: input width d.
        out_features: output width o_i of each stacked projection.
        bias: whether the frozen map has a bias.
    """

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool = False,
                 dtype: torch.dtype | None = None):
        super().__init__()
        total = sum(out_features)
        weight = torch.empty(total, in_features, dtype=dtype)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), None
        if bias:
            self.bias = nn.Parameter(torch.empty(total, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, lora: LoRA | None = None, k: int | Tensor = 0,
                generator: torch.Generator | None = None,
                inner: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map x [B, T, d] to [B, T, sum o_i], the adapter on rows [:k] only.

        Args:
            lora: the adapter of this layer; None leaves the base model.
            k: number of leading rows to adapt, 0 <= k <= B; or, to answer with shapes that do not
                depend on it, a column [B, 1, 1] that is 1 in rows to adapt and 0 in others.
            generator: source of the dropout mask; None means no dropout (inference).
            inner: what is mapped is inner(x) instead of x. An adapted layer then keeps x for the
                backward pass and computes inner(x) again, where autograd would keep both.
        """
        by_column = isinstance(k, Tensor)
        adapted = lora is not None and (by_column or k > 0)
        if adapted and (generator is not None or torch.is_grad_enabled()):
            return GatedLoRAFunction.apply(x, self.weight, self.bias, inner, k, lora, generator,
                                           lora.A, *lora.B)
        x = x if inner is None else inner(x)
        y = linear(x, self.weight, self.bias)
        if adapted:
            A, B = lora.stacked(x.dtype)
            rows = len(x) if by_column else k
            h = x[:rows] @ A.t()
            if by_column:
                h = h * k
            y[:rows].flatten(0, -2).addmm_(h.flatten(0, -2), B.t())
        return y
