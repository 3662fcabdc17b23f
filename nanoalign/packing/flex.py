"""Attention of packed rows on CUDA: flex_attention, which skips blocks of places that are empty.

Imported when the first tensor on CUDA is attended to. The mask in blocks is made from the lengths
of the rows on the host: nothing of T x T places is computed, and nothing waits for the GPU.

Shapes: T tokens of all rows, n = ceil(T / 128) blocks of queries, and of keys.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nanoalign.batch import to_device
from nanoalign.packing.tree import Tree, spans

BLOCK = 128  # queries, and keys, of a block of the mask
# By the bytes of a number: the shared memory in which torch's own blocks fit for every width, and
# the blocks for wide heads where there is less. Both are what Triton's compiler reports.
AMPLE_SHARED_MEMORY = {2: 160_000, 4: 200_000}
SMALL_BLOCKS = {
    2: {
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 32,
        "fwd_num_stages": 2,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 32,
        "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32,
        "bwd_num_stages": 1,
    },
    4: {"fwd_BLOCK_M": 16, "fwd_BLOCK_N": 16, "fwd_num_stages": 1},
}
# On Hopper (which has more shared memory than this), heads of width 64 in bfloat16: torch's 4 warps
# have too few registers, and a step takes 1.05 to 1.16 times as long (benchmarks/RESULTS.md).
HOPPER, MORE_WARPS = 200_000, {"fwd_num_warps": 8}


def by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of (1, H, T, d) queries; the arguments are those of attention.tree_attention.

    On a CPU it runs uncompiled, for tests.
    """

    def cap(score: Tensor, *place: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    flex, options = flex_attention, None
    if query.is_cuda:
        flex = flex_attention if torch.compiler.is_compiling() else _compiled()
        memory = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
        options = kernel_options(query.shape[-1], query.dtype, memory)
    if window not in tree.block_masks:
        tree.block_masks[window] = block_mask(tree.rows, window, query.device)
    out = flex(
        query,
        key,
        value,
        block_mask=tree.block_masks[window],
        scale=scaling,
        score_mod=None if softcap is None else cap,
        enable_gqa=True,
        kernel_options=options,
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return out
    out, aux = out
    # A sink takes its share of the softmax, and has no value: exp(lse) / (exp(lse) + exp(sink)).
    return out * torch.sigmoid(aux.lse - sinks[None, :, None])[..., None].to(out.dtype)


@cache
def _compiled() -> Callable[..., object]:
    """flex_attention as one kernel for sequences of any length, compiled in the first forward.

    fullgraph: without it, what cannot be compiled would silently become dense scores.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)  # grad or not, soft cap, shape
    config.specialize_float = True  # a soft cap that is symbolic has no gradient
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def kernel_options(head_dim: int, dtype: torch.dtype, shared_memory: int) -> dict[str, object]:
    """Options of flex_attention's kernels, by name, for heads of a width and a dtype.

    shared_memory: bytes that a block of threads may have: 232,448 on an H100, 166,912 on an A100,
        101,376 on a 4090 or an L40, where torch's own blocks fit a width of 128 in bfloat16.
    """
    # Below 128 tokens torch would take its decoding kernel, which has no such block masks.
    options: dict[str, object] = {"FORCE_USE_FLEX_ATTENTION": True}
    size = dtype.itemsize
    if head_dim == 64 and size == 2 and shared_memory > HOPPER:
        options |= MORE_WARPS
    is_narrow = head_dim * size <= 256
    fits = is_narrow or shared_memory >= AMPLE_SHARED_MEMORY[size]
    return options if fits else options | SMALL_BLOCKS[size]


def seen_pairs(spans: np.ndarray) -> np.ndarray:
    """How many pairs of a query and a key that it sees each block has: (n, n), queries first."""
    tokens = spans.shape[1]
    n = -(-tokens // BLOCK)
    # A query sees of each block the keys below the ends of its spans, less those below the starts.
    signs = np.repeat([-1, 1, -1, 1], tokens)
    block, rest = np.divmod(spans.reshape(-1).astype(np.int64), BLOCK)
    place = np.tile(np.arange(tokens) // BLOCK, 4) * (n + 1) + block
    bounds, rests = (
        np.bincount(place, weights, n * (n + 1)).reshape(n, n + 1)
        for weights in (signs, signs * rest)
    )  # (n, n + 1): of the bounds that are in each block
    later = bounds[:, ::-1].cumsum(axis=1)[:, ::-1] - bounds  # these cover all keys of the block
    return (later * BLOCK + rests)[:, :n].astype(np.int64)


def block_mask(
    rows: Sequence[tuple[int, ...]], window: int | None, device: torch.device
) -> BlockMask:
    """The BlockMask of packed rows, equal to that of create_block_mask for all T x T places.

    rows: tokens of the prompt and of every response, as a Tree has them. window: of a Tree's mask.
    """
    bounds = spans(rows, window)
    start, end, own, _ = (to_device(torch.from_numpy(x), device) for x in bounds)

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= start[q]) & (k < end[q])) | ((k >= own[q]) & (k <= q))

    pairs, tokens = seen_pairs(bounds), bounds.shape[1]
    full = pairs == BLOCK * BLOCK
    partial = (pairs > 0) & ~full
    lists = [
        to_device(torch.from_numpy(x)[None, None], device)
        for blocks in (partial, full, partial.T, full.T)
        for x in _listed(blocks)
    ]
    return BlockMask((tokens, tokens), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=attends)


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many blocks of each line are true, (n,); the indices of a line, these first, (n, n))."""
    order = np.argsort(~blocks, kind="stable")
    return blocks.sum(axis=1, dtype=np.int32), order.astype(np.int32)
