"""python -m pytest tests/core/test_batch.py"""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from nanoalign.batch import Row, collate, lengths_of
from nanoalign.errors import RunError
from nanoalign.loop import Batcher
from nanoalign.packing.packed import PackedBatcher
from nanoalign.packing.packed import collate as pack


def row(prompt: list[int], *responses: list[int], **fields) -> Row:
    ids = [np.array(part, np.int32) for part in (prompt, *responses)]
    return Row("row", ids[0], tuple(ids[1:]), **fields)


PAIR = row([10, 11, 12], [20, 21, 22], [30, 31])


def test_padded_rows_by_hand():
    """The rows of the module's docstring."""
    batch = collate([PAIR])
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 22], [10, 11, 12, 30, 31, 0]]
    assert batch.predicted_at.tolist() == [2, 3, 4, 8, 9]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31]
    assert batch.lengths.tolist() == [3, 2] and batch.ends_at.tolist() == [5, 10]
    assert batch.chosen.tolist() == [0] and batch.rejected.tolist() == [1]
    assert batch.weights.tolist() == [1.0]
    indices = (batch.inputs["input_ids"], batch.predicted_at, batch.targets)
    assert {x.dtype for x in indices} == {torch.int64}


def test_packed_rows_by_hand():
    """The row of the docstring of nanoalign/packing/packed.py, before a shorter one."""
    batch = pack([PAIR, row([40], [50], [60])])
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 22, 30, 31, 40, 50, 60]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 1]]
    assert batch.inputs["tree"].rows == [(3, 3, 2), (1, 1, 1)]
    assert batch.predicted_at.tolist() == [2, 3, 4, 2, 6, 8, 8]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31, 50, 60]
    assert batch.lengths.tolist() == [3, 2, 1, 1] and batch.ends_at.tolist() == [5, 7, 9, 10]


def test_pairs_of_a_ranked_row_share_its_weight_by_hand():
    """A pair, and three ranked responses with two pairs: responses 0, 1 | 2, 3, 4."""
    ranked = row([7], [1], [2], [3, 4, 5], pairs=((0, 2), (1, 2)))
    rows = [
        replace(PAIR, extra={"margins": np.float32([1])}),
        replace(ranked, extra={"margins": np.float32([2, 0.5])}),
    ]
    for layout in (collate, pack):
        for weight in (1.0, 0.0):
            batch = layout(rows, weight)
            assert batch.chosen.tolist() == [0, 2, 3] and batch.rejected.tolist() == [1, 4, 4]
            assert batch.weights.tolist() == [weight, weight / 2, weight / 2]
            assert batch.extra["margins"].tolist() == [1.0, 2.0, 0.5]
            assert batch.extra["margins"].dtype == torch.float32


def test_rows_without_pairs_can_be_scored():
    batch = collate([row([1], [2], pairs=()), row([1], [3, 4], pairs=())])
    assert batch.ends_at.tolist() == [1, 5] and batch.chosen.shape == batch.weights.shape == (0,)
    assert batch.chosen.dtype == batch.rejected.dtype == torch.int64  # indices, also none


def test_a_batch_moves_whole():
    """Tensors in `inputs` and `extra` too; other values stay. The meta device is not the CPU."""
    batch = collate([replace(PAIR, extra={"margins": np.float32([1])})])
    batch.inputs["is_causal"], batch.rows = True, [5]
    moved = batch.to(torch.device("meta"))
    assert moved.inputs.pop("is_causal") is True and moved.rows == [5]
    names = ["predicted_at", "targets", "lengths", "ends_at", "chosen", "rejected", "weights"]
    tensors = [moved.inputs["input_ids"], moved.extra["margins"]]
    tensors += [getattr(moved, name) for name in names]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.predicted_at.device.type == "cpu"
    with pytest.raises(AttributeError):
        batch.row = [5]  # a misspelled field


