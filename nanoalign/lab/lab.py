"""The functions of which experiments are made: data, trainings, evaluations, and their grid.

Shapes: S seeds, P prompts.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np

from nanoalign.lab.figures import grades, hits, read, unit
from nanoalign.lab.runs import Runs, flag_words
from nanoalign.tiny import world

DPO_LR = "5e-4"  # the default of --model tiny; a folder has another default
# Held-out pairs of a training whose own evaluations are not read; those of 600 pairs would take a
# third of its time.
FEW = 10
T = TypeVar("T")


class Lab:
    """The size of an experiment, and functions that run the scripts for it."""

    def __init__(self, runs: Runs, quick: bool, seeds: Sequence[int] | None = None):
        """seeds: of all trainings and samplings; default: 0 if quick, else 0, 1 and 2."""
        self.runs, self.quick = runs, quick
        self.seeds = tuple(seeds or ((0,) if quick else (0, 1, 2)))
        self.prompts = 150 if quick else 600  # held-out prompts, on which all is measured

    def pick(self, quick: T, full: T) -> T:
        """A setting of a quick or of a full experiment."""
        return quick if self.quick else full

    def grid(self, function: Callable, **axes: Iterable) -> dict:
        """Calls function(lab, seed, **values) for each seed and combination of the axes' values.

        function returns figures by name, (P,) or numbers. The grid has the figures by name, (S, P)
        or (S, 1), of each combination: its key is the tuple of values, or with one axis the value.
        The calls run in threads, and their commands as many at a time as there are cores.
        """
        combinations = list(product(*axes.values()))
        with ThreadPoolExecutor(len(combinations) * len(self.seeds)) as threads:
            futures = {
                values: [
                    threads.submit(function, self, seed, **dict(zip(axes, values, strict=True)))
                    for seed in self.seeds
                ]
                for values in combinations
            }
        grid = {}
        for values, of_seeds in futures.items():
            by_seed = [future.result() for future in of_seeds]
            grid[values if len(values) != 1 else values[0]] = {
                name: np.stack([np.atleast_1d(figures[name]) for figures in by_seed])
                for name in by_seed[0]
            }
        return grid

    # --- data -------------------------------------------------------------------------------------

    def pairs(self, count: int, seed: int, source: str | None = None) -> list[dict]:
        """`count` training pairs, drawn by the seed: more begin with the same ones.

        source: of one assistant; None: of all three.
        """
        records = list(world_records("train", source))
        Random(f"pairs {seed}").shuffle(records)
        return records[:count]

    @cached_property
    def test_prompts(self) -> Path:
        """A file of the held-out prompts."""
        prompts = world.split_prompts()["test"][: self.prompts]
        return self.runs.write("prompts", [{"prompt": prompt} for prompt in prompts])

    def test_pairs(self, source: str | None = None, count: int | None = None) -> Path:
        """A file of held-out pairs of one assistant, or of all three."""
        records = world_records("test", source)[: count or self.prompts]
        return self.runs.write(f"test_{source or 'all'}", records)

    # --- trainings --------------------------------------------------------------------------------

    def train_dpo(self, data: Path | str, seed: int, *flags, model: Path | str = "tiny") -> Path:
        """Runs train_dpo.py, with evaluations before the first and after the last step alone.

        They are on FEW pairs, or with a flag --eval_share on that share of the data, which is held
        out. Returns the folder of the policy.
        """
        lr = () if "--lr" in flags else ("--lr", DPO_LR)
        few = ("--eval_data", self.test_pairs(count=FEW))
        held_out = () if "--eval_share" in flags else few
        words = flag_words(model=model, data=data, eval_every=10000, seed=seed)
        return self.runs.run("train_dpo.py", *words, *held_out, *lr, *flags)

    def train_rm(self, data: Path | str, seed: int, *flags) -> Path:
        """Runs train_rm.py, by default for one epoch; returns the folder of the reward model."""
        epochs = () if "--epochs" in flags else ("--epochs", 1)
        words = flag_words(
            data=data, eval_data=self.test_pairs(count=FEW), eval_every=10000, seed=seed
        )
        return self.runs.run("train_rm.py", *words, *epochs, *flags)

    @cached_property
    def judge(self) -> Path:
        """The reward model that judges by default: trained on pairs of tiny-a for two epochs."""
        data = "tiny:tiny-a*0.3" if self.quick else "tiny:tiny-a"
        return self.train_rm(data, 0, "--epochs", 2)

    def own_pairs(
        self, policy: Path | str, prompts: Path | str, judge: Path, seed: int, samples: int = 4
    ) -> Path:
        """A file of the best and the worst of a policy's answers to each prompt, by a judge."""
        flags = ("--pairs_out", "{out}.jsonl")
        out = self.sample(policy, seed, judge, policy, samples, prompts, flags)
        return out.with_suffix(".jsonl")

    # --- figures ----------------------------------------------------------------------------------

    def sample(
        self,
        policy: Path | str,
        seed: int,
        judge: Path | None = None,
        baseline: Path | str = "tiny",
        samples: int = 1,
        prompts: Path | None = None,
        flags: tuple[str, ...] = (),
    ) -> Path:
        """Runs evaluate.py policy; returns its folder. The default judge is `judge`."""
        words = flag_words(
            policy=policy,
            baseline=baseline,
            reward=judge or self.judge,
            data=prompts or self.test_prompts,
            samples=samples,
            seed=seed,
            batch_size=256,
            max_new_tokens=64,
        )
        return self.runs.run("evaluate.py", "policy", *words, *flags)

    def graded(
        self, policy: Path | str, seed: int, judge: Path | None = None
    ) -> dict[str, np.ndarray]:
        """The figures of `sample`, by prompt: see figures.grades.

        Rewards by the judge are in units of the true reward, so that both can be compared.
        """
        judge = judge or self.judge
        scale = unit(self.ranked(judge, test=self.test_pairs())["test"])
        return grades(self.sample(policy, seed, judge), scale)

    def ranked(self, model: Path, *flags, **subsets: Path) -> dict[str, dict[str, np.ndarray]]:
        """Runs evaluate.py rm; returns figures by subset and pair: see figures.hits."""
        data = [f"{name}={path}" for name, path in subsets.items()]
        folder = self.runs.run("evaluate.py", "rm", "--model", model, "--data", *data, *flags)
        return {name: hits(folder, name) for name in subsets}

    def scored(self, model: Path, answers: Path) -> dict[tuple[str, str], float]:
        """Runs evaluate.py score; returns the reward of each (prompt, response)."""
        words = flag_words(model=model, data=answers)
        out = self.runs.run("evaluate.py", "score", *words, suffix=".jsonl")
        return {(line["prompt"], line["completion"]): line["reward"] for line in read(out)}


@cache
def world_records(split: str, source: str | None) -> list[dict]:
    """world.records, generated once."""
    return world.records(split, source)
