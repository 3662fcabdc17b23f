"""python -m pytest tests/test_reward_variants.py

Reward models by several preferences, conditioned ones, and with length left out.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import examples
from ranks import run_ranks
from test_training import assert_same_curve
from transformers import AutoModelForSequenceClassification

import evaluate
import train_rm
from nanoalign.data import read_examples
from nanoalign.distributed import run
from nanoalign.losses import pairwise_reward_loss
from nanoalign.models import RewardModel
from nanoalign.records import Example, Pair, by_preference, conditioned
from nanoalign.rows import collate, encode_all
from nanoalign.tiny import plant, world


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 records in PKU-SafeRLHF's format, whose two labels agree in every second one."""
    records = [
        {"prompt": e.prompt, "response_0": e.responses[0], "response_1": e.responses[1],
         "better_response_id": i // 2 % 2, "safer_response_id": (i // 2 + i) % 2}
        for i, e in enumerate(examples(20))
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "both.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _train(argv: list[str]) -> None:
    train_rm.curves = lambda *args: None
    run(partial(train_rm.main, argv))


def _evaluate(argv: list[str]) -> None:
    evaluate.reward_picture = lambda *args: None
    sys.argv = ["evaluate.py", *argv]
    run(evaluate.main)


@pytest.fixture(scope="module")
def train(llama_folder, data):
    def trained(out: Path, *flags: object, ranks: int = 1) -> list[dict]:
        argv = ["--model", llama_folder, "--data", data, "--eval_data", data, "--out", out,
                "--batch_size", 5, "--lr", 3e-3, "--template", "pku", "--steps", 6, *flags]  # fmt: skip
        outcome = run_ranks(ranks, _train, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return trained


@pytest.fixture(scope="module")
def both(train, tmp_path_factory) -> tuple[list[dict], Path]:
    """A reward model of two outputs."""
    out = tmp_path_factory.mktemp("runs") / "both"
    return train(out, "--preference", "better", "safer"), out


def evaluated(out: Path, model: Path, data: Path, *flags: object) -> tuple[list[dict], dict]:
    argv = ["rm", "--model", model, "--data", f"set={data}", "--out", out, *flags]
    outcome = run_ranks(1, _evaluate, [str(arg) for arg in argv])
    assert outcome.codes == [0], outcome.stderr
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "metrics.json").read_text())


# --- several preferences


def test_each_label_is_a_pair_in_its_dimension(data):
    """Record 0: both labels say response_0. Record 1: better says 0, safer 1. Record 2: better 1, safer 1."""
    first, second, third = read_examples(str(data), ("better", "safer"))[:3]
    originals = examples(3)
    assert first.pairs == second.pairs[:1] + (Pair(0, 1, dimension=1),)
    assert second.pairs == (Pair(0, 1), Pair(1, 0, dimension=1))
    assert second.responses == originals[1].responses
    assert third.responses == originals[2].responses[::-1]  # the better one first
    assert third.pairs == (Pair(0, 1), Pair(0, 1, dimension=1))


def test_the_loss_is_the_mean_over_preferences_by_hand(tokenizer):
    """Rewards by both preferences: (3, 1) and (1, 2); better says the first, safer the second: 2 and 1."""
    example = Example("a", "text", "p", ("x", "y"), pairs=(Pair(0, 1), Pair(1, 0, dimension=1)))
    batch = collate(encode_all([example], tokenizer, "raw")[0])
    args = train_rm.parse_args(["--preference", "better", "safer"])
    rewards = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    losses, values = train_rm.loss_of_batch(lambda _: rewards, args, batch)
    expected = pairwise_reward_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.0]))
    assert torch.allclose(losses, expected) and batch.weights.tolist() == [0.5, 0.5]
    assert values["accuracy/safer"][1].tolist() == [False, True]


def test_two_outputs_on_one_rank_and_on_two(train, both, tmp_path):
    assert {"accuracy", "accuracy/better", "accuracy/safer"} < both[0][1].keys()
    assert_same_curve(both[0], train(tmp_path / "two", "--preference", "better", "safer", ranks=2))


def test_two_outputs_are_saved_with_their_names(both, data, tmp_path, tokenizer):
    """transformers' own logits are the scores that evaluate.py gives, output by output."""
    model = AutoModelForSequenceClassification.from_pretrained(both[1])
    assert model.config.id2label == {0: "better", 1: "safer"}
    lines, figures = evaluated(tmp_path / "e", both[1], data)
    assert list(figures["subsets"]) == ["set/better", "set/safer"]
    found = {(x["subset"], x["prompt"], x["response"]): x["score"] for x in lines}
    for example, row in zip(
        read_examples(str(data)),
        encode_all(read_examples(str(data)), tokenizer, "pku")[0],
        strict=True,
    ):
        for response, tokens in zip(example.responses, row.responses, strict=True):
            ids = torch.tensor(np.concatenate([row.prompt, tokens])[None].astype(np.int64))
            with torch.no_grad():
                logits = model(ids).logits[0].tolist()
            for name, logit in zip(("better", "safer"), logits, strict=True):
                score = found[f"set/{name}", example.prompt, response]
                assert score == pytest.approx(logit, abs=1e-5)


