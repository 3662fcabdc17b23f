"""Shared by the tests of the family: flags, models, rows, and what they give.

A test that uses a fixture imports it by the name of its function.
"""

import argparse
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_llama

import train_dpo
from nanoalign import loop
from nanoalign.batch import collate
from nanoalign.distributed import run, setup
from nanoalign.encode import encode_all
from nanoalign.family import objectives
from nanoalign.model import Policy
from nanoalign.ranks.report import report
from nanoalign.runs import result


def settings(*flags: object) -> argparse.Namespace:
    return train_dpo.parse_args([str(flag) for flag in flags])


@pytest.fixture(scope="module", name="models")
def fixture_of_models() -> tuple[Policy, Policy]:
    return Policy(tiny_llama(0)), Policy(tiny_llama(1)).requires_grad_(False)


@pytest.fixture(scope="module", name="rows")
def fixture_of_rows(tokenizer):
    return encode_all(records(9), tokenizer)


@pytest.fixture(scope="module", name="objective_of")
def fixture_of_objective_of(rows):
    def objective(policy: Policy, reference: Policy | None, *flags: object, rows: list = rows):
        return objectives.objective_of(policy, reference, rows, settings(*flags), setup())

    return objective


def batches_of(tokens: int) -> loop.Batcher:
    return loop.Batcher(setup(), tokens)


@pytest.fixture(scope="module", name="logps")
def fixture_of_logps(models, rows) -> dict[str, torch.Tensor]:
    """Log-probabilities and log-ratios of the 9 pairs: (9,) each."""
    batch, found = collate(rows), {}
    with torch.no_grad():
        for name, model in zip(("policy", "reference"), models, strict=True):
            both = model(batch)
            found[f"{name}_chosen"] = both[batch.chosen]
            found[f"{name}_rejected"] = both[batch.rejected]
    for side in ("chosen", "rejected"):
        found[side] = found[f"policy_{side}"] - found[f"reference_{side}"]
        found[f"{side}_lengths"] = batch.lengths[getattr(batch, side)].float()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def train_and_report(argv: list[str]) -> None:
    result.finish = lambda *args: None  # the picture takes longer than the training
    run(partial(train_dpo.main, argv), report)


def argv(folder: Path, pairs: Path, out: Path, *flags: object) -> list[str]:
    base = ["--model", folder, "--data", pairs, "--out", out, "--batch_size", 7, "--lr", 1e-2,
            "--template", "raw", *flags]  # fmt: skip
    return [str(flag) for flag in base]
