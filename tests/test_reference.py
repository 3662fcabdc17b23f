"""python -m pytest tests/test_reference.py: --precompute_reference"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_llama, write_pairs
from ranks import run_ranks
from test_scripts import script

import train_dpo
from nanoalign.errors import RunError
from nanoalign.preference import Preference

FLAGS = (
    "--template",
    "raw",
    "--batch_size",
    "4",
    "--steps",
    "3",
    "--eval_share",
    "0.2",
    "--lr",
    "1e-3",
)


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval/loss")) for line in lines]


def train(*argv: str) -> None:
    train_dpo.main([*map(str, argv)])


def run(ranks: int, model: Path, data: Path, out: Path, *more: str):
    argv = ("--model", model, "--data", data, "--out", out, "--cache", out.parent / "cache", *FLAGS)
    outcome = run_ranks(ranks, train, *argv, *more)
    assert outcome.codes == [0] * ranks, outcome.stderr
    return outcome


def test_losses_are_those_of_a_living_reference_and_it_is_asked_once(llama_folder, tmp_path):
    """On 1 and 2 ranks, for a loss of a step as a whole, and without shared rows."""
    data = write_pairs(tmp_path / "p.jsonl", 20)
    for more in ((), ("--loss", "aot"), ("--no-share_prefix",)):
        out = tmp_path / ("plain" + "".join(more))
        run(1, llama_folder, data, out, *more)
        for ranks in (2,) if more else (1, 2):
            again = tmp_path / f"kept{ranks}{''.join(more)}"
            outcome = run(ranks, llama_folder, data, again, "--precompute_reference", *more)
            asked = not more and ranks == 1  # before all others, which find what it kept
            assert ("responses, computed in" in outcome.stdout) == asked
            assert ("responses, read from" in outcome.stdout) != asked
            assert losses(again) == pytest.approx(losses(out), abs=2e-5)


def test_another_reference_or_other_rows_have_another_key(llama_folder, tmp_path):
    data, other = (write_pairs(tmp_path / f"{n}.jsonl", 12, seed=n) for n in (0, 1))
    for out, flags in {
        "a": ("--data", data),
        "b": ("--data", other),
        "c": ("--data", data, "--precision", "bf16"),
    }.items():
        stdout = run(
            1, llama_folder, flags[1], tmp_path / out, *flags[2:], "--precompute_reference"
        ).stdout
        assert stdout.count("computed in") == 2  # training and held-out rows
    assert len(list((tmp_path / "cache" / "reference").glob("*.npy"))) == 6


def test_what_is_kept_is_compared_with_the_living_reference(llama_folder, tmp_path):
    """A file that says something else of some responses stops the run, with its name."""
    data = write_pairs(tmp_path / "p.jsonl", 20)
    run(1, llama_folder, data, tmp_path / "first", "--precompute_reference")
    for path in (tmp_path / "cache" / "reference").glob("*.npy"):
        np.save(path, np.load(path) + 0.5)
    argv = ("--model", llama_folder, "--data", data, "--out", tmp_path / "second", *FLAGS,
            "--cache", tmp_path / "cache", "--precompute_reference")  # fmt: skip
    with pytest.raises(RunError, match=r"\.npy: log-probabilities are up to .* remove the file"):
        train(*argv)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "more", [("--loss", "simpo"), ("--loss", "kto"), ("--ld_alpha", "0.5"), ("--sync_reference_every", "2")]
)  # fmt: skip
def test_what_asks_the_reference_otherwise_is_refused(more):
    with pytest.raises(RunError, match="--precompute_reference"):
        train_dpo.parse_args(["--precompute_reference", *more])


def test_no_reference_is_held_in_training(llama_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Preference,
        "stepped",
        lambda self, step, metrics: seen.append(type(self.reference).__name__),
    )
    data = write_pairs(tmp_path / "p.jsonl", 20)
    train("--model", llama_folder, "--data", data, "--out", tmp_path / "run", *FLAGS,
          "--cache", tmp_path / "cache", "--precompute_reference")  # fmt: skip
    assert seen == ["Precomputed"] * 3


def test_a_damaged_file_is_one_clear_error(llama_folder, tmp_path):
    data = write_pairs(tmp_path / "p.jsonl", 12)
    run(1, llama_folder, data, tmp_path / "first", "--precompute_reference")
    for path in (tmp_path / "cache" / "reference").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    argv = ("--model", llama_folder, "--data", data, "--out", tmp_path / "second", *FLAGS,
            "--cache", tmp_path / "cache", "--precompute_reference")  # fmt: skip
    outcome = run_ranks(2, script, [str(arg) for arg in argv])
    assert outcome.codes == [1, 1] and "can't be read" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_reference_is_checked_before_it_is_asked(llama_folder, tmp_path, tokenizer):
    """One that knows fewer positions than rows have, and one of broken weights: nothing is kept."""
    data = write_pairs(tmp_path / "p.jsonl", 12)
    short, broken = tiny_llama(max_position_embeddings=16), tiny_llama()
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    for name, model, message in (
        ("short", short, "the model knows 16 positions"),
        ("broken", broken, "are its weights whole?"),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(RunError, match=re.escape(message)):
            train("--model", llama_folder, "--data", data, "--out", tmp_path / "run", *FLAGS, "--reference",
                  tmp_path / name, "--cache", tmp_path / "cache", "--precompute_reference")  # fmt: skip
    assert not (tmp_path / "cache" / "reference").exists()


def test_a_steep_loss_may_read_what_another_layout_kept(llama_folder, tmp_path):
    """ipo_sum makes 1 / beta of a rounding: at a beta of 0.01 its losses are off, and its rewards are not."""
    data = write_pairs(tmp_path / "p.jsonl", 20)
    run(1, llama_folder, data, tmp_path / "kept", "--precompute_reference")
    steep = ("--loss", "ipo_sum", "--beta", "0.01", "--no-share_prefix", "--precompute_reference")
    run(1, llama_folder, data, tmp_path / "steep", *steep)
