"""python -m pytest tests/test_training.py

Whole runs of train_dpo.py on a tiny random Llama: what the curve may depend on, and what not.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import examples, write_pairs
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from nanoalign import loop
from nanoalign.models import Policy
from nanoalign.rows import collate, encode_all


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """25 pairs: with batches of 7 an epoch has 4 steps, the last of 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


@pytest.fixture(scope="module")
def train(llama_folder, pairs):
    """Runs train_dpo.main on some ranks; 10 steps of 7 pairs unless told otherwise."""

    def run(out: Path, *flags: object, ranks: int = 1) -> list[dict]:
        argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--steps", 10, "--batch_size", 7,
                "--template", "raw", "--lr", 1e-2, *flags]  # fmt: skip
        outcome = run_ranks(ranks, train_dpo.main, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def one_rank(train, tmp_path_factory) -> list[dict]:
    return train(tmp_path_factory.mktemp("runs") / "one")


def losses(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def assert_same_curve(a: list[dict], b: list[dict], rel: float = 1e-5) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for (
            key
        ) in x:  # rewards are differences of log-probabilities near -100: their rounding is 1e-5
            assert y[key] == pytest.approx(x[key], rel=rel, abs=1e-4 if "loss" not in key else 0), (
                key
            )


def test_the_first_loss_is_ln_2_and_training_learns(one_rank):
    assert losses(one_rank)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert one_rank[0]["step"] == 0 and one_rank[0]["eval/rewards/accuracies"] == 0.5
    assert one_rank[1]["rewards/chosen"] == one_rank[1]["rewards/rejected"] == 0.0
    assert losses(one_rank)[-1] < 0.5
    assert one_rank[-2]["rewards/accuracies"] > 0.8


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_curve_does_not_depend_on_the_number_of_ranks(train, one_rank, tmp_path, ranks):
    """Batches of 7 and of 4 pairs: on 8 ranks some have none."""
    assert_same_curve(one_rank, train(tmp_path / "run", ranks=ranks))


@pytest.mark.parametrize(
    "flags",
    [
        "--micro_batch_tokens 1",
        "--micro_batch_tokens 200",
        "--no-share_prefix",
        "--activation_checkpointing",
    ],
)
def test_the_curve_does_not_depend_on_micro_batches_or_layout(train, one_rank, tmp_path, flags):
    assert_same_curve(one_rank, train(tmp_path / "run", *flags.split()))


def test_ranks_and_micro_batches_together(train, one_rank, tmp_path):
    assert_same_curve(one_rank, train(tmp_path / "run", "--micro_batch_tokens", 60, ranks=3))


def test_bfloat16_stays_close(train, one_rank, tmp_path):
    """Within 0.05 of float32's losses over 10 steps that halve them."""
    coarse = losses(train(tmp_path / "run", "--precision", "bf16", ranks=2))
    assert coarse != losses(one_rank)
    assert coarse == pytest.approx(losses(one_rank), abs=0.05)


# --- resume


def test_resume_continues_bit_for_bit_on_the_same_ranks(train, tmp_path):
    straight = train(tmp_path / "a", ranks=2)
    stopped = train(tmp_path / "b", "--stop_after", 5, ranks=2)
    assert losses(stopped) == losses(straight)[:5]
    resumed = train(tmp_path / "b", "--resume", ranks=2)
    assert losses(resumed) == losses(straight)
    final = [line for line in resumed if line["step"] == 10]
    assert final == [line for line in straight if line["step"] == 10]
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / run).state_dict() for run in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_continues_on_another_number_of_ranks(train, tmp_path, ranks):
    straight = train(tmp_path / "a", ranks=2)
    train(tmp_path / "b", "--stop_after", 5, ranks=2)
    resumed = train(tmp_path / "b", "--resume", ranks=ranks)
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-5)


def test_a_killed_run_continues_from_its_newest_whole_checkpoint(train, tmp_path):
    """Steps after the checkpoint are done again and logged once; torn checkpoints are not seen."""
    straight = train(tmp_path / "a")
    train(tmp_path / "b", "--save_every", 2, "--stop_after", 7, "--keep", 10)
    folder = tmp_path / "b" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{i:06d}" for i in (2, 4, 6, 7)]
    (folder / "step_000007").rename(folder / ".step_000007.partial")  # as if killed while writing
    resumed = train(tmp_path / "b", "--resume")
    assert losses(resumed) == losses(straight)
    assert [line["step"] for line in resumed if "loss" in line] == list(range(1, 11))


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    train(tmp_path / "run", "--save_every", 2, "--keep", 2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_000008", "step_000010"]


def test_a_finished_run_can_be_made_longer(train, tmp_path):
    longer = train(tmp_path / "a", "--schedule", "constant", "--warmup", 0)
    train(tmp_path / "b", "--schedule", "constant", "--warmup", 0, "--steps", 6, "--save_every", 6)
    assert losses(
        train(tmp_path / "b", "--schedule", "constant", "--warmup", 0, "--resume")
    ) == losses(longer)


# --- results


def test_the_saved_model_scores_as_the_trained_one(train, tmp_path, tokenizer):
    """The last evaluation of the run, made again from the saved files by transformers' own loader."""
    metrics = train(
        tmp_path / "run", "--eval_data", write_pairs(tmp_path / "eval.jsonl", 9, seed=1), ranks=2
    )
    rows = encode_all(examples(9, seed=1), tokenizer, "raw")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        logps = Policy(model).textbook_logps(collate(rows, share_prefix=False)).view(-1, 2)
    assert metrics[-1]["eval/logps/chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-6)
    assert metrics[-1]["eval/logps/rejected"] == pytest.approx(logps[:, 1].mean().item(), rel=1e-6)


def test_evaluation_runs_when_asked_and_at_both_ends(train, tmp_path):
    metrics = train(tmp_path / "run", "--eval_every", 4)
    assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 4, 8, 10]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_epochs_count_whole_passes(train, tmp_path):
    """About 22 pairs are left of 25 after the held-out ones: 2 epochs of ceil(n / 7) steps."""
    metrics = train(tmp_path / "run", "--steps", 2)  # --steps wins over --epochs
    assert len(losses(metrics)) == 2
    assert metrics[1]["epoch"] == pytest.approx(
        1 / math.ceil(_training_pairs(tmp_path / "run") / 7)
    )


def _training_pairs(run: Path) -> int:
    from nanoalign.data import hold_out, read_examples

    args = json.loads((run / "args.json").read_text())
    return len(hold_out(read_examples(args["data"][0]), args["eval_share"], args["seed"])[0])


def test_overwrite_leaves_nothing_of_the_old_run(train, tmp_path):
    train(tmp_path / "run", "--save_every", 5)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    metrics = train(tmp_path / "run", "--overwrite", "--steps", 3)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# --- the learning rate


def test_lr_by_hand():
    """10 steps, 20 % warm-up: 2 steps up by thirds, then 8 down."""
    rates = [loop.get_lr(step, 10, 3.0, 0.2, "linear") for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 2.625, 2.25, 1.875, 1.5, 1.125, 0.75, 0.375])
    cosine = [loop.get_lr(step, 10, 3.0, 0.2, "cosine") for step in (2, 6)]
    assert cosine == pytest.approx([3.0, 1.5])
    assert loop.get_lr(9, 10, 3.0, 0.2, "constant") == 3.0
    assert all(loop.get_lr(step, 1, 3.0, 0.9, s) > 0 for step in (0,) for s in ("linear", "cosine"))
