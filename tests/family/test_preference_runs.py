"""python -m pytest tests/family/test_preference_runs.py

Losses of the family in whole runs: on ranks, resumed, on data that they can't use.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, write_pairs
from preferences import argv, train_and_report
from processes import run_ranks
from safetensors.torch import load_file
from trainings import metrics_of

import train_dpo
from nanoalign.runs import result
from nanoalign.weights.folders import load_tokenizer


def _train_all(argv: list[str], runs: list[list[str]]) -> None:
    result.finish = lambda *args: None
    for flags in runs:
        train_dpo.main([*argv, *flags])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)


@pytest.fixture(scope="module")
def other(llama_folder, tmp_path_factory) -> Path:
    """A reference from which the policy is so far that kto's KL is above 0."""
    folder = tmp_path_factory.mktemp("other")
    tiny_llama(4).save_pretrained(folder)
    load_tokenizer(llama_folder).save_pretrained(folder)
    return folder


# Losses of each kind; those that look at a whole step or move something between steps.
OF_KINDS = ("sigmoid", "ipo", "apo_zero", "kto", "simpo", "cpo", "aot", "bco_pair")
VARIANTS = {name: ["--loss", name] for name in OF_KINDS} | {
    "core": [],
    "extras": ["--nll_weight", "0.1", "--ld_alpha", "0.5", "--length_alpha", "0.01", "--wpo"],
    "sync": ["--sync_reference_every", "2"],
}


def test_losses_of_each_kind_are_the_same_on_three_ranks(llama_folder, data, other, tmp_path):
    """3 steps of 7 pairs, in micro-batches of a few; kto's KL and aot's order of all pairs too.

    2 pairs are held out, so that a rank has a filler batch in evaluations. And --loss sigmoid has
    the curve of --loss dpo, to the last bit.
    """

    def trained(ranks: int, tokens: int):
        runs = [
            ["--out", str(tmp_path / f"{name} {ranks}"), "--steps", "3", *flags]
            for name, flags in VARIANTS.items()
        ]
        for run_flags in runs:
            if "kto" in run_flags:
                run_flags += ["--reference", str(other)]
        base = argv(llama_folder, data, tmp_path, "--micro_batch_tokens", tokens)
        return run_ranks(ranks, _train_all, base, runs, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(trained, (1, 3), (8192, 200)):
            assert set(outcome.codes) == {0}, outcome.stderr
    for name in VARIANTS:
        one, three = (metrics_of(tmp_path / f"{name} {ranks}") for ranks in (1, 3))
        for x, y in zip(one, three, strict=True):
            assert x.keys() == y.keys()
            for key in x:
                assert y[key] == pytest.approx(x[key], rel=2e-5, abs=2e-4), (name, key)
        assert len({line["loss"] for line in one if "loss" in line}) == 3, name
        assert name != "kto" or max(line.get("kl", 0.0) for line in one) > 0.1, one
    for ranks in (1, 3):
        assert metrics_of(tmp_path / f"core {ranks}") == metrics_of(tmp_path / f"sigmoid {ranks}")


KEPT = {
    "a mean reward": ["--loss", "bco_pair"],
    "a reference that moved": ["--sync_reference_every", "2"],
    # 23 training pairs in batches of 11: of each epoch's 3 steps the last is of one record.
    "a KL": ["--loss", "kto", "--batch_size", "11"],
}


@pytest.mark.parametrize("what", KEPT)
def test_what_an_objective_keeps_is_resumed(llama_folder, data, other, tmp_path, what):
    """6 steps == 3 + resume + 3, on two ranks, to the byte."""
    flags, stop = KEPT[what], 2 if what == "a KL" else 3
    if what == "a KL":
        flags = [*flags, "--reference", other]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, more in ((whole, []), (parts, ["--stop_after", stop]), (parts, ["--resume"])):
        flags_of_run = ["--steps", 6, "--save_every", stop, *flags, *more]
        outcome = run_ranks(2, train_and_report, argv(llama_folder, data, out, *flags_of_run))
        assert outcome.codes == [0, 0], outcome.stderr
    assert metrics_of(whole) == metrics_of(parts)
    saved = [load_file(out / "model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


# --- data


def test_data_that_a_loss_can_not_use_are_errors(llama_folder, tmp_path, subtests):
    record = {"prompt": "p", "completion": "c", "label": True}
    data = tmp_path / "single.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(2)))
    for loss, message in (
        ("kto", "all 2 responses have one label, true; .* undesirable"),
        ("dpo", "single.jsonl:1: a single completion, where pairs are needed"),
    ):
        with subtests.test(loss):
            out = tmp_path / "out"
            flags = argv(llama_folder, data, out, "--eval_data", data, "--loss", loss)
            outcome = run_ranks(1, train_and_report, flags)
            assert outcome.codes == [1], outcome.stderr
            assert re.search(f"error: .*{message}", outcome.stderr), outcome.stderr


def test_paired_and_unpaired_records_train_together(llama_folder, tmp_path):
    """From two files: a pair is two responses, an unpaired record one."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 6)
    lines = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    outcome = run_ranks(1, train_and_report, [
        "--model", str(llama_folder), "--data", str(pairs), str(tmp_path / "single.jsonl"),
        "--out", str(tmp_path / "out"), "--batch_size", "4", "--template", "raw", "--loss", "kto",
        "--steps", "2",
    ])  # fmt: skip
    assert outcome.codes == [0], outcome.stderr
