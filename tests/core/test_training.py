"""python -m pytest tests/test_training.py

Whole runs of train_dpo.py on a tiny random Llama: what the curve may depend on, and what not.
"""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import examples, tiny_llama, write_pairs
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from nanoalign import loop
from nanoalign.models import Policy
from nanoalign.prepare import make_optimizer
from nanoalign.report import curves, held_out_summary
from nanoalign.rows import collate, encode_all


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """25 pairs: with batches of 7 an epoch has 4 steps, the last of 4 pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


def _train_without_picture(argv: list[str]) -> None:
    train_dpo.curves = lambda *args: None  # half of the time of a run this small
    train_dpo.main(argv)


@pytest.fixture(scope="module")
def train(llama_folder, pairs):
    """Runs train_dpo.main on some ranks; 10 steps of 7 pairs unless told otherwise."""

    def run(out: Path, *flags: object, ranks: int = 1, steps: int | None = 10) -> list[dict]:
        argv = ["--model", llama_folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
                "--template", "raw", *(("--steps", steps) if steps else ()), *flags]  # fmt: skip
        outcome = run_ranks(ranks, _train_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def one_rank(train, tmp_path_factory) -> list[dict]:
    return train(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory) -> tuple[list[dict], Path]:
    """An uninterrupted run on two ranks, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "two"
    return train(out, ranks=2), out


def losses(metrics: list[dict]) -> list[float]:
    return [line["loss"] for line in metrics if "loss" in line]


