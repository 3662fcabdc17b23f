"""python -m pytest tests/packing/test_loss_scale.py"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from torch import nn
from trainings import losses, metrics_of, script, without_picture

from nanoalign.loop import Objective
from nanoalign.packing import loss_scale

pytest.importorskip("peft", reason="LoRA is trained through peft, which is not installed")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


def _scaled_run(first: float, argv: list[str]) -> None:
    loss_scale.FIRST, loss_scale.GROWTH = first, 3
    without_picture(argv)


@pytest.fixture(scope="module")
def train(pairs, llama_folder):
    """Runs train_dpo.main with LoRA: 4 steps of all pairs, in micro-batches of 800 tokens."""

    def run(out: Path, *flags: object, first: float = 2.0**16, ranks: int = 1) -> list[dict]:
        argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 25,
                "--lr", 3e-2, "--steps", 4, "--lora_rank", 4, "--micro_batch_tokens", 800,
                "--precision", "fp16", *flags]  # fmt: skip
        outcome = run_ranks(ranks, _scaled_run, first, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return metrics_of(out)

    return run


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> list[dict]:
    return train(tmp_path_factory.mktemp("runs") / "plain")


def scales(metrics: list[dict]) -> list[float]:
    return [line["loss_scale"] for line in metrics if "loss_scale" in line]


# --- whole runs


def test_the_curve_is_that_of_float32(train, plain, tmp_path):
    """float16 has 11 bits. The scale is in the log of each step, and doubles after the third."""
    exact = train(tmp_path / "run", "--precision", "fp32")
    assert losses(plain) == pytest.approx(losses(exact), rel=3e-3)
    norms = [[line["grad_norm"] for line in m if "grad_norm" in line] for m in (plain, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert plain[1]["rewards/margins"] == 0.0 and losses(plain)[-1] < 0.6
    assert scales(plain) == [2.0**16] * 3 + [2.0**17] and not scales(exact)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scale_that_overflows_is_halved_and_no_step_is_lost(train, plain, tmp_path, ranks):
    """From 2^24, where gradients are infinite. Batches that come twice do not change metrics."""
    metrics = train(tmp_path / "run", first=2.0**24, ranks=ranks)
    assert scales(metrics)[0] < 2.0**24
    assert losses(metrics) == pytest.approx(losses(plain), rel=3e-3)
    assert len(losses(metrics)) == len(losses(plain))


def test_the_scale_is_resumed(train, tmp_path):
    """Step 3 has the scale that was found in step 1, not the first one."""
    whole = train(tmp_path / "whole", first=2.0**22)
    assert scales(whole)[0] < 2.0**22
    train(tmp_path / "run", "--stop_after", 2, first=2.0**22)
    assert train(tmp_path / "run", "--resume", first=2.0**22) == whole


def test_a_loss_that_is_not_finite_ends_the_run(pairs, llama_folder, tmp_path):
    """Whatever the scale: one line says so, and no step is taken."""
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--lr", 1e15,
            "--eval_share", 0, "--steps", 2, "--lora_rank", 4, "--precision", "fp16"]  # fmt: skip
    outcome = run_ranks(1, script, [str(arg) for arg in argv])
    assert outcome.codes == [1]
    assert "step 2 was not taken" in outcome.stderr and "is nan" in outcome.stderr


# --- gradients


class Toy(nn.Module):
    """One weight w, whose gradient is made in float16."""

    dtype = torch.float16

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def loss(self, slope: float) -> torch.Tensor:
        return (slope * self.w.half().float())[None]


def gradient(slope: float, is_scaled: bool) -> tuple[float, int]:
    """(the gradient of a step of two micro-batches with this slope, how many were computed)"""
    toy, count = Toy(), 0
    batcher = SimpleNamespace(
        step=lambda rows: iter([SimpleNamespace(weights=torch.ones(1)) for _ in range(2)])
    )
    if is_scaled:
        batcher = loss_scale.scaled(batcher, toy, Objective(toy.loss))
    for batch in batcher.step([]):
        (toy.loss(slope) * batch.weights).sum().backward()
        count += 1
    return toy.w.grad.item(), count


@pytest.mark.parametrize(("slope", "attempts"), [(1e-9, 1), (1.0, 2), (6e4, 17), (7e4, 17)])
def test_small_gradients_are_not_lost_and_large_ones_do_not_overflow(slope, attempts):
    """A slope of 1 times 2^16 is above 65,504, and 6e4 has room with a scale of 1 alone."""
    found, count = gradient(slope, is_scaled=True)
    assert found == pytest.approx(2 * slope if slope < 65504 else math.inf, rel=1e-3)
    assert count == 2 * attempts
    assert gradient(1e-9, is_scaled=False) == (0.0, 2)


def test_other_precisions_are_left_alone():
    batcher = object()
    for dtype in (torch.float32, torch.bfloat16):
        assert loss_scale.scaled(batcher, SimpleNamespace(dtype=dtype), None) is batcher
