"""Attention's mask, and which of torch's kernels fits: shared keys, one token, capped scores."""

from __future__ import annotations

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
