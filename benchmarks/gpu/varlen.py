"""Attention of packed rows as one call of torch.nn.attention.varlen, a candidate beside flex.

Each prompt and each response is a sequence of its own. Queries stay as they are packed; keys and
values are gathered, so that a response has those of its prompt before its own. Causality counts
from the last key (bottom right), so a query sees what precedes it in both.

    row              0  0  0  0  0  0         a prompt of 3 tokens, responses of 2 and 1
    queries         p0 p1 p2|c0 c1|r0
    keys            p0 p1 p2|p0 p1 p2 c0 c1|p0 p1 p2 r0

The call is FlashAttention's of CUDA, in bfloat16 or float16: an operator that torch.compile does
not look into. On a CPU `by_sequences` stands for it. Soft caps and sinks stay with flex: the call
has no soft cap, and its backward pass ignores the gradient of the log-sum-exp, which sinks need.
FlashAttention adds up gradients of queries in any order, so two runs differ by rounding, except
with torch.use_deterministic_algorithms(True).

Shapes: T tokens of all rows, K gathered keys, C copies of a key at most, H heads of queries, G of
keys, d their width.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gpu import attention
from gpu.steps import Check
from nanoalign.batch import to_device
from nanoalign.packing import attention as packed_attention
from nanoalign.packing import flex
from nanoalign.packing.attention import attend_by_hand
from nanoalign.packing.tree import Tree

# One split of the keys: the result of a sequence then does not depend on the others. torch 2.11 has
# neither option; there the number of heads of keys is not checked.
OPTIONS = {"enable_gqa": True, "num_splits": 1}
OPTIONS = OPTIONS if OPTIONS.keys() <= inspect.signature(varlen_attn).parameters.keys() else {}


class Sequences:
    """How packed rows are sequences of their own.

    keys: (K,) the place of each gathered key among the T tokens. copies: (C, T) the places of a
    token among the gathered keys, K where there is no further one. starts_q, starts_k: (N + 1,)
    int32, where each sequence begins among queries and keys. longest_q, longest_k: in tokens.
    """

    def __init__(self, rows: Sequence[tuple[int, ...]], device: torch.device):
        keys, lengths_q, lengths_k, start = [], [], [], 0
        for prompt, *responses in rows:
            before = np.arange(start, start + prompt)
            start += prompt
            parts = [before]
            for length in responses:
                parts.append(np.concatenate([before, np.arange(start, start + length)]))
                start += length
            keys += parts
            lengths_q += [prompt, *responses]
            lengths_k += map(len, parts)
        keys = np.concatenate(keys)
        order = np.argsort(keys, kind="stable")  # copies of a token one behind the other
        counts = np.bincount(keys, minlength=start)
        copies = np.full((counts.max(), start), len(keys))
        copies[
            np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts), keys[order]
        ] = order
        starts = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (lengths_q, lengths_k))
        self.keys, self.copies, self.starts_q, self.starts_k = (
            to_device(torch.from_numpy(x), device) for x in (keys, copies, *starts)
        )
        self.longest_q, self.longest_k = max(lengths_q), max(lengths_k)


class _Gather(torch.autograd.Function):
    """x[keys] of (T, G, d). The gradient of a token is the sum of those of its copies, in order.

    That of torch's own x[keys] is added up on a GPU in any order, so two runs would differ.
    """

    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return x[keys]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        there = (copies < len(upstream))[..., None, None]
        found = upstream[copies.clamp(max=len(upstream) - 1)].float()  # (C, T, G, d)
        return torch.where(there, found, 0).sum(0).to(upstream.dtype), None, None


def by_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """What varlen_attn computes, sequence by sequence in plain torch: (T, H, d)."""
    before, after = window_size
    assert after == 0, "causal"
    lengths_q, lengths_k = (starts.diff().tolist() for starts in (starts_q, starts_k))
    assert (max(lengths_q), max(lengths_k)) == (longest_q, longest_k)
    parts = zip(
        *(
            x.transpose(0, 1)[None].split(lengths, dim=2)
            for x, lengths in ((query, lengths_q), (key, lengths_k), (value, lengths_k))
        ),
        strict=True,
    )
    window, tree, out = None if before == -1 else before + 1, Tree([]), []
    for q, k, v in parts:
        mask = tree.mask(q.shape[2], k.shape[2], window, q.dtype)
        out.append(attend_by_hand(q, k, v, mask, scale, None, None)[0].transpose(0, 1))
    return torch.cat(out)


def by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """In place of flex.by_blocks, whose arguments it has: (1, H, T, d)."""
    assert softcap is None and sinks is None
    if window not in tree.block_masks:
        tree.block_masks[window] = Sequences(tree.rows, query.device)
    parts = tree.block_masks[window]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or G, d)
    key, value = (_Gather.apply(x, parts.keys, parts.copies) for x in (key, value))
    attend, options = (varlen_attn, OPTIONS) if query.is_cuda else (by_sequences, {})
    out = attend(
        query.contiguous(), key, value, parts.starts_q, parts.starts_k, parts.longest_q,
        parts.longest_k, scale=scaling, window_size=(-1 if window is None else window - 1, 0),
        **options,
    )  # fmt: skip
    return out.transpose(0, 1)[None]


@contextlib.contextmanager
def in_place_of_flex() -> Iterator[None]:
    """A context in which plain and compiled runs on CUDA call by_varlen."""

    def of_rows(rows, window: int | None, device: torch.device) -> Sequences:
        return Sequences(rows, device)

    with (
        patch.object(packed_attention, "by_blocks", by_varlen),
        patch.object(flex, "block_mask", of_rows),  # which compiled blocks find in the Tree
    ):
        yield


def varlen(check: Check) -> dict[str, object]:
    """Output and gradients beside the dense oracle, without and with a window."""

    def attend(module, query, key, value, mask, own, tree, *options) -> tuple[Tensor, None]:
        return by_varlen(query, key, value, tree, *options).transpose(1, 2), None

    kind = torch.float32 if check.small else torch.bfloat16
    sizes, widths = ((100, 129), (32,)) if check.small else ((100, 1000, 8192), (64, 128, 256))
    with patch.object(attention, "tree_attention", attend):
        off = [
            attention.difference(check.device, tokens, groups, width, kind, window)
            for tokens in sizes
            for groups in (1, 4)
            for width in widths
            for window in (None, 50)
        ]
    return {"cases": len(off), "largest": f"{max(off):.1e}"}
