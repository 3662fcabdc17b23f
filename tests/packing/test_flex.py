"""python -m pytest tests/packing/test_flex.py

The mask in blocks that CUDA's attention reads, made from the lengths of rows, on a CPU.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_codegen
import pytest
import torch
from test_attention import ROWS, dense_mask
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from nanoalign.packing import flex
from nanoalign.packing.flex import block_mask, by_blocks, kernel_options, seen_pairs
from nanoalign.packing.tree import Tree, spans

CPU = torch.device("cpu")
BLOCK = 128


def drawn_rows(draw: random.Random, tokens: int, longest: int) -> list[tuple[int, ...]]:
    """Rows of 0 to 3 responses with `tokens` tokens in all, and parts of 1 to `longest`."""
    rows, left = [], tokens
    while left:
        row = tuple(draw.randint(1, longest) for _ in range(draw.randint(1, 4)))
        rows.append(row if sum(row) <= left else (left,))
        left -= sum(rows[-1])
    return rows


def blocks_of(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(n, n): which blocks a list of them names, each line once."""
    assert counts.dtype == indices.dtype == torch.int32 and counts.shape[:2] == (1, 1)
    named = torch.zeros(indices.shape[2:], dtype=torch.int64)
    for line, (count, order) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        assert sorted(order.tolist()) == [*range(len(order))]
        named[line, order[:count].long()] += 1
    return named


def test_spans_by_hand():
    """p0 p1 p2 | c0 c1 | r0: then with a window of 2, r0 at position 3 sees p2 and itself."""
    assert spans([(3, 2, 1)], None).tolist() == [
        [0, 0, 0, 0, 0, 0], [0, 0, 0, 3, 3, 3], [0, 0, 0, 3, 3, 5], [1, 2, 3, 4, 5, 6],
    ]  # fmt: skip
    assert spans([(3, 2, 1)], 2).tolist() == [
        [0, 0, 0, 2, 3, 2], [0, 0, 0, 3, 3, 3], [0, 0, 1, 3, 3, 5], [1, 2, 3, 4, 5, 6],
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 20, 100, 127, 128, 129, 300, 1000, 3000])
def test_the_mask_of_lengths_is_that_of_all_places(tokens):
    """Mask, partial and full blocks, of queries and of keys: the same as create_block_mask's."""
    draw = random.Random(tokens)
    for longest in (5, 60, 700) if tokens < 3000 else (700,):
        rows, window = drawn_rows(draw, tokens, longest), draw.choice((None, 1, 3, 40, 200))
        seen = dense_mask(Tree(rows), window)
        mask = block_mask(rows, window, CPU)
        places = torch.arange(tokens)
        assert torch.equal(mask.mask_mod(None, None, places[:, None], places[None, :]), seen)
        expected = create_block_mask(
            lambda b, h, q, k, seen=seen: seen[q, k], None, None, tokens, tokens, device="cpu"
        )
        assert mask.seq_lengths == expected.seq_lengths == (tokens, tokens)
        assert mask.BLOCK_SIZE == expected.BLOCK_SIZE == (BLOCK, BLOCK)
        for side in ("kv", "full_kv", "q", "full_q"):
            found, wanted = (
                blocks_of(getattr(m, f"{side}_num_blocks"), getattr(m, f"{side}_indices"))
                for m in (mask, expected)
            )
            assert torch.equal(found, wanted), (side, rows, window)


def test_a_long_row_has_full_blocks_whose_places_are_not_looked_at():
    """One answer of 512 tokens, causal: 4 blocks on the diagonal are partial, 6 below it full."""
    mask = block_mask([(1, 511)], None, CPU)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    assert seen_pairs(spans([(1, 511)], None)).sum() == 512 * 513 // 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_mask_is_made_once_for_all_layers():
    tree, query = Tree(ROWS), torch.ones(1, 1, sum(map(sum, ROWS)), 8)
    for window in (None, 4, None):
        by_blocks(query, query, query, tree, None, window, None, None)
        made = dict(tree.block_masks)
    assert [*made] == [None, 4]
    by_blocks(query, query, query, tree, None, 4, None, None)
    assert all(tree.block_masks[window] is mask for window, mask in made.items())


