"""python -m pytest tests/files/test_lock.py"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trainings
from conftest import write_pairs
from processes import run_ranks

from nanoalign.errors import RunError
from nanoalign.files import lock

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from nanoalign.files.lock import hold
hold(Path({path!r}), "--out run")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock."""
    code = HOLDER.format(root=str(ROOT), path=str(tmp_path / ".lock"))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_process_holds_a_lock_until_it_dies(tmp_path, holder):
    with pytest.raises(RunError) as error:
        lock.hold(tmp_path / ".lock", "--out run")
    assert str(error.value).startswith(f"--out run is being written by process {holder.pid} on ")
    assert str(error.value).endswith("; wait until it has ended, or give another --out")
    holder.kill()
    holder.wait()
    lock.hold(tmp_path / ".lock", "--out run")
    lock.hold(tmp_path / ".lock", "--out run")  # its own
    assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_a_path_of_another_name_is_the_same_lock(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="--out link is being written by process"):
        lock.hold(tmp_path / "link" / ".lock", "--out link")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(file: int, flags: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    code = errno.ENOLCK
    lock.hold(tmp_path / ".lock", "--out run")
    assert f"none: {tmp_path} has no file locks" in capsys.readouterr().out
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        lock.hold(tmp_path / ".lock", "--out run")


def test_two_runs_into_one_folder(llama_folder, tmp_path):
    """The second one ends with one line, and changes nothing: the first one ends as if alone."""
    pairs, argv = write_pairs(tmp_path / "pairs.jsonl", 25), {}
    for name in ("alone", "run"):
        argv[name] = ["--model", llama_folder, "--data", pairs, "--batch_size", "7", "--lr", "1e-2",
                      "--template", "raw", "--steps", "40", "--out", tmp_path / name]  # fmt: skip
        argv[name] = [str(word) for word in argv[name]]
    first = subprocess.Popen([sys.executable, ROOT / "train_dpo.py", *argv["run"]],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    for flags in ([], ["--overwrite"]):
        second = run_ranks(1, trainings.script, [*argv["run"], *flags])
        assert second.codes == [1]
        assert "--out " in second.stderr and len(second.stderr.splitlines()) == 1
    assert f" is being written by process {first.pid} on " in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait(100) == 0, first.stderr.read()
    assert run_ranks(1, trainings.without_picture, argv["alone"]).codes == [0]
    assert trainings.metrics_of(tmp_path / "run") == trainings.metrics_of(tmp_path / "alone")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["out"] == str(tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_ranks_end_when_torchrun_is_killed(llama_folder, tmp_path):
    """With a checkpoint, from which a run continues that finds the folder free."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--batch_size", 7,
            "--lr", 1e-2, "--template", "raw", "--steps", 100_000]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               ROOT / "train_dpo.py", *argv]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:
        try:
            lock.hold(tmp_path / "run" / ".lock", "--out run")
            break
        except RunError:
            time.sleep(0.05)
    lines = metrics.read_text()
    assert "SIGTERM: stopped after step " in (tmp_path / "log").read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    time.sleep(0.5)
    assert metrics.read_text() == lines  # nobody writes any more
    step = json.loads(lines.splitlines()[-1])["step"]
    assert checkpoint.name == f"step_{step:06d}"
