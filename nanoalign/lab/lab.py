"""The functions that experiments consist of: trainings, evaluations and their grid.

Shapes: S seeds, P prompts.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from random import Random

import numpy as np

from nanoalign.lab.figures import grades, hits, read
from nanoalign.lab.runs import Runs, Stopped
from nanoalign.tiny import world

DPO_LR = "5e-4"  # of --model tiny, which a folder does not get by itself


class Lab:
    """What an experiment needs: its size, and functions that run the scripts."""

    def __init__(self, runs: Runs, quick: bool):
        self.runs, self.quick = runs, quick
        self.seeds = (0,) if quick else (0, 1, 2)
        self.prompts = 150 if quick else 600  # held-out ones on which all is measured

    def pick(self, quick, full):
        return quick if self.quick else full

    def grid(self, function: Callable, **axes: Iterable) -> dict:
        """The figures of function(lab, seed, **values) for each combination of the axes' values.

        function returns figures by name, (P,) or a number. Returns by combination (a tuple, or of
        one axis its value) the figures by name, (S, P) or (S, 1). All are computed at once.
        """
        combinations = list(product(*axes.values()))
        jobs = list(product(combinations, self.seeds))

        def job(values: tuple, seed: int) -> dict:
            try:
                return function(self, seed, **dict(zip(axes, values, strict=True)))
            except BaseException:
                self.runs.stop()
                raise

        with ThreadPoolExecutor(max(1, len(jobs))) as threads:
            futures = [threads.submit(job, *each) for each in jobs]
        errors = [error for future in futures if (error := future.exception())]
        if errors:  # the one that the others were stopped for
            raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])
        found = [future.result() for future in futures]
        grid = {}
        for n, values in enumerate(combinations):
            own = found[n * len(self.seeds) : (n + 1) * len(self.seeds)]
            stacked = {name: np.stack([np.atleast_1d(each[name]) for each in own])
                       for name in own[0]}  # fmt: skip
            grid[values if len(values) != 1 else values[0]] = stacked
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
        prompts = world.split_prompts()["test"][: self.prompts]
        return self.runs.write("prompts", [{"prompt": prompt} for prompt in prompts])

    def test_pairs(self, source: str | None = None) -> Path:
        records = world_records("test", source)[: self.prompts]
        return self.runs.write(f"test_{source or 'all'}", records)

    # --- trainings --------------------------------------------------------------------------------

    def train_dpo(
        self, data: Path | str, seed: int, *flags, model: Path | str = "tiny", share: bool = False
    ) -> Path:
        """The policy of train_dpo.py. No evaluation but those before and after.

        share: a tenth of the data is held out for these, not the test pairs.
        """
        lr = () if "--lr" in flags else ("--lr", DPO_LR)
        held_out = () if share else ("--eval_data", self.test_pairs())
        return self.runs.run(
            "train_dpo.py", "--model", model, "--data", data, *held_out, "--eval_every", 10000,
            "--seed", seed, *lr, *flags,
        )  # fmt: skip

    def train_rm(self, data: Path | str, seed: int, *flags) -> Path:
        """The reward model of train_rm.py, likewise; of one epoch without --epochs."""
        epochs = () if "--epochs" in flags else ("--epochs", 1)
        return self.runs.run(
            "train_rm.py", "--data", data, "--eval_data", self.test_pairs(),
            "--eval_every", 10000, "--seed", seed, *epochs, *flags,
        )  # fmt: skip

    @cached_property
    def judge(self) -> Path:
        """The reward model that judges where none is asked for: of tiny-a, two epochs."""
        data = "tiny:tiny-a*0.3" if self.quick else "tiny:tiny-a"
        return self.train_rm(data, 0, "--epochs", 2)

    def own_pairs(
        self, policy: Path | str, prompts: Path | str, judge: Path, seed: int, samples: int = 4
    ) -> Path:
        """The best and the worst of a policy's answers to each prompt by a judge, as pairs."""
        flags = ("--pairs_out", "{out}.jsonl")
        out = self.sample(policy, seed, judge, policy, samples, prompts, flags)
        return out.with_suffix(".jsonl")

    # --- figures ----------------------------------------------------------------------------------

    def sample(
        self, policy: Path | str, seed: int, judge: Path | None = None,
        baseline: Path | str = "tiny", samples: int = 1, prompts: Path | None = None,
        flags: tuple[str, ...] = (),
    ) -> Path:  # fmt: skip
        """The folder of evaluate.py policy."""
        return self.runs.run(
            "evaluate.py", "policy", "--policy", policy, "--baseline", baseline, "--reward",
            judge or self.judge, "--data", prompts or self.test_prompts, "--samples", samples,
            "--seed", seed, "--batch_size", 256, "--max_new_tokens", 64, *flags,
        )  # fmt: skip

    def graded(self, *args, **options) -> dict[str, np.ndarray | float]:
        """Of `sample`, by prompt: true reward, judge's reward, wins by both; KL of an answer."""
        return grades(self.sample(*args, **options))

    def ranked(self, model: Path, *flags, **subsets: Path) -> dict[str, dict[str, np.ndarray]]:
        """Of evaluate.py rm, by subset: agreement with labels and with the true rule, by pair."""
        data = [f"{name}={path}" for name, path in subsets.items()]
        folder = self.runs.run("evaluate.py", "rm", "--model", model, "--data", *data, *flags)
        return {name: hits(folder, name) for name in subsets}

    def scored(self, model: Path, answers: Path) -> dict[tuple[str, str], float]:
        """The reward of each (prompt, response) of records, by evaluate.py score."""
        out = self.runs.run(
            "evaluate.py", "score", "--model", model, "--data", answers, suffix=".jsonl"
        )
        return {(line["prompt"], line["completion"]): line["reward"] for line in read(out)}


@cache
def world_records(split: str, source: str | None) -> list[dict]:
    return world.records(split, source)
