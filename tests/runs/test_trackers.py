"""python -m pytest tests/runs/test_trackers.py"""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_pairs
from trainings import losses, metrics_of, train

import train_dpo
from nanoalign.errors import RunError
from nanoalign.runs import trackers

LINES = [
    {"step": 0, "eval/loss": 0.75},
    {"step": 1, "loss": 0.5, "lr": 0.25},
    {"step": 2, "loss": 0.375, "lr": 0.125},
    {"step": 2, "eval/loss": 0.25},
]


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "dpo"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"beta": 0.1, "model": "tiny"}))
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')  # as if killed while writing
    return folder


def fake_program(monkeypatch, name: str, log: Callable) -> list:
    """Puts a program with the functions of wandb in its place; returns what it is called with."""
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda metrics, step: log(metrics, step) or calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
        __spec__=ModuleSpec(name, None),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    return calls


def test_tensorboard_has_the_lines_of_the_run(run, capsys):
    """Read by TensorBoard itself. A run that is sent again is there once."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        trackers.main([str(run), "--track", "tensorboard"])
    assert capsys.readouterr().out.count("4 lines of ") == 2
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = {
        key: [(each.step, each.value) for each in found.Scalars(key)]
        for key in found.Tags()["scalars"]
    }
    assert scalars == {
        "loss": [(1, 0.5), (2, 0.375)], "lr": [(1, 0.25), (2, 0.125)],
        "eval/loss": [(0, 0.75), (2, 0.25)],
    }  # fmt: skip
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    (text,) = found.Tensors("args/text_summary")
    assert b'"beta": 0.1' in text.tensor_proto.string_val[0]


def test_a_finished_run_is_sent_to_wandb(run, monkeypatch):
    calls = fake_program(monkeypatch, "wandb", lambda *line: None)
    trackers.main([str(run), "--track", "wandb", "--project", "p"])
    settings = {"beta": 0.1, "model": "tiny"}
    assert calls == [
        {"project": "p", "name": "dpo", "config": settings, "dir": str(run)},
        *((line["step"], {k: v for k, v in line.items() if k != "step"}) for line in LINES),
        "finish",
    ]


def test_what_is_missing_is_one_error(tmp_path):
    with pytest.raises(RunError, match="no args.json; give the folder of a run"):
        trackers.main([str(tmp_path), "--track", "tensorboard"])
    if find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    with pytest.raises(RunError, match="--track trackio needs a package: pip install trackio"):
        train_dpo.parse_args(["--track", "trackio"])


# --- while it trains


def test_a_run_is_in_tensorboard_while_it_trains(llama_folder, tmp_path):
    """Also what a run has from before it was stopped: every line of metrics.jsonl, once."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 25), tmp_path / "run"
    flags = ["--track", "tensorboard", "--eval_share", 0.3]
    train(llama_folder, pairs, out, *flags, "--stop_after", 2, steps=4)
    train(llama_folder, pairs, out, *flags, "--resume", steps=4)
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    for key in ("loss", "eval/loss", "grad_norm"):
        expected = [(x["step"], pytest.approx(x[key])) for x in metrics_of(out) if key in x]
        assert [(each.step, each.value) for each in found.Scalars(key)] == expected
    assert len(expected) == 4


def test_a_tracker_that_fails_does_not_end_the_run(llama_folder, tmp_path, monkeypatch, capsys):
    def log(metrics, step):
        if step == 1:
            raise ConnectionError("no network")

    calls = fake_program(monkeypatch, "wandb", log)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--steps", 4,
            "--batch_size", 7, "--template", "raw", "--track", "wandb"]  # fmt: skip
    train_dpo.main([str(word) for word in argv])
    printed = capsys.readouterr().out
    assert printed.count("wandb failed: ConnectionError: no network; the run goes on") == 1
    assert [call[0] for call in calls[1:]] == [0]  # the evaluation before the first step
    assert losses(metrics_of(tmp_path / "run"))[3] > 0
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "line", ["3", "{}", '{"step": "x"}', '{"step": 1, "loss": []}', "[" * 9999]
)
def test_a_damaged_line_is_named(run, line):
    (run / "metrics.jsonl").write_text(f"{json.dumps(LINES[0])}\n{line}\n")
    with pytest.raises(RunError, match="metrics.jsonl:2: no line of a run's metrics"):
        list(trackers.lines_of(run))
