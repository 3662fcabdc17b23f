"""Attention of a long part (CPU), in blocks of its queries: memory grows linearly with its tokens.

A mask of 16,000 queries and as many keys has 1 GB, and torch keeps it for the backward pass. Here a
block of queries has a mask of its own, which is dropped, and made again for the backward pass. A
block sees the keys up to its own end, and with a sliding window none that all of it has left.

Shapes: H heads of queries, G heads of keys and values, d their width, Q queries, K keys.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanoalign.model import RERUN
from nanoalign.packing.attention import Attend, Tree

QUERIES = (64, 1024)  # of a block: fewer cost calls, more make a window's masks mostly empty


def by_queries(
    q: Tensor,  # (1, H, Q, d), those of the last Q of K tokens
    k: Tensor,  # (1, G, K, d)
    v: Tensor,  # (1, G, K, d)
    window: int | None,
    attend: Attend,  # takes queries, keys, values of a block, and its mask
    places: int,  # of a mask, about
) -> Tensor:
    """One attention of some queries: (1, H, Q, d). With a gradient, a block is computed twice."""

    def attend_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = Tree([]).mask(q.shape[2], k.shape[2], window, q.dtype)  # of a Tree that is dropped
        return attend(q, k, v, mask)

    least, most = QUERIES
    before = k.shape[2] - q.shape[2]  # keys before the first query
    seen = k.shape[2] if window is None else min(k.shape[2], most + window)
    size = min(max(places // seen, least), most)
    out = []
    for start in range(0, q.shape[2], size):
        block = q[:, :, start : start + size]
        end = before + start + block.shape[2]
        keys = slice(0 if window is None else max(0, before + start - window + 1), end)
        out.append(checkpoint(attend_block, block, k[:, :, keys], v[:, :, keys], **RERUN))
    return torch.cat(out, dim=2)
