"""From the pretrained base to a policy, stage by stage: demonstrations, pairs, own answers.

The commands of each stage are printed, and after them the mean true reward of sampled answers to
held-out prompts (nanoalign/tiny/world.py).
"""

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanoalign.data.templates import encode_records
from nanoalign.distributed import World, setup
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import Sampling, generate
from nanoalign.lab.lab import DPO_LR
from nanoalign.model import TINY, Policy
from nanoalign.records import Record
from nanoalign.tiny.world import split_prompts, true_reward
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.slices import read_slices

MAX_NEW_TOKENS = 64  # the longest answers of the three sources have 57 tokens
ROOT = Path(__file__).parents[2]
TRAIN = f"train_dpo.py --lr {DPO_LR} --eval_data tiny:test"
STAGES = {
    "the pretrained base": [],
    "demonstrations: the chosen answers, by SFT": [f"{TRAIN} --loss sft --out {{out}}/sft"],
    "pairs: DPO, with the policy of the stage before as the reference": [
        f"{TRAIN} --model {{out}}/sft --out {{out}}/dpo"
    ],
    "own answers: the best and the worst of four by a reward model, DPO": [
        "train_rm.py --out {out}/rm",
        "evaluate.py policy --policy {out}/dpo --baseline {out}/sft --reward {out}/rm "
        "--data {prompts} --samples 4 --pairs_out {out}/own.jsonl --out {out}/own_pairs",
        f"{TRAIN} --model {{out}}/dpo --data {{out}}/own.jsonl --out {{out}}/own",
    ],
}


def stages(out: Path, steps: int | None) -> list[tuple[str, list[list[str]], Path]]:
    """(name, commands, folder of the policy after it) of each stage. steps: of each training."""
    prompts = "tiny" if steps is None else "tiny*0.1"  # of the training data
    found = []
    for name, commands in STAGES.items():
        split = [[w.format(out=out, prompts=prompts) for w in text.split()] for text in commands]
        folder = Path(split[-1][-1]) if split else TINY
        if steps is not None:
            split = [words + ["--steps", str(steps)] * ("train" in words[0]) for words in split]
        found.append((name, split, folder))
    return found


def pipeline(out: Path, steps: int | None, prompts: int, seed: int) -> None:
    """Runs all stages, prints the gain of each, and writes stages.json.

    steps: of each training; None: as many as the scripts take. Raises RunError if `out` exists, or
    if a command fails.
    """
    if out.exists():
        raise RunError(f"--out {out} exists; give another, or remove it")
    out.mkdir(parents=True)
    results, before = [], None
    for name, commands, folder in stages(out, steps):
        print(f"\n{name}", flush=True)
        for words in commands:
            run(words, out / "log.txt")
        grades = graded(folder, prompts, seed)
        gain = "" if before is None else f"  gained {mean_and_interval(grades - before)}"
        print(f"  true reward {mean_and_interval(grades)}{gain}", flush=True)
        results.append({"stage": name, "policy": str(folder), "true_reward": grades.mean().item()})
        before = grades
    (out / "stages.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nsaved       {out}: the policies, stages.json, log.txt")


def run(words: list[str], log: Path) -> None:
    """Runs a script in a process of its own; its output is appended to the log."""
    print(f"  {shlex.join(['python', *words])}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RunError(f"{words[0]} has failed; the end of {log} has its error")


def graded(folder: Path, count: int, seed: int, other: int | None = None) -> np.ndarray:
    """The grades of one sampled answer to each of `count` test prompts, by the true rule.

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


def mean_and_interval(values: np.ndarray) -> str:
    """The mean of `values`, (prompts,), and its 95 % interval by resampling prompts, as text."""
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return f"{values.mean():+.3f}  [{low:+.3f}, {high:+.3f}]"
