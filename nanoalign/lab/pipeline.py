"""From the pretrained base to a policy, stage by stage: demonstrations, pairs, own answers.

Each stage is a command of the scripts, which is printed; behind it stands the mean grade of sampled
answers to held-out prompts by the rule behind the embedded labels (nanoalign/tiny/world.py).
"""

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanoalign.distributed import setup
from nanoalign.errors import RunError
from nanoalign.lab.lab import DPO_LR
from nanoalign.lab.sample import mean_and_interval, sample_answers
from nanoalign.model import TINY, Policy
from nanoalign.tiny.world import split_prompts, true_reward
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.slices import read_slices

ROOT = Path(__file__).parents[2]


def stages(out: Path, steps: int | None) -> list[tuple[str, list[list[str]], Path]]:
    """(name, commands, folder of the policy after it) of each stage. steps: of each training."""
    sft, dpo, own, rm = (str(out / name) for name in ("sft", "dpo", "own", "rm"))
    pairs = str(out / "own.jsonl")
    some = ["--steps", str(steps)] if steps else []
    train = ["train_dpo.py", "--lr", DPO_LR, "--eval_data", "tiny:test", *some]
    prompts = ["--data", "tiny*0.1" if steps else "tiny"]  # of the training data
    return [
        ("the pretrained base", [], TINY),
        ("demonstrations: the chosen answers, by SFT",
         [[*train, "--loss", "sft", "--out", sft]], Path(sft)),
        ("pairs: DPO, with the policy of before as the reference",
         [[*train, "--model", sft, "--out", dpo]], Path(dpo)),
        ("own answers: the best and the worst of four by a reward model, DPO",
         [["train_rm.py", "--out", rm, *some],
          ["evaluate.py", "policy", "--policy", dpo, "--baseline", sft, "--reward", rm, *prompts,
           "--samples", "4", "--pairs_out", pairs, "--out", str(out / "own_pairs")],
          [*train, "--model", dpo, "--data", pairs, "--out", own]], Path(own)),
    ]  # fmt: skip


def pipeline(out: Path, steps: int | None, prompts: int, seed: int) -> None:
    """Runs all stages, and prints and writes what each has gained: stages.json.

    steps: of each training; None: those of the scripts. Raises RunError if `out` exists, or if a
    command fails.
    """
    if out.exists():
        raise RunError(f"--out {out} exists; give another, or remove it")
    out.mkdir(parents=True)
    found, before = [], None
    for name, commands, folder in stages(out, steps):
        print(f"\n{name}", flush=True)
        for words in commands:
            run(words, out / "log.txt")
        grades = graded(folder, prompts, seed)
        gain = "" if before is None else f"  gained {mean_and_interval(grades - before)}"
        print(f"  true reward {mean_and_interval(grades)}{gain}", flush=True)
        found.append({"stage": name, "policy": str(folder), "true_reward": grades.mean().item()})
        before = grades
    (out / "stages.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nsaved       {out}: the policies, stages.json, log.txt")


def run(words: list[str], log: Path) -> None:
    """Runs a script in a process of its own; its output goes to the log."""
    print(f"  {shlex.join(['python', *words])}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RunError(f"{words[0]} has failed; the end of {log} has its error")


def graded(folder: Path, count: int, seed: int) -> np.ndarray:
    """The grades of one sampled answer to each of `count` test prompts, by the true rule."""
    prompts, world = split_prompts()["test"][:count], setup()
    with contextlib.redirect_stdout(sys.stderr):
        policy = Policy.load(folder, trainable=False, read=read_slices).to(world.device)
        answers, _ = sample_answers(policy, load_tokenizer(folder), prompts, seed, world)
    return np.array(list(map(true_reward, prompts, answers)))
