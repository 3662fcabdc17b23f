"""python -m pytest tests/hub/test_push.py

A run is uploaded to a server on this machine.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, serving

import train_dpo
from nanoalign.errors import RunError
from nanoalign.hub.__main__ import main
from nanoalign.hub.card import card, figures, named

FLAGS = ["--data", "tiny:test", "--steps", "1", "--batch_size", "4", "--save_every", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "dpo"
    train_dpo.main([*FLAGS, "--out", str(out)])
    return out


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, and a token."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    return Path(shutil.copytree(finished, tmp_path / "dpo"))


def test_the_model_is_uploaded_and_nothing_else(run, tmp_path, capsys):
    """Checkpoints, and the hashes of the data, are not."""
    repositories = {}
    with serving(repositories, tmp_path):
        main(["push", "me/aligned", str(run)])
    assert capsys.readouterr().out.rstrip().endswith(f"/me/aligned/commit/{COMMIT}")
    files = repositories["models/me/aligned"]
    kept = {"README.md", "args.json", "config.json", "curves.png", "generation_config.json",
            "metrics.jsonl", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"}  # fmt: skip
    assert {*files} == kept
    assert (run / "checkpoints").is_dir() and (run / "records.npz").is_file()
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_the_card_has_the_figures_and_the_command_of_the_run(run, capsys):
    """Not the folder of this machine in which --out was."""
    main(["card", str(run)])
    text = (run / "README.md").read_text()
    args = json.loads((run / "args.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"-> {last['eval/loss']:.4f}" in text and "| batch_size | 4 |" in text
    assert text.startswith('---\nlibrary_name: "transformers"\n') and "base_model" not in text
    assert f"nanoalign {args['nanoalign']}" in text and str(run.parent) not in text
    (run / "README.md").write_text("my own")
    main(["card", str(run)])
    assert (run / "README.md").read_text() == "my own"


def test_a_model_of_the_hub_is_linked(run):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "Owner/Base@v2"}))
    assert '\nbase_model: "Owner/Base"\n' in card(run)


def test_figures_are_those_before_and_after():
    lines = [{"step": 0, "eval/loss": 0.7}, {"step": 1, "loss": 9}, {"step": 2, "eval/loss": 0.5}]
    assert figures(lines).endswith("before and after 2 steps: loss 0.7000 -> 0.5000.")
    assert figures(lines[1:2]) == "Nothing was held out."


@pytest.mark.parametrize(
    ("word", "shown"),
    [("/home/me/pairs.jsonl", "pairs.jsonl"), ("x=/data/a.jsonl", "x=a.jsonl"), ("a/b", "a/b")],
)
def test_places_of_a_machine_are_not_told(word, shown):
    assert named(word) == shown


def test_what_can_not_be_pushed_is_one_error(run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no args.json; give the folder of a finished run"):
        main(["push", "me/x", str(tmp_path / "none")])
    (run / "config.json").rename(run / "kept.json")
    with pytest.raises(RunError, match="has no model: there is no config.json"):
        main(["push", "me/x", str(run)])
    (run / "kept.json").rename(run / "config.json")
    with serving({}, tmp_path), pytest.raises(RunError, match="can't be uploaded as a/b/c: "):
        main(["push", "a/b/c", str(run)])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RunError, match="no token of the Hub; set HF_TOKEN"):
        main(["push", "me/x", str(run)])