def test_combined_rewards_are_the_weighted_sum(both, data, tmp_path):
    apart, _ = evaluated(tmp_path / "apart", both[1], data)
    lines, figures = evaluated(
        tmp_path / "sum",
        both[1],
        data,
        "--combine",
        "better=1",
        "safer=-2.5",
        "--preference",
        "better",
    )
    score = {(x["subset"], x["prompt"], x["response"]): x["score"] for x in apart}
    for x in lines:
        parts = [score[f"set/{name}", x["prompt"], x["response"]] for name in ("better", "safer")]
        assert x["score"] == pytest.approx(parts[0] - 2.5 * parts[1], abs=1e-5)
    assert figures["subsets"].keys() == {"set"}


def test_a_weight_counts_for_a_single_output_too(train, data, tmp_path):
    """-2 times the rewards, against the labels of the one name that is given."""
    train(tmp_path / "one", "--preference", "safer")
    plain, figures = evaluated(tmp_path / "plain", tmp_path / "one", data)
    turned, others = evaluated(tmp_path / "turned", tmp_path / "one", data, "--combine", "safer=-2")
    assert [x["score"] for x in turned] == pytest.approx([-2 * x["score"] for x in plain], abs=1e-6)
    assert others["all"]["accuracy"] == pytest.approx(1 - figures["all"]["accuracy"])


def test_a_single_preference_of_several_can_be_asked_for(both, data, tmp_path):
    _, figures = evaluated(tmp_path / "one", both[1], data, "--preference", "safer")
    assert figures["subsets"].keys() == {"set/safer"}


# --- conditioned


def test_the_mark_stands_behind_the_last_question(tokenizer):
    """There it stays when a prompt that is too long loses its beginning."""
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    for kind, prompt, marked in (
        ("text", "p", "p [safer]"),
        ("dialogue", "\n\nHuman: a\n\nAssistant: b\n\nHuman:c\n\nAssistant:",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman:c [safer]\n\nAssistant:"),
        ("messages", messages, (messages[0], {"role": "user", "content": "u [safer]"})),
    ):  # fmt: skip
        example = Example("x", kind, prompt, ("a", "b"))
        assert conditioned(example, "safer").prompt == marked
    long = conditioned(Example("x", "text", "word " * 100, ("a", "b")), "safer")
    ((row,), counts) = encode_all([long], tokenizer, "pku", max_length=64)
    assert "[safer] ASSISTANT:" in tokenizer.decode(row.prompt)
    assert counts["prompts cut at their beginning"] == 1
    example = Example("x", "text", "p", ("a", "b"), pairs=(Pair(0, 1), Pair(1, 0, dimension=1)))
    better, safer = by_preference(example, ("better", "safer"))
    assert (better.prompt, safer.prompt) == ("p [better]", "p [safer]")
    assert (better.pairs, safer.pairs) == ((Pair(0, 1),), (Pair(1, 0),))


def test_a_conditioned_model_reads_the_prompt_that_names_the_preference(
    train, data, tmp_path, tokenizer
):
    train(tmp_path / "rm", "--preference", "better", "safer", "--condition")
    lines, figures = evaluated(tmp_path / "e", tmp_path / "rm", data)
    assert list(figures["subsets"]) == ["set/better", "set/safer"]
    model = RewardModel.load(tmp_path / "rm", trainable=False)
    for name in ("better", "safer"):
        for example in read_examples(str(data))[:5]:
            rows, _ = encode_all([conditioned(example, name)], tokenizer, "pku")
            with torch.no_grad():
                expected = model(collate(rows)).tolist()
            found = {x["response"]: x["score"] for x in lines
                     if x["subset"] == f"set/{name}" and x["prompt"] == example.prompt}  # fmt: skip
            assert [found[r] for r in example.responses] == pytest.approx(expected, abs=1e-5)
    both, _ = evaluated(tmp_path / "s", tmp_path / "rm", data, "--combine", "better=1", "safer=2",
                        "--preference", "better")  # fmt: skip
    parts = {(x["subset"], x["prompt"], x["response"]): x["score"] for x in lines}
    for x in both:
        expected = parts["set/better", x["prompt"], x["response"]]
        expected += 2 * parts["set/safer", x["prompt"], x["response"]]
        assert x["score"] == pytest.approx(expected, abs=1e-5)


# --- length


def test_length_is_part_of_the_loss_and_not_of_the_reward(tokenizer):
    """Rewards 1 and 0, lengths worth 0.5 and 2: the loss is of a difference of -0.5, the margin is 1."""
    batch = collate(encode_all([Example("a", "text", "p", ("x", "yyyy"))], tokenizer, "raw")[0])

    def model(batch, by_length):
        return torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])

    losses, values = train_rm.loss_of_batch(model, train_rm.parse_args(["--length_debias"]), batch)
    assert losses.item() == pytest.approx(np.log1p(np.exp(0.5)))
    assert values["rewards/margins"].item() == 1 and values["accuracy"].item() == 1


