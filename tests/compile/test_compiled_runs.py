"""python -m pytest tests/compile/test_compiled_runs.py

--compile on: runs against plain ones, through inductor's code for a CPU. All runs of a test are in
one process, and all processes share torch's cache: so each graph is compiled once.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from processes import run_ranks
from trainings import assert_same_curve, metrics_of, rm_without_picture, without_picture

# Flags of train_dpo.py.
RUNS = {
    "plain": ("--steps", "20"),
    "lora": ("--lora_rank", "2", "--lora_targets", "q_proj"),
    "precomputed": ("--precompute_reference",),
    "kto": ("--loss", "kto"),
    "ld_alpha": ("--ld_alpha", "0.5"),
    "checkpointing": ("--activation_checkpointing",),
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


def both(work: Path, names: list[str]) -> int:
    """Runs each name plainly and compiled; continues the first one, compiled, from a checkpoint.

    Returns the number of graphs of the first compiled run.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "cache")
    for name in names:
        run(work, name, "off")
        run(work, name, "on")
        if name == names[0]:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run(work, names[0], "on", "--out", str(work / "resumed"), "--stop_after", "10")
    run(work, names[0], "on", "--out", str(work / "resumed"), "--resume")
    return graphs


def start(folder: Path, llama: Path, ranks: int, names: list[str]) -> tuple[Path, list]:
    (folder / "llama").symlink_to(llama)
    write_pairs(folder / "pairs.jsonl", 60)
    outcome = run_ranks(ranks, both, folder, names, timeout=600)
    assert outcome.codes == [0] * ranks, outcome.stderr
    assert "off for the whole run" not in outcome.stdout
    return folder, outcome.results


@pytest.fixture(scope="module")
def work(tmp_path_factory, llama_folder):
    return start(tmp_path_factory.mktemp("compiled"), llama_folder, 1, [*RUNS])


@pytest.mark.parametrize("name", RUNS)
def test_curves_of_compiled_runs_are_those_of_plain_ones(work, name):
    plain, compiled = (metrics_of(work[0] / f"{name}_{how}") for how in ("off", "on"))
    assert_same_curve(plain, compiled)
    assert plain != compiled  # it did run other kernels


def test_a_compiled_run_that_was_continued_is_the_same_bit_for_bit(work):
    assert metrics_of(work[0] / "resumed") == metrics_of(work[0] / "plain_on")


def test_20_steps_of_other_lengths_need_no_further_graph(work):
    assert work[1] == [GRAPHS]


def test_on_two_ranks(work, tmp_path, llama_folder):
    """Blocks are compiled, then sharded."""
    (tmp_path / "cache").symlink_to(work[0] / "cache")
    folder, results = start(tmp_path, llama_folder, 2, ["plain"])
    assert_same_curve(metrics_of(work[0] / "plain_on"), metrics_of(folder / "plain_on"))
    assert_same_curve(metrics_of(folder / "plain_off"), metrics_of(folder / "plain_on"))
    assert metrics_of(folder / "resumed") == metrics_of(folder / "plain_on")
    assert results == [GRAPHS] * 2


def without_a_compiler(work: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "empty")
    torch._inductor.config.cpp.cxx = (str(work / "missing"),)
    run(work, "ld_alpha", "on")


def test_what_cant_be_compiled_is_named_and_the_whole_run_is_plain(work, tmp_path, llama_folder):
    (tmp_path / "llama").symlink_to(llama_folder)
    (tmp_path / "pairs.jsonl").symlink_to(work[0] / "pairs.jsonl")
    outcome = run_ranks(1, without_a_compiler, tmp_path)
    assert outcome.codes == [0], outcome.stderr
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("compile ")]
    assert "off for the whole run, which is plain: InductorError: InvalidCxxCompiler" in line
    assert_same_curve(metrics_of(work[0] / "ld_alpha_off"), metrics_of(tmp_path / "ld_alpha_on"))
