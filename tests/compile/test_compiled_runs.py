"""python -m pytest tests/compile/test_compiled_runs.py

--compile on: runs against plain ones, through inductor's code for a CPU. All runs of a test are in
one process, and all processes share torch's cache: so each graph is compiled once.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from processes import Outcome, run_ranks
from trainings import assert_same_curve, metrics_of, rm_without_picture, without_picture

# Flags of train_dpo.py; two subjects in a run where they do not hide each other.
RUNS = {
    "plain": ("--steps", "20"),
    "lora, ld_alpha": ("--lora_rank", "2", "--lora_targets", "q_proj", "--ld_alpha", "0.5"),
    "precomputed": ("--precompute_reference",),
    "kto, checkpointing": ("--loss", "kto", "--activation_checkpointing"),
    "rm": (),  # of train_rm.py
}
# The block without a gradient where parameters have one or not, and trained; two of the head.
GRAPHS = 5


def run(work: Path, name: str, compiled: str, *flags: str) -> None:
    main = rm_without_picture if name == "rm" else without_picture
    main(["--model", str(work / "llama"), "--data", str(work / "pairs.jsonl"), "--batch_size", "7",
          "--lr", "1e-2", "--template", "raw", "--steps", "3", "--micro_batch_tokens", "300",
          "--out", str(work / f"{name}_{compiled}"), "--compile", compiled, *RUNS[name],
          *flags])  # fmt: skip


def compiled_run(work: Path, out: str) -> int:
    """A compiled run of the first of RUNS; returns how many graphs the process has compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "cache")
    run(work, "plain", "on", "--out", str(work / out))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def all_runs(work: Path) -> int:
    """Each of RUNS plainly and compiled; the first one, compiled, also from a checkpoint.

    Returns the number of graphs of the first compiled run.
    """
    graphs = compiled_run(work, "plain_on")
    run(work, "plain", "on", "--out", str(work / "resumed"), "--stop_after", "10")
    run(work, "plain", "on", "--out", str(work / "resumed"), "--resume")
    for name in RUNS:
        run(work, name, "off")
        if name != "plain":
            run(work, name, "on")
    return graphs


def results_of(outcome: Outcome) -> list:
    assert set(outcome.codes) == {0}, outcome.stderr
    assert "off for the whole run" not in outcome.stdout
    return outcome.results


@pytest.fixture(scope="module")
def work(tmp_path_factory, llama_folder) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "llama").symlink_to(llama_folder)
    write_pairs(folder / "pairs.jsonl", 60)
    return folder, results_of(run_ranks(1, all_runs, folder, timeout=600))


@pytest.mark.parametrize("name", RUNS)
def test_curves_of_compiled_runs_are_those_of_plain_ones(work, name):
    plain, compiled = (metrics_of(work[0] / f"{name}_{how}") for how in ("off", "on"))
    assert_same_curve(plain, compiled)
    assert plain != compiled  # it did run other kernels


def test_a_compiled_run_that_was_continued_is_the_same_bit_for_bit(work):
    assert metrics_of(work[0] / "resumed") == metrics_of(work[0] / "plain_on")


def test_20_steps_of_other_lengths_need_no_further_graph(work):
    assert work[1] == [GRAPHS]


def test_on_two_ranks(work):
    """Blocks are compiled, then sharded; the curve is that of one rank."""
    assert results_of(run_ranks(2, compiled_run, work[0], "two", timeout=600)) == [GRAPHS] * 2
    assert_same_curve(metrics_of(work[0] / "plain_on"), metrics_of(work[0] / "two"))


def without_a_compiler(work: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "empty")
    torch._inductor.config.cpp.cxx = (str(work / "missing"),)
    run(work, "precomputed", "on")


def test_what_cant_be_compiled_is_named_and_the_whole_run_is_plain(work, tmp_path, llama_folder):
    (tmp_path / "llama").symlink_to(llama_folder)
    (tmp_path / "pairs.jsonl").symlink_to(work[0] / "pairs.jsonl")
    outcome = run_ranks(1, without_a_compiler, tmp_path)
    assert outcome.codes == [0], outcome.stderr
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("compile ")]
    assert "off for the whole run, which is plain: InductorError: InvalidCxxCompiler" in line
    plain, failed = work[0] / "precomputed_off", tmp_path / "precomputed_on"
    assert_same_curve(metrics_of(plain), metrics_of(failed))
