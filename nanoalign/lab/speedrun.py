"""A speed run: which policy do 60 CPU seconds of training make, from the base and 3,000 pairs?

    python -m nanoalign.lab speedrun docs/speedrun/ipo.py --against docs/speedrun/beta.py

An entry is a Python file of at most 40 lines with FLAGS, a string of flags of train_dpo.py, and, if
it likes, a loss_of_batch that replaces the one of train_dpo.py. It is trained with three seeds, on
one thread and in a process each, whose user and system time is limited. The score is the mean true
reward of one sampled answer to each of 600 held-out prompts, over the seeds. Two entries share
seeds and prompts, so their difference is more certain than their scores.
"""

import contextlib
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import train_dpo
from nanoalign.data.templates import encode_records
from nanoalign.distributed import World, run, setup
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import Sampling, generate
from nanoalign.lab.findings import estimate
from nanoalign.model import Policy
from nanoalign.ranks import report
from nanoalign.records import Record
from nanoalign.tiny.world import split_prompts, true_reward
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.slices import read_slices

MAX_NEW_TOKENS = 64  # the longest answers of the three sources have 57 tokens
SECONDS, LINES, SEEDS, PROMPTS = 60, 40, (0, 1, 2), 600
# What an entry may not change: where it starts, what it learns from, and where it writes. Nor may
# it choose a step by the held-out pairs, whose prompts give the score.
FIXED = {"--model", "--reference", "--data", "--eval_data", "--seed", "--out", "--resume"}
FIXED |= {"--keep_best", "--patience"}


def speedrun(entry: Path, other: Path | None = None) -> None:
    """Prints the score of an entry, and with another one their difference."""
    scores = scores_of(entry)
    if other is not None:
        print(f"difference  {estimate(scores - scores_of(other))}: {entry} minus {other}")


def scores_of(entry: Path, seconds: float = SECONDS, prompts: int = PROMPTS) -> np.ndarray:
    """Trains an entry with all seeds, and prints CPU seconds and score of each.

    Returns the true reward of each answer, (seeds, prompts). Raises RunError for an entry that
    breaks a rule, whose training fails, or takes too long.
    """
    check_entry(entry)
    grades = []
    with TemporaryDirectory() as folder:
        for seed in SEEDS:
            out = Path(folder) / f"seed_{seed}"
            command = [sys.executable, "-m", "nanoalign.lab.speedrun", entry, str(seed), out]
            before = cpu_seconds()
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
            )
            taken = cpu_seconds() - before
            if done.returncode:
                raise RunError(f"{entry} with seed {seed} has failed:\n{done.stderr[-2000:]}")
            if taken > seconds:
                raise RunError(f"{entry} took {taken:.1f} CPU seconds; {seconds:g} are allowed")
            grades.append(graded(out, prompts, seed))
            print(f"seed {seed}      {taken:.1f} CPU s, true reward {grades[-1].mean():.3f}")
    scores = np.stack(grades)
    print(f"score       {estimate(scores)} over {len(SEEDS)} seeds and {prompts} prompts")
    return scores


def check_entry(entry: Path) -> None:
    """Raises RunError for an entry that is too long, or whose flags may not be given."""
    lines = [line for line in entry.read_text().splitlines() if line.strip()]
    if len(lines) > LINES:
        raise RunError(f"{entry} has {len(lines)} lines; {LINES} are allowed")
    flags = runpy.run_path(str(entry)).get("FLAGS")
    if not isinstance(flags, str):
        raise RunError(f"{entry} has no FLAGS, a string of flags of train_dpo.py; '' changes none")
    for word in flags.split():
        if word.partition("=")[0] in FIXED:
            raise RunError(f"{entry}: {word} is the same for all entries; leave it out")


def cpu_seconds() -> float:
    """User and system time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(entry: str, seed: str, out: str) -> None:
    """Trains one seed of an entry in this process."""
    names = runpy.run_path(entry)
    train_dpo.loss_of_batch = names.get("loss_of_batch", train_dpo.loss_of_batch)
    fixed = ["--data", "tiny", "--seed", seed, "--out", out]
    train_dpo.main([*names["FLAGS"].split(), *fixed])


# --- the true reward of a policy ------------------------------------------------------------------


def graded(folder: Path, count: int, seed: int, other: int | None = None) -> np.ndarray:
    """The grades of one sampled answer to each of `count` test prompts, by the ground truth.

    other: the seed of another world.
    """
    prompts, world = split_prompts(other)["test"][:count], setup()
    with contextlib.redirect_stdout(sys.stderr):
        policy = Policy.load(folder, trainable=False, read=read_slices).to(world.device)
        answers = sample_answers(policy, load_tokenizer(folder), prompts, seed, world)
    return np.array(list(map(true_reward, prompts, answers)))


def sample_answers(
    policy: Policy, tokenizer, prompts: list[str], seed: int, world: World
) -> list[str]:
    """An answer to each prompt, sampled at temperature 1, as text without special tokens."""
    records = [Record(prompt, (), (), name=prompt) for prompt in prompts]
    rows = encode_records(records, tokenizer, 1024, "pku")
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=100)
    answers = generate(policy, rows, {tokenizer.eos_token_id}, sampling, world)
    return tokenizer.batch_decode([a.tokens for (a,) in answers], skip_special_tokens=True)


if __name__ == "__main__":
    run(lambda: train(*sys.argv[1:]), report.report)
