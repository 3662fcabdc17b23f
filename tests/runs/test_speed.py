"""python -m pytest tests/runs/test_speed.py"""

import gc
import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama, write_pairs
from trainings import train

from nanoalign.model import Policy
from nanoalign.runs import speed
from nanoalign.runs.speed import Meter, flops_per_token

# Of a block of tiny_llama: q and o of 32 x 32, k and v of 16 x 32, three matrices of 48 x 32.
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)


def test_the_flops_of_a_token_by_hand():
    """6 a weight, as of Kaplan et al. 2020; a reference is one forward pass more."""
    policy = Policy(tiny_llama())
    assert flops_per_token(policy, reference=False) == 6 * WEIGHTS
    assert flops_per_token(policy, reference=True) == 8 * WEIGHTS
    policy.requires_grad_(False)  # as under adapters: no gradient of the weights
    assert flops_per_token(policy, reference=True) == 6 * WEIGHTS


def test_the_lines_of_steps_have_speed_and_memory(llama_folder, tmp_path):
    """But for the first step of a process; and no evaluation has them."""
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "run"
    train(llama_folder, pairs, out, "--stop_after", 2, steps=4)
    train(llama_folder, pairs, out, "--resume", steps=4)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps if "ms_per_step" in line] == [2, 4]
    assert not any(key in line for line in lines if "eval/loss" in line for key in speed.KEYS)
    for line in steps:
        assert 0.1 < line["memory_gb"] < 100 and "mfu" not in line and "tokens" not in line
    tokens = steps[1]["tokens_per_second"] * steps[1]["ms_per_step"] / 1000
    assert tokens == pytest.approx(round(tokens), rel=1e-9) and tokens > 7 * 4


@pytest.fixture
def gpus(world, monkeypatch):
    """The World of one of two H200, without one: their names and memory."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000_000)
    yield replace(world, size=2, device=torch.device("cuda", 1))
    gc.unfreeze()


PRECOMPUTED = {"reference": "x", "precompute_reference": True}


@pytest.mark.parametrize(("flags", "flops"), [({}, 6), ({"reference": None}, 8), (PRECOMPUTED, 6)])
def test_the_share_of_the_peak_by_hand(gpus, flags, flops):
    """Of two GPUs, in half a second: the first step, which compiles, has none."""
    meter = Meter(Policy(tiny_llama(), torch.bfloat16), Namespace(**flags), gpus)
    assert meter.measure(100, 9.0) == {"memory_gb": 5.0}
    assert meter.measure(1000, 0.5) == {
        "tokens_per_second": 2000.0,
        "ms_per_step": 500.0,
        "memory_gb": 5.0,
        "mfu": pytest.approx(2000 * flops * WEIGHTS / (2 * 989e12)),
    }


def test_no_share_is_given_where_the_peak_is_not_known(gpus, monkeypatch):
    """In float32; on another GPU."""
    meters = [Meter(Policy(tiny_llama(), torch.float32), Namespace(), gpus)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T1000")
    meters.append(Meter(Policy(tiny_llama(), torch.bfloat16), Namespace(), gpus))
    for meter in meters:
        meter.measure(100, 9.0)
        assert "mfu" not in meter.measure(100, 1.0)


def test_the_garbage_collector_has_nothing_to_do_after_the_first_step_on_a_gpu(gpus):
    """What it would look through in a later step, for most of a second, is set aside."""
    meter = Meter(Policy(tiny_llama(), torch.float32), Namespace(), gpus)
    assert gc.get_freeze_count() == 0
    meter.measure(100, 9.0)
    assert gc.get_freeze_count() > 10_000 > 10 * len(gc.get_objects())
    gc.unfreeze()
    meter.measure(100, 9.0)
    assert gc.get_freeze_count() == 0  # once
