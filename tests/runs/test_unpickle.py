"""python -m pytest tests/runs/test_unpickle.py

A checkpoint from elsewhere runs no code: whole runs that resume from one, and its files alone.
"""

import functools
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from torch.distributed import checkpoint as dcp
from trainings import script, train

from nanoalign.files import checksums
from nanoalign.runs.unpickle import Planner, Reader


class Call:
    """An object whose pickle is a call."""

    def __init__(self, function: Callable, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def dotted(module: str, name: str, argument: object) -> bytes:
    """The pickle of a call of what a module has under a name with dots."""
    push = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    value = pickle.dumps(argument, protocol=4)[11:-1]  # without its frame and its end
    return b"\x80\x04" + push[0] + push[1] + b"\x93" + value + b"\x85R."


def calls(ran: Path) -> dict[str, bytes]:
    """What a pickle asks for -> the pickle, which would make the folder `ran`."""
    mkdir = Call(os.mkdir, str(ran))
    inner = ran.with_name("inner.pt")
    torch.save(mkdir, inner)
    load = functools.partial(torch.load, weights_only=False)
    checkpoint = "torch.distributed.checkpoint"
    return {
        "posix.mkdir": pickle.dumps(mkdir),
        "posix.system": pickle.dumps(Call(os.system, f"mkdir {ran}"), protocol=0),
        "builtins.eval": pickle.dumps(Call(eval, f"__import__('os').mkdir('{ran}')")),
        "functools.partial": pickle.dumps(Call(load, str(inner))),
        f"{checkpoint}.metadata.os.mkdir": dotted(f"{checkpoint}.metadata", "os.mkdir", str(ran)),
        f"{checkpoint}.filesystem.pickle.loads": dotted(
            f"{checkpoint}.filesystem", "pickle.loads", pickle.dumps(mkdir)
        ),
    }


# --- whole runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 12)


@pytest.fixture(scope="module")
def stopped(llama_folder, pairs, tmp_path_factory) -> Path:
    """A run that ended after step 1 of 2."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    train(llama_folder, pairs, out, "--stop_after", 1, steps=2)
    return out


def spoil_metadata(path: Path, ran: Path) -> None:
    (path / ".metadata").write_bytes(calls(ran)["posix.system"])


def spoil_objects(path: Path, ran: Path) -> None:
    """The learning rate of the optimizer becomes an object that makes a folder when it is read."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    torch.save(Call(os.mkdir, str(ran)), path / "own.distcp")
    place = next(key for key in metadata.storage_data if key.fqn == "optimizer.param_groups.0.lr")
    stored = metadata.storage_data[place]
    stored.relative_path, stored.offset = "own.distcp", 0
    stored.length = (path / "own.distcp").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_metadata, "its .metadata names posix.system"),
        (spoil_objects, "one of its .distcp files names posix.mkdir"),
    ],
)
def test_a_run_from_elsewhere_runs_no_code(llama_folder, pairs, stopped, tmp_path, spoil, problem):
    """Whoever made it has written its checksums: they are no protection from people."""
    out, ran = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "ran"
    path = out / "checkpoints" / "step_000001"
    spoil(path, ran)
    files = [each for each in path.iterdir() if each.name != checksums.NAME]
    checksums.write(path, checksums.checksums(files))
    argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
            "--template", "raw", "--steps", 2, "--resume"]  # fmt: skip
    outcome = run_ranks(1, script, [str(arg) for arg in argv])
    assert outcome.codes == [1] and not ran.exists()
    (error,) = outcome.stderr.splitlines()
    assert error.startswith(
        f"error: the checkpoint {path} can't be read: UnpicklingError: {problem}, which is not "
        "part of a checkpoint and was not run; remove it "
    )


# --- the files alone


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small checkpoint: a tensor of each type that runs hold, and values that are no tensors."""
    optimizer = {"lr": 0.5, "betas": (0.9, 0.999), "foreach": None, "params": ["a", "b"]}
    dcp.save({"model": tensors(), "optimizer": optimizer}, checkpoint_id=tmp_path / "saved")
    return tmp_path / "saved"


def tensors() -> dict[str, torch.Tensor]:
    types = torch.float32, torch.bfloat16, torch.int64, torch.bool
    return {str(dtype): torch.ones(2, 3).to(dtype) for dtype in types}


def load(path: Path, state: dict) -> dict:
    dcp.load(state, storage_reader=Reader(path), planner=Planner())
    return state


def test_a_checkpoint_is_read_as_torch_reads_it(saved):
    """The metadata is equal in all fields; so are tensors and objects."""
    ours, theirs = Reader(saved).read_metadata(), dcp.FileSystemReader(saved).read_metadata()
    theirs.storage_meta.load_id = None
    assert ours == theirs and len(ours.state_dict_metadata) == 8
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    objects = {"lr": 0.0, "betas": (0.0, 0.0), "foreach": True, "params": ["x", "x"]}
    state = load(saved, {"model": zeros, "optimizer": objects})
    assert all(torch.equal(state["model"][name], value) for name, value in tensors().items())
    assert state["optimizer"] == {
        "lr": 0.5, "betas": (0.9, 0.999), "foreach": None, "params": ["a", "b"],
    }  # fmt: skip


def test_metadata_names_data_alone(saved, tmp_path):
    """Whatever the pickle: of any protocol, nested, or by what a module of torch imports."""
    ran = tmp_path / "ran"
    for name, hostile in calls(ran).items():
        with suppress(TypeError):  # of what the call returns
            pickle.loads(hostile)
        assert ran.exists()  # the pickle is hostile
        ran.rmdir()
        (saved / ".metadata").write_bytes(hostile)
        with pytest.raises(UnpicklingError, match=f"^its .metadata names {re.escape(name)}, which"):
            Reader(saved).read_metadata()
        assert not ran.exists()


@pytest.mark.parametrize("kind", ["object", "tensor"])
def test_neither_objects_nor_tensors_run_code(tmp_path, kind):
    """Also where .metadata has an object under the name of a tensor."""
    ran = tmp_path / "ran"
    dcp.save({"w": Call(os.mkdir, str(ran))}, checkpoint_id=tmp_path / "saved")
    with pytest.raises(dcp.api.CheckpointException, match="names posix.mkdir, which is not part"):
        load(tmp_path / "saved", {"w": 0.5 if kind == "object" else torch.zeros(2)})
    assert not ran.exists()


def test_damaged_metadata_raise_one_kind_of_error(saved):
    """300 draws of three bytes that are overwritten, and of an end that is missing."""
    whole, draw, refused = (saved / ".metadata").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (saved / ".metadata").write_bytes(damaged[: draw.randrange(len(damaged) + 1)])
        with suppress(EOFError, UnpicklingError):
            refused += 1
            Reader(saved).read_metadata()
            refused -= 1
    assert refused > 150


def test_a_damaged_shard_is_not_advised_to_be_loaded_all_the_same(saved):
    shard = next(saved.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(dcp.api.CheckpointException) as caught:
        load(saved, {"model": tensors()})
    assert "one of its .distcp files is damaged" in str(caught.value)
    assert "weights_only" not in str([error for error, _ in caught.value.failures.values()])