def test_all_lengths_and_windows_are_two_compilations(monkeypatch):
    """At most one block of tokens, and more: torch takes a size of 1 as a constant."""
    counter = CompileCounter()
    compiled = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    for tokens in (300, 20, 1000, 128, 129, 384, 77):
        for window in (None, 3, 50):
            query, key = (torch.ones(1, tokens, heads, 8).transpose(1, 2) for heads in (4, 2))
            tree = Tree(drawn_rows(random.Random(tokens), tokens, 90))
            by_blocks(query, key, key, tree, None, window, None, None)
    assert counter.frame_count == 2


H100, A100, L40, T4 = 232_448, 166_912, 101_376, 65_536  # bytes of shared memory
HALF = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2, "bwd_num_stages": 1}
HALF |= dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
WARPS = {"fwd_num_warps": 8}
FULL = {"fwd_BLOCK_M": 16, "fwd_BLOCK_N": 16, "fwd_num_stages": 1}


@pytest.mark.parametrize(
    ("memory", "width", "dtype", "blocks"),
    [
        (H100, 64, torch.bfloat16, WARPS),
        (H100, 64, torch.float32, {}),
        (H100, 128, torch.bfloat16, {}),
        (A100, 64, torch.bfloat16, {}),
        (H100, 256, torch.bfloat16, {}),
        (H100, 256, torch.float32, {}),
        (A100, 256, torch.bfloat16, {}),
        (A100, 64, torch.float32, {}),
        (A100, 96, torch.float32, FULL),
        (L40, 128, torch.bfloat16, {}),
        (L40, 64, torch.float32, {}),
        (L40, 192, torch.bfloat16, HALF),
        (L40, 256, torch.float16, HALF),
        (L40, 96, torch.float32, FULL),
        (L40, 256, torch.float32, FULL),
        (T4, 64, torch.float32, {}),
        (T4, 128, torch.float32, FULL),
    ],
)
def test_wide_heads_get_smaller_blocks_where_shared_memory_is_small(memory, width, dtype, blocks):
    """{}: torch's own blocks. The decoding kernel, without such masks, is never taken."""
    options = kernel_options(width, dtype, memory)
    assert options == {"FORCE_USE_FLEX_ATTENTION": True} | blocks
    divided = [BLOCK % size for name, size in options.items() if "BLOCK" in name]
    assert not any(divided)


def test_options_are_made_anew():
    kernel_options(256, torch.bfloat16, L40)["fwd_num_warps"] = 8
    assert "fwd_num_warps" not in kernel_options(256, torch.bfloat16, L40)


# --- kernels of CUDA, compiled without a GPU by its build of torch: about 90 s for each -----------


@pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ >= "2.14" or shutil.which("gcc") is None,
    reason="torch without CUDA, a torch that asks more of the driver than the stub answers, or no "
    "C compiler",
)
@pytest.mark.parametrize("capability", cuda_codegen.SHARED_MEMORY)
def test_attention_compiles_for_gpus_that_are_not_there(capability):
    """Forward and backward kernels fit, and a shape is compiled anew only where it has to be."""
    command = [sys.executable, cuda_codegen.__file__, *map(str, capability)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert [*found] == [*cuda_codegen.CASES, "20 batches"]
    for name in cuda_codegen.CASES:
        again = "window" in name  # its spans are data: the same kernels
        assert found[name]["graphs"] == len(found[name]["shared"]) == (0 if again else 2), name
        for bytes_shared in found[name]["shared"]:
            assert 0 < bytes_shared <= cuda_codegen.SHARED_MEMORY[capability]
    assert found["20 batches"]["graphs"] == 4  # up to a block of tokens and above, with gradients