def assert_same_curve(a: list[dict], b: list[dict]) -> None:
    """Losses to 1e-5 relative; rewards and accuracies follow from log-probabilities near -100."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            absolute = 0 if key in ("loss", "lr", "epoch") else 1e-4
            assert y[key] == pytest.approx(x[key], rel=1e-5, abs=absolute), key


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


def test_resume_continues_bit_for_bit_on_the_same_ranks(train, two_ranks, tmp_path):
    straight, folder = two_ranks
    stopped = train(tmp_path / "run", "--stop_after", 5, ranks=2)
    assert losses(stopped) == losses(straight)[:5]
    assert train(tmp_path / "run", "--resume", ranks=2) == straight
    weights = [
        AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (folder, tmp_path / "run")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_continues_on_another_number_of_ranks(train, two_ranks, tmp_path, ranks):
    train(tmp_path / "run", "--stop_after", 5, ranks=2)
    resumed = train(tmp_path / "run", "--resume", ranks=ranks)
    assert losses(resumed) == pytest.approx(losses(two_ranks[0]), rel=1e-5)


def test_a_killed_run_continues_from_its_newest_whole_checkpoint(train, one_rank, tmp_path):
    """Steps after the checkpoint are done again and logged once; torn checkpoints are not seen."""
    train(tmp_path / "b", "--save_every", 2, "--stop_after", 7, "--keep", 10)
    folder = tmp_path / "b" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{i:06d}" for i in (2, 4, 6, 7)]
    (folder / "step_000007").rename(folder / ".step_000007.partial")  # as if killed while writing
    resumed = train(tmp_path / "b", "--resume")
    assert losses(resumed) == losses(one_rank)
    assert [line["step"] for line in resumed if "loss" in line] == list(range(1, 11))


def test_a_torn_line_of_metrics_is_written_again(train, one_rank, tmp_path):
    train(tmp_path / "b", "--stop_after", 5)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert train(tmp_path / "b", "--resume") == one_rank


def test_resume_after_an_evaluation_at_the_same_step(train, tmp_path):
    """An evaluation leaves the head gathered; the checkpoint behind it must hold the shards."""
    straight = train(tmp_path / "a", "--eval_every", 5, ranks=2)
    train(tmp_path / "b", "--eval_every", 5, "--stop_after", 5, ranks=2)
    assert train(tmp_path / "b", "--eval_every", 5, "--resume", ranks=2) == straight


def test_resume_in_bfloat16(train, tmp_path):
    straight = train(tmp_path / "a", "--precision", "bf16")
    train(tmp_path / "b", "--precision", "bf16", "--stop_after", 5)
    assert train(tmp_path / "b", "--precision", "bf16", "--resume") == straight


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
        logps = Policy(model).textbook(collate(rows, share_prefix=False)).view(-1, 2)
    assert metrics[-1]["eval/logps/chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-6)
    assert metrics[-1]["eval/logps/rejected"] == pytest.approx(logps[:, 1].mean().item(), rel=1e-6)


def test_evaluation_runs_when_asked_and_at_both_ends(train, tmp_path):
    metrics = train(tmp_path / "run", "--eval_every", 4)
    assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 4, 8, 10]
    curves(tmp_path / "run", "a title")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert held_out_summary(tmp_path / "run", 2).startswith("loss 0.6931 -> ")


def test_epochs_are_whole_passes(train, tmp_path):
    """25 pairs less 2 held out: 2 epochs of ceil(23 / 7) = 4 steps."""
    metrics = train(tmp_path / "run", "--epochs", 2, steps=None)
    assert [line["epoch"] for line in metrics if "loss" in line] == [i / 4 for i in range(1, 9)]


def test_overwrite_leaves_nothing_of_the_old_run(train, tmp_path):
    train(tmp_path / "run", "--save_every", 5)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    metrics = train(tmp_path / "run", "--overwrite", steps=3)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# --- the reference


def _run_and_compare_reference(argv: list[str]) -> tuple[bool, bool]:
    """Whether the sharded reference, and the policy, are the same tensors after a run as before it."""
    loaded, load = [], Policy.load

    def keep(*args, **kwargs):
        policy = load(*args, **kwargs)
        loaded.append((policy, [p.full_tensor().clone() for p in policy.parameters()]))
        return policy

    train_dpo.Policy.load = keep
    train_dpo.main(argv)
    same = []
    for policy, before in loaded:
        policy.reshard()
        after = [p.full_tensor() for p in policy.parameters()]
        same.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return tuple(same)


def test_training_moves_the_policy_and_not_the_reference(llama_folder, pairs, tmp_path):
    argv = ["--model", llama_folder, "--data", pairs, "--out", tmp_path / "run", "--lr", "1e-2"]
    outcome = run_ranks(2, _run_and_compare_reference, [str(arg) for arg in argv])
    assert outcome.results == [(True, False)] * 2, outcome.stderr


def test_another_reference_gives_other_first_losses(train, tmp_path, tokenizer):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    metrics = train(tmp_path / "run", "--reference", tmp_path / "other", steps=1)
    assert abs(losses(metrics)[0] - math.log(2)) > 0.1


# --- what the flags reach


def test_only_matrices_decay():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3)})
    optimizer = make_optimizer(model, argparse.Namespace(lr=0.1, weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "a.weight": 0.3, "a.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0}  # fmt: skip


def test_gradients_are_clipped(train, one_rank, tmp_path):
    """AdamW hides the scale of gradients, but not of one so small that epsilon outweighs it."""
    clipped = train(tmp_path / "run", "--max_grad_norm", 1e-12)
    assert clipped[1]["grad_norm"] == one_rank[1]["grad_norm"] > 1e-3  # reported before clipping
    assert abs(losses(clipped)[-1] - math.log(2)) < 0.01


def test_the_seed_orders_the_pairs(train, one_rank, tmp_path):
    other = train(tmp_path / "run", "--seed", 1)
    assert other[1]["logps/chosen"] != one_rank[1]["logps/chosen"]


# --- the learning rate


def test_lr_by_hand():
    """10 steps, 20 % warm-up: 2 steps up by thirds, then 8 down."""
    rates = [loop.get_lr(step, 10, 3.0, 0.2, "linear") for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 2.625, 2.25, 1.875, 1.5, 1.125, 0.75, 0.375])
    cosine = [loop.get_lr(step, 10, 3.0, 0.2, "cosine") for step in (2, 6)]
    assert cosine == pytest.approx([3.0, 1.5])
    assert loop.get_lr(9, 10, 3.0, 0.2, "constant") == 3.0
    assert all(loop.get_lr(step, 1, 3.0, 0.9, s) > 0 for step in (0,) for s in ("linear", "cosine"))
