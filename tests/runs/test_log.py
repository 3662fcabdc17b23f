"""python -m pytest tests/runs/test_log.py"""

import re
import sys
from argparse import Namespace

import pytest

import train_dpo
from nanoalign import distributed
from nanoalign.data.split import Data
from nanoalign.distributed import setup
from nanoalign.runs import log


def show(world, start: int = 0, steps: int = 3) -> None:
    """Some steps of a run of 3 on 24 records, 8 a step."""
    args = train_dpo.parse_args(["--steps", "3", "--batch_size", "8", "--out", "run"])
    data, meter = Data(range(24), [], {}, "raw", None), Namespace(measure=lambda *step: {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "record_arrays", lambda *args: {})
        with log.open_run(args, world, data, "", start, meter) as write:
            for step in range(start + 1, start + steps + 1):
                write(step, {"loss": 7.0, "lr": 1.0, "tokens": 9, "seconds": 0.5})
                write(step, {"eval/loss": 9.0})


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_gets_a_line_when_the_time_is_up(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "LINE_SECONDS", 0.0)
    show(setup())
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert "\r" not in shown and "0/24 [" in lines[0]
    found = [line.partition(":")[0] for line in lines if line.startswith("step")]
    assert list(dict.fromkeys(found)) == ["step 1/3", "step 2/3", "step 3/3"]
    assert "24/24 [" in lines[-1] and "loss=7.000" in lines[-1]
    assert re.search(r"[\d.]+record/s", lines[-1])


def test_a_short_run_writes_nothing_to_a_file(capsys):
    """So an error is the only line, too."""
    show(setup())
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_changes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show(setup())
    shown = capsys.readouterr().err
    assert shown.count("\r") >= 2 and shown.count("\n") == 1 and "24/24 [" in shown


def test_a_run_that_continues_begins_at_its_step(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "LINE_SECONDS", 0.0)
    show(setup(), start=2, steps=1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "16/24 [" in first and "24/24 [" in last and last.startswith("step 3/3")
