"""python -m pytest tests/runs/test_signals.py

A run that gets a signal is that of a run without one, bit for bit, when it is continued.
"""

import os
import signal
import sys
import time

import pytest
from processes import run_ranks
from trainings import metrics_of, script, train

from nanoalign import loop
from nanoalign.distributed import environment_ranks, run
from nanoalign.ranks.report import report
from nanoalign.runs.guards import ONE_EVENT, SIGNALS, Signals


def _with_signals(numbers: list[int], rank: int, argv: list[str], pause: float = 0) -> None:
    """train_dpo.py; in the third step one rank gets the signals."""
    get_lr = loop.get_lr

    def get_lr_after_signals(step: int, *rest: object) -> float:
        if step == 2 and environment_ranks()[0] == rank:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause)
        return get_lr(step, *rest)

    loop.get_lr = get_lr_after_signals
    script(argv)


@pytest.fixture(scope="module")
def whole(llama_folder, pairs, tmp_path_factory):
    """Runs without a signal, by their ranks: (metrics, weights)."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("whole") / str(ranks)
        lines = train(llama_folder, pairs, out, ranks=ranks, steps=5)
        found[ranks] = lines, (out / "model.safetensors").read_bytes()
    return found


@pytest.mark.parametrize(
    ("ranks", "rank", "numbers"),
    [(1, 0, [signal.SIGTERM]), (1, 0, [signal.SIGUSR1]), (2, 1, [signal.SIGHUP]),
     (2, 0, [signal.SIGINT, signal.SIGTERM])],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    llama_folder, pairs, whole, tmp_path, ranks, rank, numbers
):
    """One rank gets it, and all stop behind the same step. torchrun sends SIGTERM after Ctrl-C."""
    out = tmp_path / "run"
    argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr",
            1e-2, "--template", "raw", "--steps", 5]  # fmt: skip
    outcome = run_ranks(ranks, _with_signals, numbers, rank, [str(word) for word in argv])
    assert outcome.codes == [128 + numbers[0]] * ranks, outcome.stderr
    (line,) = outcome.stderr.splitlines()
    start = "torchrun --nproc_per_node 2" if ranks == 2 else "python"
    name = signal.Signals(numbers[0]).name
    assert line.startswith(f"{name}: stopped after step 3; continue it: {start} train_dpo.py --mod")
    assert line.endswith("--steps 5 --resume")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000003"]
    lines, weights = whole[ranks]
    assert train(llama_folder, pairs, out, "--resume", ranks=ranks, steps=5) == lines
    assert (out / "model.safetensors").read_bytes() == weights


def test_the_same_signal_again_ends_the_process(llama_folder, pairs, tmp_path):
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--batch_size", 7]
    numbers = [signal.SIGTERM, signal.SIGTERM]
    argv = [str(word) for word in argv]
    outcome = run_ranks(1, _with_signals, numbers, 0, argv, ONE_EVENT + 0.1)
    assert outcome.codes == [-signal.SIGTERM]
    assert not (tmp_path / "run" / "checkpoints").exists()
    # Within a second they are one event: Linux sends as many as a torchrun that dies has threads.
    outcome = run_ranks(1, _with_signals, numbers * 3, 0, [*argv, "--overwrite"])
    assert outcome.codes == [128 + signal.SIGTERM]
    assert (tmp_path / "run" / "checkpoints" / "step_000003").exists()


def test_a_signal_at_the_last_step_changes_nothing(llama_folder, pairs, tmp_path):
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--batch_size", 7,
            "--steps", 3]  # fmt: skip
    outcome = run_ranks(1, _with_signals, [signal.SIGTERM], 0, [str(word) for word in argv])
    assert outcome.codes == [0] and (tmp_path / "run" / "model.safetensors").exists()
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3


def test_handlers_are_those_of_before_when_training_ends():
    before = [signal.getsignal(number) for number in SIGNALS]
    signals = Signals()
    with signals:
        assert signal.getsignal(signal.SIGTERM) == signals.handle
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _interrupted() -> None:
    def main() -> None:
        raise KeyboardInterrupt

    sys.argv = ["train_dpo.py"]
    run(main, report)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_outside_of_training_is_one_line(ranks):
    outcome = run_ranks(ranks, _interrupted)
    assert outcome.codes == [130] * ranks
    assert outcome.stderr == "\ninterrupted\n"