def test_lengths_of_rows():
    assert len(PAIR) == 8 and PAIR.longest == 6
    with pytest.raises(FrozenInstanceError):
        PAIR.name = "other"
    assert row([1, 2]).longest == len(row([1, 2])) == 2
    assert lengths_of([PAIR, row([1], [2])]).tolist() == [8, 2]
    assert lengths_of([]).tolist() == [] and lengths_of([]).dtype == np.int64


def test_a_plan_of_padded_lines_by_hand(world):
    """Lines of 8 tokens at most, counted with padding; a longer row is alone; two ranks."""
    rows = [row([1] * n, [2], [3]) for n in (1, 3, 1, 9, 1)]  # 2, 4, 2, 10, 2 tokens a line
    assert Batcher(world, 8).plan(rows) == [[[3]], [[1]], [[0, 2]], [[4]]]
    assert Batcher(world, 7).plan(rows) == [[[3]], [[1]], [[0]], [[2]], [[4]]]
    two = replace(world, size=2)
    assert Batcher(two, 8).plan(rows) == [[[3], [1]], [[0, 2], [4]]]
    assert Batcher(two, 12).plan(rows) == [[[3], [1]], [[0, 2, 4], []]]
    single = [row([1], [2]), row([1] * 2, [2], [3], [4])]  # lines are counted a response
    assert Batcher(world, 12).plan(single) == [[[1, 0]]]
    assert Batcher(world, 11).plan(single) == [[[1]], [[0]]]


@pytest.mark.parametrize("layout", [Batcher, PackedBatcher])
@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_name_their_rows_and_fill_empty_places(world, layout, ranks):
    """Each row is in one batch of one rank. All ranks have as many batches; fillers weigh 0."""
    rows = [row([1] * n, [2] * n, [3]) for n in (5, 1, 9, 4, 4, 2, 7)]
    found, counts = [], []
    for rank in range(ranks):
        batcher = list(layout(replace(world, rank=rank, size=ranks), 20).step(rows))
        counts.append(len(batcher))
        for batch in batcher:
            found += batch.rows
            assert batch.weights.sum().item() == len(batch.rows)
            lengths = [n for i in batch.rows for n in map(len, rows[i].responses)]
            assert batch.lengths.tolist() == (lengths or [1, 1])
    assert sorted(found) == list(range(7)) and len(set(counts)) == 1


@pytest.mark.parametrize("layout", [Batcher, PackedBatcher])
def test_all_batches_of_many_rows_are_planned_in_parts(world, layout, monkeypatch):
    monkeypatch.setattr("nanoalign.loop.PLANNED_ROWS", 4)
    rows = [row([1] * n, [2], [3]) for n in (5, 1, 9, 4, 4, 2, 7, 3, 8, 6)]
    found = [batch.rows for batch in layout(world, 10**6).all(rows)]
    assert sorted(sum(found, [])) == list(range(10)) and len(found) == 3
    # From the shortest four rows to the longest two.
    assert sorted(found[0]) == [1, 3, 5, 7] and sorted(found[2]) == [2, 8]


def test_rows_of_one_length_stay_in_order(world):
    """So that an evaluation adds them up in the same order wherever it runs."""
    rows = [row([1] * (1 + n % 2), [2], [3]) for n in range(100)]
    found = [batch.rows for batch in Batcher(world, 1).all(rows)]
    assert found == [[n] for n in (*range(1, 100, 2), *range(0, 100, 2))]


def test_rows_with_other_values_are_not_batched():
    """Without the check, values of later rows would be lost."""
    with_margin = replace(PAIR, name="other", extra={"margins": np.ones(1, np.float32)})
    with pytest.raises(RunError, match=r"other has the values \['margins'\], but row has \[\]"):
        collate([PAIR, with_margin])
    with pytest.raises(RunError, match=r"row has the values \[\], but other has \['margins'\]"):
        collate([with_margin, PAIR])
