"""python -m pytest tests/test_preference_runs.py

Every loss of the family in whole runs: on ranks, resumed, and on the embedded world.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, write_pairs
from ranks import run_ranks
from safetensors.torch import load_file
from test_preference import argv, batches_of, objective_of, train_and_say

import train_dpo
from nanoalign import loop, tiny
from nanoalign.data import read_examples
from nanoalign.distributed import setup
from nanoalign.losses import LOSSES
from nanoalign.models import Policy
from nanoalign.preference import REFERENCE_FREE
from nanoalign.prepare import load_tokenizer
from nanoalign.records import Example
from nanoalign.rows import encode_all
from nanoalign.tiny import world


def _train_all(argv: list[str], runs: list[list[str]]) -> None:
    for flags in runs:
        _train_alone([*argv, *flags])


def _train_alone(argv: list[str]) -> None:
    train_dpo.curves = lambda *args: None
    train_dpo.main(argv)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {name: ["--loss", name] for name in LOSSES} | {
    "extras": ["--nll_weight", "0.1", "--ld_alpha", "0.5", "--length_alpha", "0.01", "--wpo"],
    "forward_kl": ["--divergence", "forward_kl"],
    "sync": ["--sync_reference_every", "2"],
}


def test_every_loss_is_the_same_on_two_ranks(llama_folder, pairs, tmp_path):
    """3 steps of 7 pairs, in micro-batches of a few; kto's KL and aot's order of all pairs too."""
    tiny_llama(4).save_pretrained(tmp_path / "other")
    load_tokenizer(llama_folder).save_pretrained(tmp_path / "other")

    def trained(ranks: int, tokens: int):
        runs = [
            ["--out", str(tmp_path / f"{name} {ranks}"), "--steps", "3", *flags]
            for name, flags in VARIANTS.items()
        ]
        for run_flags in runs:
            if "kto" in run_flags:  # of which the policy is so far that z is above 0
                run_flags += ["--reference", str(tmp_path / "other")]
        base = argv(llama_folder, pairs, tmp_path, "--micro_batch_tokens", tokens)
        return run_ranks(ranks, _train_all, base, runs)

    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(trained, (1, 2), (8192, 200)):
            assert set(outcome.codes) == {0}, outcome.stderr
    for name in VARIANTS:
        one, two = (metrics_of(tmp_path / f"{name} {ranks}") for ranks in (1, 2))
        for x, y in zip(one, two, strict=True):
            assert x.keys() == y.keys()
            for key in x:
                assert y[key] == pytest.approx(x[key], rel=2e-5, abs=2e-4), (name, key)
        assert len({line["loss"] for line in one if "loss" in line}) == 3, name
        assert name != "kto" or max(line.get("kl", 0.0) for line in one) > 0.1, one


REMEMBERS = {
    "a mean reward": ["--loss", "bco_pair"],
    "a reference that moved": ["--sync_reference_every", "2"],
    # 23 training pairs in batches of 11: of each epoch's 3 steps the last is of one record.
    "a KL": ["--loss", "kto", "--batch_size", "11"],
}


@pytest.mark.parametrize("what", REMEMBERS)
def test_what_a_loss_remembers_is_resumed(llama_folder, pairs, tmp_path, what):
    """6 steps == 3 + resume + 3, on two ranks, to the byte."""
    flags, stop = REMEMBERS[what], 2 if what == "a KL" else 3
    if what == "a KL":
        tiny_llama(4).save_pretrained(tmp_path / "other")
        load_tokenizer(llama_folder).save_pretrained(tmp_path / "other")
        flags = [*flags, "--reference", tmp_path / "other"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, more in ((whole, []), (parts, ["--stop_after", stop]), (parts, ["--resume"])):
        outcome = run_ranks(
            2,
            train_and_say,
            argv(llama_folder, pairs, out, "--steps", 6, "--save_every", stop, *flags, *more),
        )
        assert outcome.codes == [0, 0], outcome.stderr
    assert metrics_of(whole) == metrics_of(parts)
    saved = [load_file(out / "model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def clear_pairs(name: str, count: int) -> list[Example]:
    """Pairs of the embedded world whose chosen answer is better by 3 at least, by its rule: few will do."""
    return [
        e
        for e in read_examples(name)
        if world.true_reward(e.prompt, e.responses[0])
        > world.true_reward(e.prompt, e.responses[1]) + 3
    ][:count]


def _teach(names: list[str]) -> dict[str, tuple[dict, dict]]:
    """Thirty steps of three pairs with each loss: what 50 held-out pairs say before and after."""
    tokenizer = load_tokenizer(tiny.MODEL)
    base, reference = Policy.load("tiny"), Policy.load("tiny", trainable=False)
    rows, held_out = (
        encode_all(clear_pairs(name, count), tokenizer, "pku")[0]
        for name, count in (("tiny", 90), ("tiny:test", 50))
    )
    results = {}
    for name in names:
        policy = copy.deepcopy(base)
        # With its paper's tau discopop leaves a margin of 0 the wrong way: tests/test_loss_family.py.
        flags = ["--loss", name, *(["--tau", 1] if name == "discopop" else [])]
        objective = objective_of(policy, None if name in REFERENCE_FREE else reference, *flags)
        # An NLL is about the data alone, which the policy has seen much of: it wants smaller steps.
        peak = 3e-4 if name == "sft" else 1e-3
        args, optimizer = objective.args, torch.optim.AdamW(policy.parameters())
        # Where the policy is its reference, all pairs tie: the start-up check sees to that.
        before = {"eval/rewards/accuracies": 0.5}
        if objective.reference is None:
            before = loop.evaluate(objective, {"eval": held_out}, args, setup())
        for step in range(30):
            for group in optimizer.param_groups:
                group["lr"] = loop.get_lr(step, 30, peak, 0.0, "linear")
            some = rows[3 * step : 3 * step + 3]
            objective.survey(some, batches_of(args))
            for _, batch in batches_of(args)(some):
                found, values = objective(batch)
                (found.sum() / 3).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            objective.stepped(step + 1, {
                key: (value[0] if isinstance(value, tuple) else value).mean().item()
                for key, value in values.items()
            })  # fmt: skip
        results[name] = before, loop.evaluate(objective, {"eval": held_out}, args, setup())
    return results


def test_thirty_steps_on_the_embedded_world_teach(subtests):
    """With every loss the accuracy on held-out pairs rises above that of the start; sft's NLL falls."""
    names = list(LOSSES)
    teach = partial(run_ranks, 1, _teach, timeout=400)
    with ThreadPoolExecutor(2) as pool:  # a core each
        outcomes = list(pool.map(teach, [names[::2], names[1::2]]))
    for outcome in outcomes:
        assert outcome.codes == [0], outcome.stderr
        for name, (before, after) in outcome.results[0].items():
            with subtests.test(name):
                if name == "sft":
                    assert after["eval/loss"] < before["eval/loss"] - 0.005
                else:
                    key = "eval/rewards/accuracies"
                    assert after[key] > before[key] + 0.03
    assert set(names) == {name for outcome in outcomes for name in outcome.results[0]}
