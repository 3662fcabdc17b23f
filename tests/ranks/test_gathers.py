"""python -m pytest tests/ranks/test_gathers.py

Explicit prefetch of sharded blocks, symmetric memory, and the advice to have copies.
"""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import metrics_of, without_picture

from nanoalign.batch import Row, collate
from nanoalign.distributed import World, setup
from nanoalign.model import Policy
from nanoalign.ranks import gathers
from nanoalign.sharding import shard
from nanoalign.weights.slices import read_slices


def _train(argv: list[str], out: Path) -> None:
    """Trains twice: as it is, and without explicit prefetch."""
    without_picture([*argv, "--out", str(out / "prefetch")])
    gathers.prefetch = lambda model: None
    without_picture([*argv, "--out", str(out / "plain")])


def test_four_ranks_compute_the_same_with_and_without_prefetch(llama_folder, tmp_path):
    """Metrics and weights, bit for bit: an evaluation, the reference and micro-batches between."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    argv = ["--model", llama_folder, "--data", pairs, "--batch_size", 9, "--lr", 1e-2, "--template",
            "raw", "--steps", 4, "--eval_every", 2, "--micro_batch_tokens", 100]  # fmt: skip
    outcome = run_ranks(4, _train, [str(arg) for arg in argv], tmp_path)
    assert outcome.codes == [0] * 4, outcome.stderr
    assert (metrics := metrics_of(tmp_path / "prefetch")) == metrics_of(tmp_path / "plain")
    assert len(metrics) >= 4
    weights, others = (
        load_file(tmp_path / run / "model.safetensors") for run in ("prefetch", "plain")
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


class _Gathers(TorchDispatchMode):
    """Notes the collectives that gather, among the names of blocks that run."""

    def __init__(self, blocks: list[torch.nn.Module]):
        super().__init__()
        self.events = []
        for n, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, n=n: self.events.append(f"block {n}"))
            block.mlp.register_full_backward_hook(lambda *_, n=n: self.events.append(f"back {n}"))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "gather" in str(function):
            self.events.append("gather")
        return function(*args, **(kwargs or {}))


def _sharded(folder: Path) -> Policy:
    """A policy as one of the ranks has it."""
    policy = Policy.load(folder)
    shard(policy, policy.blocks(), setup(), torch.float32, True, (), policy.METHODS)
    return policy


def _events(folder: Path) -> list[tuple[list[str], list[str]]]:
    """The events of forward and backward, without and with explicit prefetch.

    Between the two a second pass without gradient runs, as that of LoRA's reference.
    """
    batch = collate([Row("row", np.arange(3), (np.arange(2), np.arange(3)))])
    found = []
    for set_prefetch in (lambda model: None, gathers.prefetch):
        set_prefetch(policy := _sharded(folder))
        with _Gathers(policy.blocks()) as seen:
            logps = policy(batch)
            forward = list(seen.events)
            with torch.no_grad():
                policy(batch)
            seen.events.clear()
            logps.sum().backward()
        found.append((forward, seen.events))
    return found


def test_a_block_is_gathered_before_the_one_ahead_of_it_runs(llama_folder):
    """In the backward pass FSDP2 does so by itself, also after a second pass without gradient."""
    outcome = run_ranks(2, _events, llama_folder)
    assert outcome.codes == [0, 0], outcome.stderr
    assert outcome.results[0] == outcome.results[1]
    plain, ahead = outcome.results[0]
    assert plain[0] == ["gather", "gather", "block 0", "gather", "block 1"]
    assert ahead[0] == ["gather", "gather", "gather", "block 0", "block 1"]
    assert plain[1] == ahead[1] == ["gather", "gather", "back 1", "back 0"]


def test_symmetric_memory_is_set_in_every_sharded_part(llama_folder, monkeypatch):
    """The policy itself and its two blocks; a plain model has none."""
    parts = []
    note = lambda part: parts.append(part)  # noqa: E731
    monkeypatch.setattr(FSDPModule, "set_symm_mem_for_comm", note, raising=False)
    policy = _sharded(llama_folder)
    read = gathers.reading(lambda *_: (None, lambda *_: None), Namespace(symmetric_memory=True))
    read()[1](policy, torch.device("cpu"))
    assert parts == [policy, *policy.blocks()]
    Policy.load(llama_folder, read=gathers.reading(read_slices, Namespace(symmetric_memory=True)))
    assert len(parts) == 3


def test_symmetric_memory_is_refused_where_it_can_not_be(monkeypatch):
    def refused(symmetric_memory: bool = True, shard_size: int | None = None) -> str | None:
        return gathers.refusal(Namespace(**locals()))

    monkeypatch.setattr(FSDPModule, "set_symm_mem_for_comm", None, raising=False)
    assert refused(False) is None
    assert "this host has none" in refused()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "gathers nothing" in refused()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert refused() is None and refused(shard_size=8) is None
    assert "gathers nothing" in refused(shard_size=1)
    monkeypatch.delattr(FSDPModule, "set_symm_mem_for_comm")
    assert "needs torch 2.13" in refused()


@pytest.mark.parametrize(
    "parameters, trained, memory, size, shard_size, takes",
    [
        (0.5e9, 0.5e9, 80e9, 8, None, "10 of 80 GB"),
        (3.2e9, 1e7, 141e9, 8, None, None),  # from 3B
        (2.0e9, 2.0e9, 80e9, 8, None, "40 of 80 GB"),
        (2.1e9, 2.1e9, 80e9, 8, None, None),  # more than half
        (2.1e9, 1e7, 80e9, 8, None, "9 of 80 GB"),  # LoRA
        (0.5e9, 0.5e9, 80e9, 1, None, None),  # one GPU
        (0.5e9, 0.5e9, 80e9, 16, None, None),  # two hosts of eight
        (0.5e9, 0.5e9, 80e9, 8, 8, None),  # chosen
    ],
)
def test_copies_are_advised_below_3b(
    monkeypatch, parameters, trained, memory, size, shard_size, takes
):
    """20 bytes a trained parameter, 4 a frozen one, in half of the GPU's memory."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(size, 8)))
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = SimpleNamespace(
        count_parameters=lambda trainable=False: trained if trainable else parameters
    )
    for kind in ("cuda", "cpu"):
        world = World(0, size, torch.device(kind, 0), mesh=None)
        advice = gathers.advice(model, world, Namespace(shard_size=shard_size))
        assert (takes in advice) if takes and kind == "cuda" else advice is None
