"""python -m pytest tests/evaluation/test_implicit.py

The rewards that a policy implies: by transformers' own logits, and as its training measured them.
"""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, records, tiny_llama, write_pairs
from evaluations import evaluated
from trainings import train
from transformers import AutoModelForCausalLM

import evaluate
from nanoalign.errors import RunError

WAYS = ("sum", "per_token")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """A policy, its reference, one with other tokens, and 7 pairs."""
    folder = tmp_path_factory.mktemp("implicit")
    for seed, name in enumerate(("policy", "base")):
        tiny_llama(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny_llama(vocab_size=260).save_pretrained(folder / "others")
    others = byte_tokenizer()
    others.add_tokens(["[more]"])
    others.save_pretrained(folder / "others")
    write_pairs(folder / "pairs.jsonl", 7)
    return folder


def argv(folder: Path, policy: str, reference: str, *flags: object) -> list[object]:
    models = ["--policy", folder / policy, "--reference", reference]
    return ["rm", *models, "--data", folder / "pairs.jsonl", "--out", folder / "out", *flags]


def logps(folder: Path, tokenizer, prompt: str, response: str) -> list[float]:
    """Of every token of a response and its EOS, by the logits of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    tokens = torch.tensor([tokenizer(prompt)["input_ids"] + ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, -len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def by_transformers(world: Path, tokenizer, beta: float, is_compared: bool) -> dict[str, list]:
    """The rewards of all responses of the pairs, both ways."""
    rewards = {way: [] for way in WAYS}
    for record in records(7):
        for response in record.responses:
            own = logps(world / "policy", tokenizer, record.prompt, response)
            if is_compared:
                others = logps(world / "base", tokenizer, record.prompt, response)
                own = [a - b for a, b in zip(own, others, strict=True)]
            rewards["sum"].append(beta * sum(own))
            rewards["per_token"].append(beta * sum(own) / len(own))
    return rewards


@pytest.mark.parametrize(
    ("reference", "ranks", "flags"),
    [("base", 1, []), ("base", 2, ["--no-share_prefix"]), ("none", 1, ["--beta", 0.5])],
)
def test_rewards_are_those_of_the_logits_of_transformers(world, tokenizer, reference, ranks, flags):
    """beta is 0.1 where nothing says it; without a reference rewards are log-probabilities."""
    is_compared = reference == "base"
    given = world / reference if is_compared else reference
    template = ["--template", "raw", "--micro_batch_tokens", 200]
    lines, figures, printed = evaluated(argv(world, "policy", given, *template, *flags), ranks)
    beta = 0.1 if is_compared else 0.5
    expected = by_transformers(world, tokenizer, beta, is_compared)
    for way, subset in zip(WAYS, ("pairs", "pairs/per_token"), strict=True):
        scores = [line["score"] for line in lines if line["subset"] == subset]
        assert scores == pytest.approx(expected[way], rel=1e-4, abs=1e-4)
    assert figures["subsets"].keys() == {"pairs", "pairs/per_token"}
    assert figures["all"] == figures["subsets"]["pairs"]  # which the other way does not change
    assert printed.count("14 responses to") == 1
    ratio = f"{world / 'policy'} / {given}" if is_compared else world / "policy"
    assert f"reward      {beta:g} * log({ratio}), summed over" in printed


def test_margins_are_those_that_the_training_measured(world, tmp_path):
    """beta, template and max_length are those of the run; its pairs are known to it."""
    flags = ["--beta", 0.3, "--max_length", 40, "--eval_data", world / "pairs.jsonl"]
    run = train(world / "base", world / "pairs.jsonl", tmp_path / "run", *flags, steps=3)
    measured = next(line for line in reversed(run) if "eval/rewards/margins" in line)
    of_run = argv(world, tmp_path / "run", world / "base")
    _, figures, printed = evaluated(of_run)
    assert figures["all"]["margin_mean"] == pytest.approx(
        measured["eval/rewards/margins"], rel=1e-4
    )
    assert figures["all"]["accuracy"] == pytest.approx(measured["eval/rewards/accuracies"])
    assert "template raw, max_length 40" in printed and figures["all"]["cut_count"] > 0
    assert f"7 of 7 pairs were trained on by --policy {tmp_path / 'run'}" in printed
    _, others, _ = evaluated([*of_run, "--beta", 0.6])
    assert others["all"]["margin_mean"] == pytest.approx(2 * figures["all"]["margin_mean"])


REFUSED = {
    "no reference": ("rm --policy P", "--policy needs --reference: the model that it started from"),
    "two judges": ("rm --policy P --reference R --model M", "--policy and --model: a policy takes"),
    "sum": ("rm --policy P --reference R --combine a=1", "--policy and --combine: a policy takes"),
    "no policy": ("rm --beta 0.2", "--reference and --beta are of a --policy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_do_not_go_together_are_refused(name):
    line, message = REFUSED[name]
    with pytest.raises(RunError, match=message):
        evaluate.parse_args(line.split())


def test_a_reference_with_other_tokens_and_a_file_of_no_run_are_refused(world, tmp_path):
    with pytest.raises(RunError, match="others has another vocabulary than the policy"):
        evaluate.main([str(x) for x in argv(world, "policy", world / "others")])
    tiny_llama().save_pretrained(tmp_path / "it")
    byte_tokenizer().save_pretrained(tmp_path / "it")
    (tmp_path / "it" / "args.json").write_text("[1]")
    with pytest.raises(RunError, match="args.json: expected a JSON object, found list"):
        evaluate.main([str(x) for x in argv(world, tmp_path / "it", world / "base")])


def test_the_default_model_is_taken_without_a_policy():
    (args,) = evaluate.parse_args(["rm"])
    assert args.model == "runs/rm" and args.policy is None
    (args,) = evaluate.parse_args(["rm", "--policy", "P", "--reference", "none"])
    assert args.model is None
