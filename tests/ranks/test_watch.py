"""python -m pytest tests/ranks/test_watch.py

A rank that hangs is noticed and named; one that was killed is started again by torchrun.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import write_pairs
from processes import run_ranks
from trainings import metrics_of, script

from nanoalign import loop
from nanoalign.distributed import World
from nanoalign.ranks import watch
from nanoalign.ranks.report import REPORTED
from nanoalign.ranks.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
# A script as torchrun starts it: rank 1 of the first attempt is killed while it is in step 4.
KILLED = """
import os, signal, sys
import train_dpo
from nanoalign import loop
from nanoalign.distributed import run
from nanoalign.ranks.report import report

killed = []

def before_step(self, rows, batches, real=loop.Objective.before_step):
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
        killed.append(1)
        if len(killed) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    real(self, rows, batches)

loop.Objective.before_step = before_step
train_dpo.result.finish = lambda *args: None
run(train_dpo.main, report)
"""


@pytest.fixture
def flags(llama_folder, tmp_path) -> list[str]:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    words = ["--model", llama_folder, "--data", data, "--template", "raw", "--steps", 6,
             "--batch_size", 4, "--lr", 1e-3, "--eval_share", 0, "--save_every", 1]  # fmt: skip
    return [str(word) for word in words]


def test_the_limit_is_known_after_some_steps():
    guard = Watch(type("World", (), {"size": 1, "rank": 0}))
    assert guard.limit() == float("inf")
    guard.seconds.extend([1.0, 1.0])
    assert guard.limit() == float("inf")
    guard.seconds.append(90.0)  # the median is not the mean
    assert guard.limit() == watch.LEAST == 120
    guard.seconds.extend([10.0] * 9)
    assert guard.limit() == 20 * 10


def _hang(argv: list[str], how: str) -> None:
    """Rank 1 sleeps, or is stopped, in its step 5."""
    watch.LEAST, watch.STEPS, watch.ANSWER_SECONDS = 2.0, 0, 1.0
    steps = []

    def sleep_for_ever() -> None:
        time.sleep(1000)

    def before_step(self, rows, batches) -> None:
        steps.append(len(rows))
        if os.environ["RANK"] == "1" and len(steps) == 6:  # once by the check of the start
            if how == "stopped":  # until it is killed
                subprocess.Popen(["sh", "-c", f"sleep 9; kill -9 {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            sleep_for_ever()

    loop.Objective.before_step = before_step
    script(argv)


@pytest.mark.parametrize("how", ["sleeping", "stopped"])
def test_a_rank_that_hangs_is_named(flags, tmp_path, how):
    """In seconds where --timeout is 600; rank 0, which waits for it, says where it is itself."""
    outcome = run_ranks(2, _hang, [*flags, "--out", str(tmp_path / "run")], how, timeout=60)
    assert outcome.codes == [1, 1 if how == "sleeping" else -signal.SIGKILL]
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    named = "rank 1 does not answer" if how == "stopped" else "(sleep_for_ever)"
    assert named in line and "rank 0 is at" in line and "--resume" in line


def test_an_alarm_after_a_stay_in_a_debugger_asks_anew(monkeypatch, capsys):
    """Two alarms find a debugger; then rank 1 is stopped, and the third alarm ends the run.

    Until then nothing counts as reported: an error that a rank meets is still printed.
    """
    store, exits, place = dist.HashStore(), [], ["pdb.py:7 (interaction)"]
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(watch, "store_of_ranks", lambda: store)
    monkeypatch.setattr(watch, "place_of_main_thread", lambda: place[0])
    monkeypatch.setattr(os, "_exit", exits.append)
    guards = [Watch(World(rank, 2, None, None)) for rank in range(2)]

    def alarm(*ranks: int) -> str:
        for guard in guards:
            guard.began = 1.0
            guard.seconds.append(2.0)
        threads = [threading.Thread(target=guards[rank].stop, args=(1.0,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return capsys.readouterr().err

    for _ in range(2):
        assert alarm(0, 1) == "" and exits == [] and not store.check([REPORTED])
    place[0] = "loop.py:9 (train)"
    assert "rank 1 does not answer; rank 0 is at loop.py:9 (train)" in alarm(0)
    assert exits == [1] and store.check([REPORTED])


def test_torchrun_starts_ranks_again_after_a_kill(flags, tmp_path):
    """With --resume, from the newest checkpoint; the result is that of an undisturbed run."""
    (tmp_path / "killed.py").write_text(KILLED)
    out = {name: tmp_path / name for name in ("whole", "run")}
    run_ranks(2, script, [*flags, "--out", str(out["whole"])])
    run_ranks(2, script, [*flags, "--out", str(out["run"]), "--stop_after", "2"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", "--max-restarts", "3", str(tmp_path / "killed.py")]  # fmt: skip
    done = subprocess.run(
        [*command, *flags, "--out", str(out["run"]), "--resume"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exitcode: -9" in done.stderr and "connectFullMesh" not in done.stderr
    assert metrics_of(out["run"]) == metrics_of(out["whole"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in out.values()]
    assert weights[0] == weights[1]
