"""A policy as a judge: the reward beta * log(pi(y | x) / pi_ref(y | x)) that it has learned.

Rafailov et al. 2023, arXiv 2305.18290, section 4: a policy that maximises a reward under a KL
penalty has this reward, up to a term of the prompt x alone. Without a reference it is
beta * log pi(y | x). The log-probabilities are sums over the tokens of a response with its EOS; a
second reward is divided by their number. RewardBench's run_dpo.py has the sum with a reference, and
by default the mean without one.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanoalign.batch import Row
from nanoalign.distributed import compute_dtype, print0
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import Encoded, Judge, View, score_rows
from nanoalign.files.run_folder import ARGS
from nanoalign.files.text import read_json
from nanoalign.loop import Batcher
from nanoalign.model import Policy
from nanoalign.packing.self_check import check_fits, check_layout
from nanoalign.weights import adapters
from nanoalign.weights.folders import check_vocabulary, load_tokenizer
from nanoalign.weights.slices import read_slices

DEFAULTS = {"beta": 0.1, "template": "auto", "max_length": 1024}  # of train_dpo.py
PER_TOKEN = "per_token"  # the view of rewards that are divided by the number of tokens


@dataclass(frozen=True, slots=True)
class LogRatios:
    """log pi(y | x) - log pi_ref(y | x) of responses, computed once for both judges."""

    models: dict[str, Policy]  # by name: the policy, and its reference if there is one
    batcher: Batcher
    known: dict[tuple[str, ...], list[list[float]]] = field(default_factory=dict)

    def of(self, rows: Sequence[Row]) -> list[list[float]]:
        """The log-ratio of every response, [row][response], in nats. A collective."""
        key = tuple(row.name for row in rows)  # unique in a run
        if key not in self.known:
            logps = [self._logps(name, rows) for name in self.models]
            # Of each row those of the policy, less those of the reference.
            self.known[key] = [np.subtract.reduce(x).tolist() for x in zip(*logps, strict=True)]
        return self.known[key]

    def _logps(self, name: str, rows: Sequence[Row]) -> list[list[float]]:
        self.batcher.prepare(self.models[name])  # the other model may have prepared it since
        return score_rows(self.models[name], rows, self.batcher, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyJudge(Judge):
    """One of the two rewards of a policy, by the name of its view."""

    log_ratios: LogRatios
    beta: float

    def check(self, encoded: list[Encoded]) -> None:
        for name, model in self.log_ratios.models.items():
            self.batcher.prepare(model)
            for part in encoded:
                check_fits(model, part.rows, name)
                check_layout(model, part.rows, self.batcher, name)

    def score(self, encoded: list[Encoded]) -> list[list[float]]:
        (part,) = encoded
        ratios = self.log_ratios.of(part.rows)
        per_token = self.view.name == PER_TOKEN
        return [
            [
                self.beta * ratio / (len(response) if per_token else 1)
                for ratio, response in zip(own, row.responses, strict=True)
            ]
            for own, row in zip(ratios, part.rows, strict=True)
        ]


def load_judges(args: Namespace, batcher: Batcher) -> list[Judge]:
    """Loads --policy and --reference of rm: a judge for the sum, and one for the mean of tokens.

    beta, template and max_length are those of the flags, else of the run that trained the policy,
    else DEFAULTS. Prints a line.
    Raises RunError for a model that can't be used, and for a reference with another vocabulary.
    """
    folder, world = adapters.model_folder(args.policy), batcher.world
    folders = {f"--policy {args.policy}": folder}
    if args.reference != "none":
        folders[f"--reference {args.reference}"] = adapters.model_folder(args.reference)
        check_vocabulary(*folders.values())
    dtype = compute_dtype(args.precision, world.device)
    models = {
        name: Policy.load(each, world, dtype, trainable=False, read=adapters.reading(read_slices))
        for name, each in folders.items()
    }
    given = {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}
    beta, template, max_length = (DEFAULTS | of_run(adapters.run_of(folder)) | given).values()
    ratio = args.policy if args.reference == "none" else f"{args.policy} / {args.reference}"
    print0(
        f"{'reward':<11} {beta:g} * log({ratio}), summed over the tokens of a response; in "
        f"/{PER_TOKEN} divided by their number"
    )
    shared = models[f"--policy {args.policy}"], load_tokenizer(folder)
    log_ratios, labels = LogRatios(models, batcher), args.preference or "better"
    return [
        PolicyJudge(
            args.policy, *shared, View(name, labels, {}), (template, max_length), batcher,
            log_ratios=log_ratios, beta=beta,
        )
        for name in ("", PER_TOKEN)
    ]  # fmt: skip


def of_run(folder: Path) -> dict[str, float | str]:
    """The values of DEFAULTS in the args.json of a run; {} for a model of another program.

    Raises RunError for a file that can't be read.
    """
    if not (path := folder / ARGS).is_file():
        return {}
    flags = read_json(path)
    found = {name: flags[name] for name in DEFAULTS if flags.get(name) is not None}
    for name, value in found.items():
        if type(value) is not type(DEFAULTS[name]):
            raise RunError(f"{path} is no file of a run: {name} is {value!r:.40}; remove it")
    return found
