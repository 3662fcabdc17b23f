"""python -m pytest tests/ranks/test_watch.py

A rank that hangs is noticed and named; one that was killed is started again by torchrun.
"""

import os
import signal
import subprocess
import threading
import time
from threading import current_thread

import pytest
import torch.distributed as dist
from conftest import write_pairs
from processes import run_ranks, torchrun
from trainings import metrics_of, script

from nanoalign import loop
from nanoalign.distributed import World
from nanoalign.ranks import groups, report, watch
from nanoalign.ranks.report import REPORTED
from nanoalign.ranks.watch import Watch

# A script as torchrun starts it: one of the ranks is killed, once, while it is in step 4.
KILLED = """
import os, signal, sys
import train_dpo
from nanoalign import loop
from nanoalign.distributed import run
from nanoalign.ranks.report import report

steps = []

def before_step(self, rows, batches, real=loop.Objective.before_step):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 2 and not os.path.exists("was_killed"):
        open("was_killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, rows, batches)

loop.Objective.before_step = before_step
os.sched_getaffinity = lambda pid: {0}  # one thread, also where a host has one rank
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


def test_ranks_of_an_attempt_meet_apart_from_those_before_them(monkeypatch):
    """In whatever order they come. What the ranks of an earlier attempt have asked for is there."""
    torchruns, ranks = dist.HashStore(), 3
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(torchruns, 0, 3)]))
    monkeypatch.setattr(groups, "environment_ranks", lambda: (int(current_thread().name), 3, 0))
    torchruns.set("nanoalign/asks/1", "a rank that was killed before it met rank 0")
    for attempt, order in enumerate(((0, 1, 2), (2, 1, 0), (1, 0, 2))):
        found: dict[int, dist.Store] = {}

        def come(attempt: int = attempt, found: dict = found) -> None:
            rank = int(current_thread().name)
            found[rank] = groups.meet(30.0)
            assert not found[rank].check([f"address of {rank}"])
            found[rank].set(f"address of {rank}", f"{attempt}")

        threads = [threading.Thread(target=come, name=str(rank)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        addresses = {found[rank].get(f"address of {of}") for rank in found for of in range(ranks)}
        assert len(found) == ranks and addresses == {str(attempt).encode()}


def test_a_rank_that_never_comes_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", lambda *a, **k: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(groups, "environment_ranks", lambda: (0, 2, 0))
    with pytest.raises(RuntimeError, match="(?i)time") as caught:
        groups.meet(0.1)
    assert report._is_lost_connection(caught.value)


def _on_one_thread(argv: list[str]) -> None:
    os.sched_getaffinity = lambda pid: {0}
    script(argv)


def test_two_torchruns_start_ranks_again_after_a_kill(flags, tmp_path):
    """As on two hosts, of which one loses a rank: the result is that of an undisturbed run.

    The torchrun of the other one does not count what it does as a restart.
    """
    (tmp_path / "killed.py").write_text(KILLED)
    out = {name: tmp_path / name for name in ("whole", "run")}
    run_ranks(2, _on_one_thread, [*flags, "--out", str(out["whole"])])
    run_ranks(2, _on_one_thread, [*flags, "--out", str(out["run"]), "--stop_after", "2"])
    argv = ["killed.py", *flags, "--out", str(out["run"]), "--resume"]
    outcome = torchrun(2, argv, tmp_path)
    assert outcome.codes == [0, 0], outcome.stderr[-2000:]
    assert "exitcode: -9" in outcome.stderr and "connectFullMesh" not in outcome.stderr
    assert metrics_of(out["run"]) == metrics_of(out["whole"])
    weights = [(folder / "model.safetensors").read_bytes() for folder in out.values()]
    assert weights[0] == weights[1]
