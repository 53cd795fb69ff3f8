"""What a CPU computes faster in another way than torch's usual one, each behind a plain function.

The functions are named for what they compute, and the modules that call them read as formulas. With
the environment variable PRISM_PLAIN=1 (or `cpu.PLAIN = True`) every one of them takes torch's usual
way; results then differ by rounding only. On a GPU that is always so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = os.environ.get("PRISM_PLAIN") == "1"
FEW_ROWS = 64
TALL = 12_288  # rows of a weight as tall as a head
CACHED_ELEMENTS = 5 * 2**17  # of fp32: 2.5 MiB, which stay in a CPU's caches
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def few_rows(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether x [..., d] has at most FEW_ROWS rows, in this dtype, on a CPU, as in a decoding step:
    the kernels made for many rows are then mostly overhead; there are faster ways to the same."""
    few = x.is_cpu and x.numel() <= FEW_ROWS * x.shape[-1]
    return few and x.dtype == dtype and not PLAIN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias): x [..., d], weight [o, d] -> [..., o].

    For few rows, and in fp32 if W is tall, as W x^T: with the long side first, the threads share W
    among them. In bf16, 8 rows through 3072 x 576 take 190 instead of 300 us. In fp32 that gives
    nothing, but 8 rows through a head of 49152 x 576 take 17 instead of 47 ms on two threads (on
    one, between a half and 1.2 of F.linear's time, by the number of rows). The result is then a
    transposed view, which elementwise operations and the next product take as it is.
    """
    tall = len(weight) >= TALL and x.dtype == torch.float32
    if not few_rows(x, torch.float32 if tall else torch.bfloat16):
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1]:
        y = torch.mv(weight, x.reshape(-1))
    else:
        y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def small_product_dtype(x: Tensor) -> torch.dtype:
    """What the low-rank products of x [..., d] are computed in: for few rows fp32, because a bf16
    product this small is all overhead (25 us a call on two cores, in fp32 6-13)."""
    return torch.float32 if few_rows(x) else x.dtype


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, k: int) -> None:
    """In place, y [B, T, o] += x A^T B^T on rows [:k], for x [B, T, d] and A, B in the dtype that
    `small_product_dtype` names.

    Few rows all at once: to add exact zeros to the rows from k on is faster than to write to a part
    of y, which is a transposed view then (see `linear`).
    """
    if few_rows(x):
        h = A @ x.flatten(0, -2).t().to(A.dtype)  # [r, B * T]
        h[:, k * x.shape[1]:] = 0
        y.flatten(0, -2).add_((B @ h).to(y.dtype).t())
    else:
        y[:k].flatten(0, -2).addmm_(x[:k].flatten(0, -2) @ A.t(), B.t())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of x [..., d], in fp32 inside.

    torch's own is nine kernels on a CPU. For few rows there is one: [x, -x] has mean 0 and variance
    mean(x^2), so that its layer norm is the RMS norm (2 of 35 ms of a bf16 decoding step). For many
    rows the fewest temporaries count: 4,096 rows of 576 take 1.4 instead of 2.2 ms, and norms are
    12% of reading in bf16.
    """
    width = x.shape[-1]
    if few_rows(x):
        both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * width,), eps=eps)
        return (both[..., :width] * weight).to(x.dtype)
    if x.is_cpu and not PLAIN:
        y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale = (norm.square() / width + eps).rsqrt()
        if torch.is_grad_enabled():
            return (y * scale * weight).to(x.dtype)
        return y.mul_(scale).mul_(weight).to(x.dtype)
    wide = x.to(weight.dtype)  # fp32 in Gemma, see `load`
    return F.rms_norm(wide, weight.shape, weight, eps).to(x.dtype)


def cached_rows(rows: int, width: int, device: torch.device) -> int:
    """How many of `rows` rows of fp32 to work on at once: on a CPU those that stay in its caches
    (256 tokens of the KL at V = 151,936: 2.0 instead of 2.3 s), on a GPU all, as each launch costs
    more than caches save."""
    if device.type != "cpu" or PLAIN:
        return rows
    return max(1, CACHED_ELEMENTS // width)


def tune_memory() -> None:
    """Two settings of libraries for tensors on a CPU, made before the first of them.

    Let the C library keep what tensors free for the tensors to come. glibc's default returns large
    blocks at once, and the next large temporary is then paid for page by page: of 4,000 tokens
    through SmolLM2 on two cores that was a quarter of the time.

    Let oneDNN, and torch's layer above it, keep 64 compiled products each instead of 1,024: a
    forward and backward pass has some 30, while batches of ever other lengths only fill the memory
    (stage 5 with the default settings rose to 10 GiB).
    """
    if PLAIN:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