def test_labels_by_length_alone_are_explained_by_length(llama_folder, tmp_path):
    """The longer answer is always preferred: the coefficient takes that up, and the reward less of it."""
    records = []
    for e in examples(40):
        short, long = sorted(e.responses, key=len)
        records.append({"prompt": e.prompt, "chosen": long + "!!!", "rejected": short})
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    margin = {}
    for name, flags in {"plain": [], "debiased": ["--length_debias"]}.items():
        argv = ["--model", llama_folder, "--data", path, "--eval_data", path, "--out", tmp_path / name,
                "--batch_size", 8, "--lr", 1e-3, "--template", "raw", "--steps", 20, *flags]  # fmt: skip
        outcome = run_ranks(1, _train, [str(arg) for arg in argv])
        assert outcome.codes == [0], outcome.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        margin[name] = json.loads(lines[-1])["eval/rewards/margins"]
    worth = re.search(r"a token is worth (\S+) in the labels", outcome.stdout)[1]
    assert float(worth) > 0.02
    assert margin["debiased"] < margin["plain"]
    saved = RewardModel.load(tmp_path / "debiased", trainable=False)
    assert saved.length is None and saved.head.out_features == 1


def test_the_coefficient_is_resumed(train, tmp_path):
    """6 steps == 3 + resume + 3 on two ranks, to the byte."""
    whole = train(tmp_path / "whole", "--length_debias", "--save_every", 3, ranks=2)
    train(tmp_path / "parts", "--length_debias", "--stop_after", 3, ranks=2)
    assert (
        train(tmp_path / "parts", "--length_debias", "--resume", "--save_every", 3, ranks=2)
        == whole
    )
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- labels that are wrong in a known way


def test_planted_labels():
    """Without bias or flips the labels are the rule's; with all turned its opposite; length alone decides."""
    honest = world.records("test", "tiny-a")
    agreement = {
        name: world.oracle_accuracy(plant.planted(honest, bias, flip))
        for name, bias, flip in (("honest", 0, 0), ("turned", 0, 1), ("a fifth", 0, 0.2))
    }
    assert agreement["honest"] == pytest.approx(world.label_ceiling(honest), abs=0.04)
    assert agreement["turned"] == pytest.approx(1 - agreement["honest"])
    mixed = 0.8 * agreement["honest"] + 0.2 * agreement["turned"]
    assert agreement["a fifth"] == pytest.approx(mixed, abs=0.04)
    for record in plant.planted(honest, 1e6, 0):
        words = [len(record[f"response_{i}"].split()) for i in (0, 1)]
        assert words[0] == words[1] or record["better_response_id"] == int(words[1] > words[0])


# --- bad input


def test_bad_flags(both, data, llama_folder, tmp_path, subtests):
    train = ["--model", llama_folder, "--data", data, "--out", tmp_path / "x"]
    rm = ["rm", "--model", both[1], "--data", f"set={data}", "--out", tmp_path / "x"]
    policy = ["policy", "--policy", llama_folder, "--baseline", llama_folder, "--reward", both[1],
              "--data", data, "--template", "pku", "--out", tmp_path / "x"]  # fmt: skip
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    cases = {
        "condition on one": (_train, [*train, "--condition"], "give --preference better safer"),
        "one twice": (_train, [*train, "--preference", "safer", "safer"], "each may be named once"),
        "one label alone": (_train, [*train, "--data", single, "--preference", "better", "safer"],
                            "single.jsonl:1: a record of 'prompt + chosen + rejected' has one label"),
        "another head": (_train, ["--model", both[1], *train[2:]], "head of 2 outputs, and 1 are wanted"),
        "unknown name": (_evaluate, [*rm, "--combine", "nice=1"],
                         "no preference 'nice'; it has better, safer"),
        "a name twice": (_evaluate, [*rm, "--combine", "better=1", "better=2"], "names a preference twice"),
        "whose labels": (_evaluate, [*rm, "--combine", "better=1", "safer=2"], "say whose labels"),
        "other outputs": (_train, ["--model", both[1], *train[2:], "--preference", "safer", "better"],
                          "was trained with preferences ['better', 'safer'], and is to be trained on with"),
        "length of two": (_train, [*train, "--preference", "better", "safer", "--length_debias"],
                          "one coefficient of length; give one --preference"),
        "no number": (_evaluate, [*rm, "--combine", "better"], "expected NAME=NUMBER, got 'better'"),
        "a judge of two minds": (_evaluate, policy, "judges by better, safer; say which with --combine"),
    }  # fmt: skip
    for name, (script, argv, message) in cases.items():
        with subtests.test(name):
            outcome = run_ranks(1, script, [str(arg) for arg in argv])
            assert outcome.codes == [1]
            assert re.search(f"error: .*{re.escape(message)}", outcome.stderr), outcome.stderr
    assert not (tmp_path / "x").exists()
