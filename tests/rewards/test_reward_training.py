"""python -m pytest tests/rewards/test_reward_training.py

Whole runs of train_rm.py on a tiny random Llama: what the curve may depend on, and what not.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records, write_pairs
from processes import run_ranks
from trainings import assert_same_curve, losses, metrics_of, rm_without_picture

from nanoalign.batch import collate
from nanoalign.encode import encode_all
from nanoalign.evaluation.results import write_records
from nanoalign.model import RewardModel
from nanoalign.rewards.rule import EOS_RULE, rule_of

LOGGED = {"step", "loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins",
          "reward_mean", "reward_std", "lr", "grad_norm", "epoch"}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """25 pairs, 9 to evaluate, and six ranked records of 4 responses, in files of their own."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "pairs.jsonl", 25)
    write_pairs(folder / "eval.jsonl", 9, seed=1)
    ranked = [
        {"prompt": f"p{i}", "responses": [f"{i}a", f"{i}bb", f"{i}ccc", f"{i}d"]} for i in range(6)
    ]
    write_records(folder / "ranked.jsonl", [each | {"scores": [1, 4, 2.5, 2.5]} for each in ranked])
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def train(llama_folder, pairs):
    """Runs train_rm.main on some ranks; 20 steps of 7 pairs (5 epochs) unless told otherwise."""

    def run(out: Path, *flags: object, ranks: int = 1, steps: int = 20) -> list[dict]:
        argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7,
                "--lr", 3e-3, "--template", "raw", "--eval_data", pairs.with_name("eval.jsonl"),
                "--steps", steps, *flags]  # fmt: skip
        outcome = run_ranks(ranks, rm_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return metrics_of(out)

    return run


@pytest.fixture(scope="module")
def one_rank(train, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("runs") / "one"
    return train(out), out


def test_training_learns_and_logs(one_rank):
    metrics, _ = one_rank
    steps = [line for line in metrics if "loss" in line]
    assert all(line.keys() == LOGGED for line in steps)
    assert losses(metrics)[-1] < 0.3 < losses(metrics)[0] and steps[-1]["accuracy"] > 0.9
    for line in steps:
        middle = (line["rewards/chosen"] + line["rewards/rejected"]) / 2
        assert line["reward_mean"] == pytest.approx(middle, abs=1e-6)


def test_evaluations_are_of_held_out_and_training_pairs(one_rank):
    """At the start, and after each tenth of 20 steps. Overfitting is a gap between the two."""
    evaluations = [line for line in one_rank[0] if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [*range(0, 21, 2)]
    named = {key.split("/", 1)[1] for key in evaluations[0] if key.startswith("eval/")}
    assert named == LOGGED - {"step", "lr", "grad_norm", "epoch"}
    assert {f"train_eval/{name}" for name in named} < evaluations[0].keys()
    assert evaluations[-1]["train_eval/loss"] < 0.3 < 0.7 < evaluations[-1]["eval/loss"]


def test_the_last_evaluation_is_the_saved_models(one_rank, pairs, tokenizer):
    """Of the held-out pairs and of the last 9 training pairs, in numpy; and the model's
    settings."""
    metrics, folder = one_rank
    model = RewardModel.load(folder)
    rule = {"template": "raw", "max_length": 1024, "eos": EOS_RULE, "prompts": ["text"]}
    assert rule_of(model) == rule | {"preferences": ["better"], "condition": False}
    for name, data in (("eval", records(9, seed=1)), ("train_eval", records(25)[-9:])):
        with torch.no_grad():
            rewards = model(collate(encode_all(data, tokenizer)))
        rewards = rewards.double().view(-1, 2).numpy()
        expected = {
            "loss": np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean(),
            "accuracy": np.mean(rewards[:, 0] > rewards[:, 1]),
            "reward_mean": rewards.mean(),
            "reward_std": rewards.std(),
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean(),
        }
        for key, value in expected.items():
            assert metrics[-1][f"{name}/{key}"] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_the_curve_depends_neither_on_ranks_nor_on_micro_batches_nor_on_layout(
    train, one_rank, tmp_path
):
    assert_same_curve(one_rank[0], train(tmp_path / "ranks", ranks=4))
    flags = ["--micro_batch_tokens", 100, "--no-share_prefix", "--activation_checkpointing"]
    assert_same_curve(one_rank[0], train(tmp_path / "layout", *flags))


def test_20_steps_are_10_and_10_more(train, one_rank, tmp_path):
    """Bit for bit, the saved files too."""
    metrics, folder = one_rank
    train(tmp_path / "run", "--stop_after", 10)
    assert train(tmp_path / "run", "--resume") == metrics
    files = [run / "model.safetensors" for run in (folder, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ranked_records_train(train, pairs, tmp_path):
    """5 pairs a record, since two scores tie; on 1 and on 2 ranks."""
    flags = ["--data", pairs.with_name("ranked.jsonl"), "--margin", 0.5]
    curve = train(tmp_path / "one", *flags, steps=10)
    assert losses(curve)[-1] < losses(curve)[0] / 2
    assert_same_curve(curve, train(tmp_path / "two", *flags, ranks=2, steps=10))


def test_a_reward_model_is_trained_on_with_its_head(train, one_rank, tmp_path):
    """The first loss of the second run is that of the model, not of a new head.

    Its template must be that of the first training.
    """
    again = train(tmp_path / "run", "--model", one_rank[1], steps=1)
    assert again[0]["eval/loss"] == pytest.approx(one_rank[0][-1]["eval/loss"], rel=1e-6)
    with pytest.raises(AssertionError, match="trained with template 'raw', not 'pku'"):
        train(tmp_path / "other", "--model", one_rank[1], "--template", "pku", steps=1)
