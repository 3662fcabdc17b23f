"""Attention with capped scores (Gemma 2), or with sinks (gpt-oss): torch's own has neither."""

import torch
from torch import Tensor


def attend_by_hand(
    q: Tensor,  # (1, H, Q, d)
    k: Tensor,  # (1, G, K, d)
    v: Tensor,  # (1, G, K, d)
    mask: Tensor | None,  # (Q, K), added to scores; None: each query sees what precedes it
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:
    """One attention of some queries: (1, H, Q, d)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    scores = (scores + mask).float()
    if sinks is not None:
        sinks = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
