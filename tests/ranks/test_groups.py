"""python -m pytest tests/ranks/test_groups.py

Groups of ranks that each have a copy of the model: the same run, with fewer collectives.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import metrics_of, without_picture

from nanoalign.batch import Row
from nanoalign.loop import Batcher
from nanoalign.ranks.groups import SyncedBatcher

STEPS = 6


class _Collectives(TorchDispatchMode):
    """Counts the collectives of this rank by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = "reduce_scatter" if "reduce_scatter" in str(function) else str(function)
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _train(argv: list[str]) -> Counter:
    with _Collectives() as collectives:
        without_picture(argv)
    return collectives.counts


@pytest.fixture(scope="module")
def train(llama_folder, pairs):
    """Runs train_dpo.py; returns its metrics, and the collectives of each rank."""

    def run(out: Path, *flags: object, ranks: int = 1) -> tuple[list[dict], list[Counter]]:
        argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7,
                "--lr", 1e-2, "--template", "raw", "--steps", STEPS,
                "--micro_batch_tokens", 100, *flags]  # fmt: skip
        outcome = run_ranks(ranks, _train, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return metrics_of(out), outcome.results

    return run


@pytest.fixture(scope="module")
def flat(train, tmp_path_factory) -> tuple[list[dict], list[Counter], Path]:
    """Four ranks that share one copy of the parameters."""
    out = tmp_path_factory.mktemp("runs") / "flat"
    return *train(out, ranks=4), out


def assert_same_run(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "grad_norm", "eval/loss"):
            assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-5), key


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "flags", ["--shard_size 1", "--gradient_sync step", "--shard_size 2 --gradient_sync step"]
)
def test_groups_and_sums_once_a_step_give_the_same_run(train, flat, tmp_path, flags):
    metrics, _ = train(tmp_path / "run", *flags.split(), ranks=4)
    assert_same_run(metrics, flat[0])
    assert_same_weights(tmp_path / "run", flat[2])


@pytest.mark.parametrize("before, after", [((4, 2), (2, 2)), ((2, 2), (4, 2))])
def test_resume_on_other_groups(train, flat, tmp_path, before, after):
    """(ranks, ranks of a group) of the run that stops, and of the one that continues it."""
    for (ranks, group), flag in ((before, ("--stop_after", 3)), (after, ("--resume",))):
        metrics, _ = train(tmp_path / "run", "--shard_size", group, *flag, ranks=ranks)
    assert_same_run(metrics, flat[0])
    assert_same_weights(tmp_path / "run", flat[2])


def test_a_reference_that_moves_in_groups(train, tmp_path):
    """TR-DPO mixes shards of both models where they lie."""
    flags = ("--sync_reference_every", 2)
    expected, _ = train(tmp_path / "one", *flags)
    assert_same_run(train(tmp_path / "run", *flags, "--shard_size", 2, ranks=4)[0], expected)


def test_the_flags_save_collectives(train, flat, tmp_path):
    """The model is sharded in 3 parts: two blocks, and the rest."""
    grouped = train(tmp_path / "a", "--shard_size", 2, ranks=4)[1]
    once = train(tmp_path / "b", "--gradient_sync", "step", ranks=4)[1]
    sums = "c10d.allreduce_.default"
    for rank in range(4):
        # In each micro-batch, mostly two a step.
        assert flat[1][rank]["reduce_scatter"] > 1.5 * 3 * STEPS
        assert once[rank]["reduce_scatter"] == 3 * STEPS  # once a step
        # Within groups in each micro-batch, too; between groups once a step.
        assert grouped[rank]["reduce_scatter"] == flat[1][rank]["reduce_scatter"]
        assert grouped[rank][sums] - flat[1][rank][sums] == 3 * STEPS


class _Flags:
    """Stands for a sharded model: what its next backward pass would do."""

    def set_requires_gradient_sync(self, value: bool) -> None:
        self.sums = value

    def set_requires_all_reduce(self, value: bool) -> None:
        self.sums_of_groups = value


def test_the_last_batch_of_a_step_sums_though_others_were_made_before(world):
    """The first batch is made in the step before, and an objective reads batches of its own."""
    rows = [Row("row", np.array([1]), (np.array([1]),) * 2)] * 6
    batcher = SyncedBatcher(Batcher(world, 8), model := _Flags(), "step")
    made = batcher.step(rows)
    for rows_of_objective in (rows[:1], rows[:4]):
        list(batcher.step(rows_of_objective))
    assert [(model.sums, model.sums_of_groups) for _ in made] == [(False,) * 2] * 2 + [(True,) * 2]
