"""python -m pytest tests/rewards/test_reward_variants.py

Reward models of several preferences, with preferences in the prompt, and with length left out.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records, write_both_labels
from processes import run_ranks
from trainings import assert_same_curve, metrics_of, rm_without_picture
from transformers import AutoModelForSequenceClassification

import train_rm
from nanoalign import loop
from nanoalign.batch import collate
from nanoalign.data.formats import by_preference, conditioned, formats
from nanoalign.data.templates import encode_records
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.evaluation.results import write_records
from nanoalign.model import RewardModel
from nanoalign.packing.self_check import check_layout
from nanoalign.records import Record, read
from nanoalign.rewards import length_debias, several
from nanoalign.rewards.several import Mixed, SeveralRewards, is_conditioned, preferences_of

BOTH = ("better", "safer")


def log1pexp(x: float) -> float:
    return float(np.log1p(np.exp(x)))


def flags(*given: str) -> argparse.Namespace:
    return train_rm.parse_args(list(given))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_both_labels(tmp_path_factory.mktemp("data") / "both.jsonl", 20)


@pytest.fixture(scope="module")
def train(llama_folder, data):
    def trained(out: Path, *flags: object, ranks: int = 1) -> list[dict]:
        argv = ["--model", llama_folder, "--data", data, "--eval_data", data, "--out", out,
                "--batch_size", 5, "--lr", 3e-3, "--template", "pku", "--steps", 6,
                *flags]  # fmt: skip
        outcome = run_ranks(ranks, rm_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return metrics_of(out)

    return trained


@pytest.fixture(scope="module")
def both(train, tmp_path_factory) -> tuple[list[dict], Path]:
    """A reward model of two outputs."""
    out = tmp_path_factory.mktemp("runs") / "both"
    return train(out, "--preference", *BOTH), out


# --- several preferences


def test_each_label_is_a_pair_of_its_output(data):
    """By record, better and safer name response 0 and 0; 0 and 1; 1 and 1."""
    first, second, third, *_ = read([str(data)], formats(BOTH))
    originals = records(3)
    assert first.pairs == ((0, 1), (0, 1)) and second.pairs == ((0, 1), (1, 0))
    assert first.extra == second.extra == {"dimensions": [0, 1]}
    assert second.responses == originals[1].responses
    assert third.responses == originals[2].responses[::-1]  # the better one first
    assert third.pairs == ((0, 1), (0, 1))


def test_the_loss_is_the_mean_over_preferences_by_hand(tokenizer):
    """Rewards by both preferences: (3, 1) and (1, 2); better prefers the first, safer the second.

    The differences are 3 - 1 = 2 and 2 - 1 = 1, of which a margin of 0.5 is required; one label in
    ten is wrong, and centring adds 0.1 * (3 + 1)^2 and 0.1 * (2 + 1)^2.
    """
    record = Record("p", ("x", "y"), ((0, 1), (1, 0)), {"dimensions": [0, 1]})
    batch = collate(encode_all([record], tokenizer))
    rewards = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    args = flags("--preference", *BOTH, "--margin", "0.5", "--label_smoothing", "0.1",
                 "--center_rewards_coefficient", "0.1")  # fmt: skip
    losses, metrics = several.loss_of_batch(train_rm.loss_of_batch, lambda _: rewards, args, batch)
    expected = [
        0.9 * log1pexp(0.5 - d) + 0.1 * log1pexp(0.5 + d) + c for d, c in ((2, 1.6), (1, 0.9))
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert batch.weights.tolist() == [0.5, 0.5]
    assert metrics["accuracy/better"][1].tolist() == [True, False]
    assert metrics["accuracy/safer"][1].tolist() == [False, True]
    assert metrics["rewards/margins"].tolist() == [2, 1]
    assert metrics["reward_mean"].tolist() == [2, 1.5]


def test_two_outputs_on_one_rank_and_on_two(train, both, tmp_path):
    assert {"accuracy", "accuracy/better", "accuracy/safer"} < both[0][1].keys()
    assert_same_curve(both[0], train(tmp_path / "two", "--preference", *BOTH, ranks=2))


def test_two_outputs_are_written_with_their_names(both, data, tokenizer):
    """transformers' own logits are the rewards, output by output; a mixture is their sum."""
    model = AutoModelForSequenceClassification.from_pretrained(both[1])
    assert model.config.id2label == {0: "better", 1: "safer"}
    reward_model = SeveralRewards.load(both[1], trainable=False)
    assert preferences_of(reward_model) == [*BOTH] and not is_conditioned(reward_model)
    found = list(read([str(data)], formats(BOTH)))
    rows = encode_records(found, tokenizer, 1024, "pku")
    logits = []
    for row in rows:
        for response in row.responses:
            ids = torch.tensor(np.concatenate([row.prompt, response])[None].astype(np.int64))
            with torch.no_grad():
                logits.append(model(ids).logits[0])
    logits, batch = torch.stack(logits), collate(rows)  # (S, 2)
    with torch.no_grad():
        assert torch.allclose(reward_model(batch), logits, atol=1e-5)
        mixed = Mixed(reward_model, {"better": 1.0, "safer": -2.5})
        assert torch.allclose(mixed(batch), logits[:, 0] - 2.5 * logits[:, 1], atol=1e-5)
        assert mixed.SCORES == "rewards" and mixed.dtype == torch.float32
        check_layout(reward_model, rows, loop.Batcher(setup(), 300), "it")
        check_layout(mixed, rows, loop.Batcher(setup(), 300), "it")
    with pytest.raises(RunError, match="no preference 'nice'; it has better, safer"):
        Mixed(reward_model, {"nice": 1.0, "safer": 1.0})


