"""python -m pytest tests/packing/test_plan.py

How rows are divided into micro-batches: packed, and in padded lines.
"""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from nanoalign.batch import Row
from nanoalign.loop import Batches
from nanoalign.packing.batches import Packed
from nanoalign.packing.plan import pack


def random_rows(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    lengths = [[draw.randint(1, 60) for _ in range(3)] for _ in range(count)]
    parts = [[np.full(n, i, np.int32) for i, n in enumerate(row)] for row in lengths]
    return [Row(str(i), part[0], tuple(part[1:])) for i, part in enumerate(parts)]


@pytest.mark.parametrize("layout", [Batches, Packed])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 200, 1000, 10**6])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_plan_places_every_row_once_within_the_limit(world, count, tokens, ranks, layout):
    rows = random_rows(count, seed=count)
    batches = layout(replace(world, size=ranks), tokens)
    plan = batches.plan(rows)
    assert all(len(part) == ranks for part in plan)
    assert sorted(i for part in plan for group in part for i in group) == list(range(count))
    for group in (group for part in plan for group in part if group):
        computed = batches.collate([rows[i] for i in group]).inputs["input_ids"].numel()
        assert computed <= tokens or len(group) == 1


def test_ranks_get_even_work():
    """64 pairs of 3 to 180 tokens on 8 ranks: no rank has more than 1.05 times the mean."""
    lengths = [len(row) for row in random_rows(64, seed=0)]
    groups = pack(lengths, 8, 10**6)
    work = [sum(lengths[i] for i in group) for group in groups]
    assert len(groups) == 8 and max(work) < 1.05 * sum(work) / 8


def test_packed_rows_fill_the_fewest_micro_batches():
    lengths = [len(row) for row in random_rows(512, seed=1)]
    assert len(pack(lengths, 2, 2000)) == 2 * math.ceil(sum(lengths) / 4000)


def test_a_round_is_filled_to_its_longest_row_by_hand():
    """Rows of 6, 2, 2, 2, 2, 2 on two ranks, 6 at a time: 6 | 2 2 2, then 2 | 2."""
    lengths = (2, 2, 6, 2, 2, 2)
    groups = [sorted(lengths[i] for i in group) for group in pack(lengths, 2, 6)]
    assert groups == [[6], [2, 2, 2], [2], [2]]


def test_padded_lines_waste_little(world):
    """Rows of similar length are together: 1.25 computed tokens a real one; at random 1.5."""
    rows = random_rows(512, seed=1)
    batches = Batches(world, 2000)
    padded = sum(
        batches.collate([rows[i] for i in groups[0]]).inputs["input_ids"].numel()
        for groups in batches.plan(rows)
    )
    real = sum(len(row.prompt) + len(r) for row in rows for r in row.responses)
    assert padded < 1.25 * real
