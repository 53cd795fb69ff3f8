"""What a CPU computes faster in another way than torch's usual one, each behind a plain function.

The functions are named for what they compute, and the modules that call them read as formulas. With
the environment variable PRISM_PLAIN=1 (or `cpu.PLAIN = True`) every one of them takes torch's usual
way; results then differ by rounding only. On a GPU that is always so.
"""

import contextlib
import ctypes
import os

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = os.environ.get("PRISM_PLAIN") == "1"
FEW_ROWS = 64
CACHED_ELEMENTS = 5 * 2**17  # of fp32: 2.5 MiB, which stay in a CPU's caches
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias): x [..., d], weight [o, d] -> [..., o].

    For few rows in fp32 as (W x^T)^T: with the long side first, the threads share W among them. A
    decoding step of SmolLM2 takes 42 instead of 63 ms with 8 rows, 65 instead of 80 with 16 and 98
    instead of 108 with 32 (two AVX2 cores). In bf16 that gives nothing.
    """
    few = x.is_cpu and x.dtype == torch.float32 and x.numel() <= FEW_ROWS * x.shape[-1]
    if PLAIN or not few:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of x [..., d], in fp32 inside.

    torch's own is nine kernels on a CPU. With the fewest temporaries, reading 2,048 tokens in bf16
    takes 8% less time (two cores with AVX512-BF16).
    """
    if x.is_cpu and not PLAIN:
        y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
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
