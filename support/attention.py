"""Attention's mask, which of torch's kernels fits (shared keys, one token, caps), and RoPE."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# cuDNN's attention makes a plan for every new number of keys, and a decoding step has one more each
# time: tens of milliseconds a step. torch's other kernels take any.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
           scale: float | None = None, cap: float | None = None) -> Tensor:
    """Attention of queries [B, H, T, D] over keys and values [B, Hkv, S, D]: [B, H, T, D].

    Args:
        mask: added to the scores, broadcast to [B, H, T, S]; None means causal with S = T.
        scale: factor on the scores; None is D^-0.5.
        cap: if given, scores become cap * tanh(scores / cap), and a mask is needed.

    While decoding (T = 1), the query heads that share a key head become query rows: one reading of
    the keys serves them all, in a kernel that needs no `enable_gqa`. 32 rows at 160 keys, 3 heads
    to a key head, take 285 instead of 1,739 us in bf16 (AVX512-BF16), 193 instead of 221 in fp32.
    """
    if cap is not None:
        return _attend_capped(queries, keys, values, mask, scale, cap)
    B, H, T, D = queries.shape
    group = H // keys.shape[1]
    if T == 1 and mask is not None:
        rows = queries.view(B, -1, group, D)
        y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
        return y.reshape(B, H, T, D)
    if queries.is_cuda and group > 1 and (mask is not None or queries.dtype == torch.float32):
        # There only the flash kernel shares keys, and it takes neither; without it all scores of a
        # layer would be in memory at once.
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        group = 1
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale,
                                          is_causal=mask is None, enable_gqa=group > 1)


def _attend_capped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor,
                  scale: float | None, cap: float) -> Tensor:
    """`attend` with scores cap * tanh(scores / cap), in fp32: torch has no fused kernel for it."""
    B, H, T, D = queries.shape
    heads, S = keys.shape[1:3]
    rows = queries.reshape(B, heads, -1, D)  # a key head's queries are rows: [B, Hkv, H/Hkv * T, D]
    scale = D**-0.5 if scale is None else scale
    scores = (rows @ keys.transpose(2, 3)).float() * (scale / cap)
    scores = (scores.tanh() * cap).view(B, heads, -1, T, S) + mask[:, :, None]
    weights = scores.softmax(-1).to(values.dtype).view(B, heads, -1, S)
    return (weights @ values).view(B, H, T, D)


def additive_mask(positions: Tensor, length: int, window: int | None,
                  dtype: torch.dtype) -> Tensor:
    """[B, 1, T, length]: 0 where the query at positions [B, T] may see the key at that index, else
    -inf. A boolean mask would be turned into this once more in every layer."""
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    unseen = distance < 0
    if window is not None:
        unseen |= distance >= window
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, float("-inf"))


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
