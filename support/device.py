"""`--device` and `--dtype`: what "auto" chooses, and how data gets to the device."""

import os
from typing import Sequence

import torch
from torch import Tensor

from support.config import DTYPES
from support.hub import InputError


def choose_device(name: str = "auto") -> torch.device:
    """"auto" is cuda if present, else cpu; anything else is taken at its word.

    Raises:
        InputError: not a device that torch has here.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    if name == "cuda" and there and "LOCAL_RANK" in os.environ:
        # So that torchrun's processes do not all open the first GPU.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        torch.ones(1, device=name).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory and work are asked about without naming it
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """"auto" is bf16 where the hardware computes in it, else fp32; fp16 only if asked for."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InputError(f"--dtype {name}: choose auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy from the host without waiting: a GPU reads pinned memory while the host goes on."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Right-pad rows of ids to [B, T]; also their lengths [B]. Causal attention never looks right,
    so what stands in the padding does not matter."""
    lengths = [len(r) for r in rows]
    padded = [list(r) + [0] * (max(lengths) - len(r)) for r in rows]
    return upload(torch.tensor(padded), device), upload(torch.tensor(lengths), device)


def batches(lengths: Sequence[int], tokens: int,
            whole: Sequence[int] | None = None) -> list[list[int]]:
    """Row numbers by length, in batches of at most `tokens` padded tokens (of `whole` lengths).

    >>> batches([3, 9, 2, 3], 9)
    [[2, 0, 3], [1]]
    """
    found: list[list[int]] = []
    longest, whole = 0, whole or lengths
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        longest = max(longest, whole[i])
        if not found or (len(found[-1]) + 1) * longest > tokens:
            found.append([])
            longest = whole[i]
        found[-1].append(i)
    return found


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory
