"""python -m pytest tests/runs/test_trackers.py"""

import json
import sys
import threading
import time
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
    write(folder, LINES)
    return folder


def write(folder: Path, lines: list[dict], mode: str = "w") -> None:
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_one_call_a_step(run, monkeypatch, name):
    """Lines of one step go together; both refuse a step that is past."""
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    trackers.main([str(run), "--track", name, "--project", "p", "--name", "n"])
    assert calls[0].items() >= {
        "project": "p", "name": "n", "config": {"beta": 0.1, "model": "tiny"}}.items()  # fmt: skip
    assert calls[1:] == [
        (0, {"eval/loss": 0.75}), (1, {"loss": 0.5, "lr": 0.25}),
        (2, {"loss": 0.375, "lr": 0.125, "eval/loss": 0.25}), "finish",
    ]  # fmt: skip


def test_a_run_is_followed_until_it_ends(run, monkeypatch):
    """Lines that are written later are sent; half a line waits for its end."""
    monkeypatch.setattr(trackers, "SECONDS", 0.02)
    steps = []
    fake = SimpleNamespace(
        init=lambda **options: None,
        log=lambda metrics, step: steps.append((step, metrics)),
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    path = run / "metrics.jsonl"
    path.write_text(json.dumps(LINES[0]) + '\n{"step": 1')

    def go_on() -> None:
        time.sleep(0.1)
        with path.open("a") as file:
            file.write(', "loss": 0.5}\n' + json.dumps(LINES[2]) + "\n")
        (run / "curves.png").touch()

    thread = threading.Thread(target=go_on)
    thread.start()
    trackers.main([str(run), "--track", "trackio", "--follow"])
    thread.join()
    later = {"loss": 0.375, "lr": 0.125}
    assert steps == [(0, {"eval/loss": 0.75}), (1, {"loss": 0.5}), (2, later)]


def test_what_is_missing_is_one_error(run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no args.json; give the folder of a run"):
        trackers.main([str(tmp_path), "--track", "tensorboard"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RunError, match="--track needs trackio: pip install trackio"):
        trackers.main([str(run), "--track", "trackio"])


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

    fake = SimpleNamespace(init=lambda **options: None, log=log, finish=lambda: None)
    fake.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--steps", 4,
            "--batch_size", 7, "--template", "raw", "--track", "wandb"]  # fmt: skip
    train_dpo.main([str(word) for word in argv])
    printed = capsys.readouterr().out
    assert printed.count("wandb failed: ConnectionError: no network; the run goes on") == 1
    assert losses(metrics_of(tmp_path / "run"))[3] > 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_tracker_that_is_not_installed_is_refused_at_once():
    if find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    with pytest.raises(RunError, match="--track trackio needs a package: pip install trackio"):
        train_dpo.parse_args(["--track", "trackio"])