def test_models_of_other_programs_have_preferences(both, llama_folder):
    """By the labels of their outputs; one output is called better."""
    model = SeveralRewards.load(both[1])
    del model.model.config.nanoalign
    assert preferences_of(model) == ["better", "safer"] and not is_conditioned(model)
    assert preferences_of(RewardModel.load(llama_folder, head_seed=0)) == ["better"]


# --- the preference in the prompt


def test_the_mark_stands_behind_the_last_question(tokenizer):
    """There it stays when a prompt that is too long loses its beginning."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman:c"
    for prompt, marked in (
        ("p", "p [safer]"),
        (f"{turns}\n\nAssistant:", f"{turns} [safer]\n\nAssistant:"),
        (messages, [messages[0], {"role": "user", "content": "u [safer]"}]),
    ):
        assert conditioned(Record(prompt, ("a", "b")), "safer").prompt == marked
    assert messages[1]["content"] == "u"  # the record itself is not changed
    long = conditioned(Record("word " * 100, ("a", "b")), "safer")
    (row,) = encode_records([long], tokenizer, 64, "pku")
    assert "[safer] ASSISTANT:" in tokenizer.decode(row.prompt)
    assert row.notes == ("prompts cut at their beginning",)


def test_a_record_for_each_preference():
    extra = {"dimensions": [0, 1, 1], "margins": [1.0, 2.0, 3.0]}
    record = Record("p", ("x", "y", "z"), ((0, 1), (1, 0), (2, 0)), extra, name="file:1")
    better, safer = by_preference(record, BOTH)
    assert (better.prompt, safer.prompt) == ("p [better]", "p [safer]")
    assert (better.pairs, safer.pairs) == (((0, 1),), ((1, 0), (2, 0)))
    assert (better.extra, safer.extra) == ({"margins": [1.0]}, {"margins": [2.0, 3.0]})
    assert (better.name, safer.name) == ("file:1/better", "file:1/safer")


def test_a_conditioned_model_has_one_output_and_trains_on_marked_prompts(
    train, data, tmp_path, tokenizer
):
    """The last evaluation, of 20 records with two prompts each, by the model that was written."""
    metrics = train(tmp_path / "rm", "--preference", *BOTH, "--condition")
    model = RewardModel.load(tmp_path / "rm", trainable=False)
    assert preferences_of(model) == [*BOTH] and is_conditioned(model)
    assert model.head.out_features == 1
    marked = [
        part for record in read([str(data)], formats(BOTH)) for part in by_preference(record, BOTH)
    ]
    batch = collate(encode_records(marked, tokenizer, 1024, "pku"))
    with torch.no_grad():
        rewards = model(batch)
    margins = (rewards[batch.chosen] - rewards[batch.rejected]).double()
    assert len(margins) == 40
    expected = torch.log1p((-margins).exp()).mean().item()
    assert metrics[-1]["eval/loss"] == pytest.approx(expected, rel=1e-5)
    mixed = Mixed(SeveralRewards.load(tmp_path / "rm"), {"better": 1.0, "safer": 2.0})
    assert torch.allclose(mixed(batch), rewards, atol=1e-5)  # the shares are those of prompts


# --- length


def test_length_is_part_of_the_loss_and_not_of_the_reward(tokenizer):
    """Rewards 1 and 0, lengths worth 0.5 and 2: the loss is of a difference of -0.5."""
    batch = collate(encode_all([Record("p", ("x", "yyyy"))], tokenizer))

    class Model:
        def __call__(self, batch):
            return torch.tensor([1.0, 0.0])

        def lead(self, batch):
            return torch.tensor([0.5 - 2.0])

    loss_of_batch = partial(length_debias.loss_of_batch, train_rm.loss_of_batch, Model())
    losses, metrics = loss_of_batch(flags("--length_debias"), batch)
    assert losses.item() == pytest.approx(log1pexp(0.5))
    assert metrics["rewards/margins"].item() == 1 and metrics["accuracy"].item() == 1
    given = ["--margin", "0.25", "--label_smoothing", "0.1", "--center_rewards_coefficient", "2"]
    losses, _ = loss_of_batch(flags("--length_debias", *given), batch)
    expected = 0.9 * log1pexp(0.25 + 0.5) + 0.1 * log1pexp(0.25 - 0.5) + 2 * 1
    assert losses.item() == pytest.approx(expected, rel=1e-6)


def test_the_coefficient_by_hand(llama_folder, tokenizer):
    """Differences of length 2 and -4, whose standard deviation is 3 tokens; it learns 400 times."""
    pairs = [Record("p", ("xxx", "y")), Record("p", ("x", "yyyyy"))]
    rows = encode_all(pairs, tokenizer)
    model = length_debias.load(rows, llama_folder, head_seed=0)
    assert model.unit == 3.0
    batch, plain = collate(rows), RewardModel.load(llama_folder, head_seed=0)
    assert model.lead(batch).tolist() == [0, 0] and torch.equal(model(batch), plain(batch))
    torch.nn.init.constant_(model.length.weight, 0.5)
    lead = torch.tensor([4 - 2, 2 - 6]) / 3 * 0.5  # tokens with EOS
    assert torch.allclose(model.lead(batch), lead)
    assert torch.equal(model(batch), plain(batch))
    *groups, own = model.parameter_groups(0.1)
    assert own == {"params": [model.length.weight], "weight_decay": 0.0, "lr_scale": 400.0}
    others = [p for group in groups for p in group["params"]]
    assert len(others) == len(list(plain.parameters()))
    assert not any(p is model.length.weight for p in others)
    equal = encode_all([Record("p", ("x", "y"))], tokenizer)
    assert length_debias.load(equal, llama_folder, head_seed=0).unit == 1.0


def test_labels_by_length_alone_are_explained_by_length(llama_folder, tmp_path):
    """The longer response is always preferred: the coefficient learns that, the reward less."""
    lines = []
    for r in records(40):
        short, long = sorted(r.responses, key=len)
        lines.append({"prompt": r.prompt, "chosen": long + "!!!", "rejected": short})
    path = tmp_path / "long.jsonl"
    write_records(path, lines)
    margin = {}
    for name, given in {"plain": [], "debiased": ["--length_debias"]}.items():
        argv = ["--model", llama_folder, "--data", path, "--eval_data", path, "--out",
                tmp_path / name, "--batch_size", 8, "--lr", 1e-3, "--template", "raw",
                "--steps", 20, *given]  # fmt: skip
        outcome = run_ranks(1, rm_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0], outcome.stderr
        margin[name] = metrics_of(tmp_path / name)[-1]["eval/rewards/margins"]
    per_token = re.search(r"labels prefer a token by (\S+), left out", outcome.stdout)[1]
    assert float(per_token) > 0.02
    assert margin["debiased"] < margin["plain"]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "debiased")
    assert not [name for name in saved.state_dict() if "length" in name]
    assert RewardModel.load(tmp_path / "debiased").head.out_features == 1


def test_the_coefficient_is_resumed(train, tmp_path):
    """6 steps == 3 + resume + 3 on two ranks, to the byte."""
    whole = train(tmp_path / "whole", "--length_debias", "--save_every", 3, ranks=2)
    train(tmp_path / "parts", "--length_debias", "--stop_after", 3, ranks=2)
    flags = ["--length_debias", "--resume", "--save_every", 3]
    assert train(tmp_path / "parts", *flags, ranks=2) == whole
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--condition"], "give --preference better safer"),
        (["--preference", "safer", "safer"], "give each name once"),
        (["--preference", *BOTH, "--length_debias"], "one coefficient of length; give one"),
    ],
)
def test_flags_that_do_not_go_together(given, message):
    with pytest.raises(RunError, match=message):
        flags(*given)


def test_records_that_lack_a_label_and_models_of_other_outputs(both, llama_folder, tmp_path):
    two = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0}
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    data = tmp_path / "one.jsonl"
    for model, line, names, message in (
        (llama_folder, pair, BOTH, ".jsonl:1: a record with the keys .* has one label"),
        (llama_folder, two, BOTH, ".jsonl:1: safer_response_id is None; .* needs 0 or 1"),
        (both[1], pair, ["better"], "a head of 2 outputs, but --preference better needs 1"),
    ):
        write_records(data, [line])
        argv = ["--model", model, "--data", data, "--out", tmp_path / "x", "--preference", *names]
        with pytest.raises(RunError, match=message):
            train_rm.main([str(arg) for arg in (*argv, "--template", "pku")])
