"""Steps of gpu_check.py that compare the attention of packed rows with a dense oracle."""

import math
import random

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from gpu.steps import Check
from nanoalign.packing.attention import tree_attention
from nanoalign.packing.flex import block_mask
from nanoalign.packing.tree import Tree, coordinates

LENGTHS = (20, 60, 100, 127, 128, 129, 1000, 8191, 8192)
GROUPS = (1, 2, 4, 7, 8)  # heads of queries that share a head of keys
WIDTHS = (32, 64, 96, 128, 256)
# Largest difference, as a share of the oracle's largest value: bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def drawn_rows(tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Pairs of the lengths of chats, with `tokens` tokens in all."""
    draw, rows, left = random.Random(seed), [], tokens
    while left:
        row = (draw.randint(1, 250), draw.randint(1, 80), draw.randint(1, 80))
        rows.append(row if sum(row) <= left else (left,))
        left -= sum(rows[-1])
    return rows


def dense_mask(tree: Tree, window: int | None, device: str) -> Tensor:
    """(T, T): the definition, of all places at once."""
    row, segment, position = (torch.tensor(x, device=device) for x in coordinates(tree.rows))
    index = torch.arange(len(row), device=device)
    seen = (index[:, None] >= index) & (row[:, None] == row)
    seen &= (segment == 0) | (segment[:, None] == segment)
    return seen if window is None else seen & (position[:, None] - position < window)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One softmax over all places: (1, T, H, d)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def difference(
    device: str,
    tokens: int,
    groups: int,
    width: int,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    with_sinks: bool = False,
) -> float:
    """How far the attention and its gradients are from the oracle's in float64, relatively.

    The largest of the differences of the output and of the gradients of queries, keys, values and
    sinks, each as a share of the oracle's largest value. Raises AssertionError beyond TOLERANCE.
    """
    torch.manual_seed(tokens)
    tree, key_heads = Tree(drawn_rows(tokens)), 2 if tokens <= 1000 else 1
    shapes = [(1, tokens, heads, width) for heads in (groups * key_heads, key_heads, key_heads)]
    drawn = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    drawn += [torch.randn(groups * key_heads, device=device)] if with_sinks else []
    cotangent = torch.randn(shapes[0], device=device).to(dtype)
    results = []
    for kind in (dtype, torch.float64):
        inputs = [
            x.to(kind if x.ndim > 1 or kind is torch.float64 else torch.float32) for x in drawn
        ]
        inputs = [x.detach().requires_grad_() for x in inputs]
        query, key, value = (x.transpose(1, 2) for x in inputs[:3])
        sinks = inputs[3] if with_sinks else None
        if kind is torch.float64:
            seen = dense_mask(tree, window, device)
            out = dense_attention(query, key, value, seen, softcap, sinks)
        else:
            options = (None, window, softcap, sinks)  # no scaling: 1 / sqrt(d)
            out, _ = tree_attention(None, query, key, value, None, "sdpa", tree, *options)
        out.backward(cotangent.to(out.dtype))
        results.append([out.detach(), *(x.grad for x in inputs)])
    off = max(
        ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
        for found, wanted in zip(*results, strict=True)
    )
    case = f"T {tokens}, groups {groups}, d {width}, {dtype}, {window}, {softcap}, {with_sinks}"
    print(f"{off:.1e} {case}", flush=True)
    assert off <= TOLERANCE[dtype], f"off by {off:.1e}: {case}"
    return off


def _compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _summary(differences: list[float]) -> dict[str, object]:
    return {
        "cases": len(differences),
        "largest": f"{max(differences):.1e}",
        "compilations": _compilations(),
    }


def masks(check: Check) -> dict[str, object]:
    """The mask that the host makes is create_block_mask's, on the device."""
    device = torch.device(check.device)
    sizes = (1, 100, 128, 129, 1000) if check.small else (*LENGTHS, 1)
    for tokens in sizes:
        for window in (None, 3, 100):
            rows = drawn_rows(tokens, seed=tokens)
            seen = dense_mask(Tree(rows), window, check.device)
            mask = block_mask(rows, window, device)
            places = torch.arange(tokens, device=device)
            assert torch.equal(mask.mask_mod(None, None, places[:, None], places), seen)
            expected = create_block_mask(
                lambda b, h, q, k, seen=seen: seen[q, k],
                None,
                None,
                tokens,
                tokens,
                device=check.device,
            )
            for side in ("kv", "full_kv", "q", "full_q"):
                for name in (f"{side}_num_blocks", f"{side}_indices"):
                    found, wanted = getattr(mask, name), getattr(expected, name)
                    assert torch.equal(found, wanted), (name, tokens, window)
    return {"masks": 3 * len(sizes)}


def lengths(check: Check) -> dict[str, object]:
    """Every length, with every number of heads that share keys, of width 64."""
    sizes, groups = (LENGTHS[:6], (1, 4)) if check.small else (LENGTHS, GROUPS)
    kind = torch.float32 if check.small else torch.bfloat16
    return _summary([difference(check.device, t, g, 64, kind) for g in groups for t in sizes])


def options(check: Check) -> dict[str, object]:
    """A window, soft caps and sinks, alone and together."""
    kind = torch.float32 if check.small else torch.bfloat16
    sizes = (100, 129) if check.small else (100, 1000, 8192)
    return _summary(
        [
            difference(check.device, t, 4, 64, kind, window, softcap, with_sinks)
            for window in (None, 50)
            for softcap in (None, 20.0)
            for with_sinks in (False, True)
            for t in sizes
        ]
    )


def widths(check: Check) -> dict[str, object]:
    """Every width, in both precisions: float32 needs more shared memory."""
    kinds = (torch.float32,) if check.small else (torch.bfloat16, torch.float32)
    sizes = (100,) if check.small else (100, 1000)
    return _summary(
        [difference(check.device, t, 2, d, kind) for d in WIDTHS for kind in kinds for t in sizes]
    )
