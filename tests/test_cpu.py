"""support/cpu.py: what a CPU computes in another way is the same as torch's usual way."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lora import inputs, make
from torch import Tensor

from support import cpu
from support.cpu import FEW_ROWS, cached_rows, linear, rms_norm

ROOT = Path(__file__).parent.parent
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others are left alone")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """All fast ways are on, whatever PRISM_PLAIN says."""
    monkeypatch.setattr(cpu, "PLAIN", False)


def both_ways(monkeypatch: pytest.MonkeyPatch, function: object, *args: object) -> list[Tensor]:
    """What a function gives in the fast way and in torch's usual one."""
    fast = function(*args)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "PLAIN", True)
        return [fast, function(*args)]


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_are_the_same_map(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step's other way to multiply would be another map or layout than x W^T + b."""
    layer, _ = make(bias=bias)
    x = inputs(rows, 1)
    fast, usual = both_ways(monkeypatch, linear, x, layer.weight, layer.bias)
    torch.testing.assert_close(fast, usual, rtol=1e-5, atol=1e-5)
    assert fast.stride() == usual.stride()
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(linear(turned, layer.weight, layer.bias), fast)


def test_which_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows, or bf16, would be multiplied in the way that pays for few rows of fp32 only; or
    PRISM_PLAIN=1 would leave a fast way on, and nothing could be compared with it."""
    calls = []
    monkeypatch.setattr(cpu.torch, "mm", lambda a, b: calls.append(len(a)) or a @ b)
    weight = inputs(1, 5, 16)[0]
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        linear(inputs(rows, 1, 16), weight)
    linear(inputs(3, 1, 16).bfloat16(), weight.bfloat16())
    assert calls == [5, 5] and cached_rows(138, 151936, weight.device) == 4
    monkeypatch.setattr(cpu, "PLAIN", True)
    linear(inputs(1, 1, 16), weight)
    assert calls == [5, 5] and cached_rows(138, 151936, weight.device) == 138


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 65])
def test_norms_are_the_same(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm would differ from torch's own, with gradients or not."""
    x, weight = 3 * inputs(rows, 1, 24).to(dtype), inputs(1, 1, 24)[0, 0].to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            fast, usual = both_ways(monkeypatch, rms_norm, x, weight, 1e-3)
        torch.testing.assert_close(fast, usual, rtol=tolerance, atol=tolerance)


def printed(script: str) -> int:
    """The number that a script prints in a process of its own, the fast ways on."""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"PRISM_PLAIN": ""})
    return int(done.stdout)


@GLIBC
def test_freed_memory_is_kept() -> None:
    """Large tensors made and dropped again and again would ask for their pages each time. (Without
    the setting it depends on what else lies in the heap: 0 to 37,000 of them in each round.)"""
    assert printed("""import resource, torch
from support.cpu import tune_memory
tune_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(6 * 2**20) for _ in range(6)]
    del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)""") < 100


@pytest.mark.slow
@GLIBC
def test_compiled_products_are_not_hoarded() -> None:
    """Batches of 600 lengths would leave more behind in the heap than the last few of them."""
    assert printed("""import ctypes, torch
from support.cpu import tune_memory
tune_memory()
class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
def used():
    return getattr(library.mallinfo2(), "7")
weight = torch.ones(1536, 576, dtype=torch.bfloat16)
marks = []
for n in range(100, 700):
    torch.nn.functional.linear(torch.ones(n, 576, dtype=torch.bfloat16), weight)
    if n % 100 == 99:
        marks.append(used())
print(marks[-1] - marks[0])""") < 50 * 2**20
