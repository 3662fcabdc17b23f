"""python -m pytest tests/runs/test_repeat.py"""

import json

import pytest
from conftest import write_pairs
from trainings import metrics_of, train

import train_dpo
import train_rm
from nanoalign.errors import RunError

FLAGS = ["--beta", 0.3, "--no-share_prefix", "--loss", "ipo", "--wpo", "--seed", 5, "--eval_share",
         0.3, "--schedule", "constant"]  # fmt: skip


def test_a_run_is_repeated_bit_for_bit(llama_folder, tmp_path):
    """Then with another seed, which changes nothing else."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 25)
    train(llama_folder, pairs, tmp_path / "a", *FLAGS, steps=3)
    train_dpo.main(["--args", str(tmp_path / "a" / "args.json"), "--out", str(tmp_path / "b")])
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    flags = ["--args", f"{tmp_path}/b/args.json", "--out", "c", "--seed", "6"]
    before, after = vars(train_dpo.parse_args(flags[:-2])), vars(train_dpo.parse_args(flags))
    assert {name for name in before if before[name] != after[name]} == {"seed"}
    assert after["seed"] == 6 and after["beta"] == 0.3 and after["loss"] == "ipo"
    assert after["share_prefix"] is False and after["wpo"] is True and after["steps"] == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "m", "--lr", "3e-7", "--epochs", "2", "--keys", "prompt=q", "chosen=a b"],
        ["--loss", "simpo", "--save_every", "7", "--activation_checkpointing", "--resume"],
        ["--data", "x=a.jsonl*0.5", "b.jsonl", "--reference", "none", "--loss", "orpo"],
    ],
)
def test_the_flags_of_a_file_are_read_as_they_were(argv, tmp_path, monkeypatch):
    monkeypatch.setattr("nanoalign.runs.checkpoints.refusal_of_resume", lambda args: None)
    args = vars(train_dpo.parse_args(argv))
    (tmp_path / "args.json").write_text(json.dumps(args | {"argv": ["x"], "ranks": 1}))
    again = vars(train_dpo.parse_args([f"--args={tmp_path / 'args.json'}"]))
    expected = args | {"args": str(tmp_path / "args.json"), "resume": False}
    assert {name: again[name] for name in args} == expected


def test_what_can_not_be_repeated_is_one_error(tmp_path):
    with pytest.raises(RunError, match="--args missing.json: no args.json of a run: FileNotFound"):
        train_dpo.parse_args(["--args", "missing.json"])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RunError, match="list.json: no args.json of a run"):
        train_dpo.parse_args(["--args", str(tmp_path / "list.json")])
    (tmp_path / "args.json").write_text(json.dumps(vars(train_dpo.parse_args([]))))
    with pytest.raises(RunError, match="unrecognized arguments: --beta=0.1"):
        train_rm.parse_args(["--args", str(tmp_path / "args.json")])
