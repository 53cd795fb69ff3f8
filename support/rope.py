"""Rotary embeddings beyond the usual: how fast each pair of a head rotates, for longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(rope: dict, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cos and sin.

    Sources: RoFormer (arXiv 2104.09864) for `default`; position interpolation (2306.15595) for
    `linear`; YaRN (2309.00071) for `yarn`; Llama 3.1's released code for `llama3`.
    """
    base, kind = float(rope["rope_theta"]), rope["rope_type"]
    # On the CPU by name: a net is first built on the meta device, where nothing has a value.
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    inverse = 1.0 / base ** (2 * index / head_dim)
    if kind == "default":
        return inverse, 1.0
    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":  # long wavelengths interpolated, short ones kept, a ramp between
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        rotations = trained * inverse / (2 * math.pi)  # turns made within the trained context
        ramp = ((rotations - low) / (high - low)).clamp(0, 1)
        return inverse * (ramp + (1 - ramp) / factor), 1.0

    def dimension(rotations: float) -> float:
        """The (fractional) frequency index that makes that many turns in the trained context."""
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((index - low) / (high - low)).clamp(0, 1)

    def heat(mscale: float) -> float:
        """YaRN's attention temperature, 0.1 m ln(factor) + 1 (its section 3.4)."""
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention, over, under = (rope.get(n) for n in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = heat(over) / heat(under) if over and under else heat(1.0)
    return inverse * (1 - ramp) + inverse / factor * ramp, float(attention)
