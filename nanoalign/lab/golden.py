"""Golden values: inputs, losses and gradients of every loss, for the tests of other frameworks.

    {"format": 1, "losses": {"sigmoid": {
        "fields": ["chosen_logratios", "rejected_logratios"],      the inputs, in nats or tokens
        "hyperparameters": {"beta": 0.1},                          all at their defaults
        "cases": [{"inputs": {"chosen_logratios": 1.5, ...}, "loss": 0.6, "gradients": {...}}]}}}

All values are float64. A case is one pair, except for aot, whose loss compares the pairs of a
batch: its values are lists. Lengths, kl, shift and desirable have no gradient.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import losses
from nanoalign.family import losses as family

FORMAT = 1
RANDOM = 50  # cases of each loss, beside the extremes
PAIRS_OF_A_BATCH = 6  # of a case of aot
SIDES = ("chosen", "rejected")
WITHOUT_GRADIENT = ("chosen_lengths", "rejected_lengths", "kl", "shift", "desirable")
# What the first two trained inputs are: unchanged; far apart in either direction; nearly equal.
EXTREMES = ((0.0, 0.0), (1e3, -1e3), (-1e3, 1e3), (1e-8, 0.0), (40.0, 40.0))


def golden() -> dict:
    """The content of golden.json."""
    logps = [f"{model}_{side}_logps" for model in ("policy", "reference") for side in SIDES]
    rewards = [f"{side}_rewards" for side in SIDES]
    entries = {
        "dpo_loss": entry(dpo_loss, logps, {"beta": 0.1, "label_smoothing": 0.0}),
        "pairwise_reward_loss": entry(
            losses.pairwise_reward_loss, rewards, {"label_smoothing": 0.0}
        ),
    }
    for name, function in family.LOSSES.items():
        pairs = PAIRS_OF_A_BATCH if family.KIND[name] == family.SORTED else 1
        entries[name] = entry(function, family.FIELDS[name], family.DEFAULTS[name], pairs)
    return {"format": FORMAT, "losses": entries}


def dpo_loss(*logps: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """losses.dpo_loss without the rewards: (B,)."""
    return losses.dpo_loss(*logps, beta, label_smoothing)[0]


def entry(
    function: Callable[..., Tensor],
    fields: Sequence[str],
    hyperparameters: dict[str, float],
    pairs: int = 1,
) -> dict:
    """The values of one loss. pairs: of a case."""
    cases = [case(function, inputs, hyperparameters) for inputs in inputs_of(fields, pairs)]
    return {"fields": list(fields), "hyperparameters": hyperparameters, "cases": cases}


def inputs_of(fields: Sequence[str], pairs: int) -> Iterator[dict[str, Tensor]]:
    """The inputs of the cases of a loss: random ones, the same in every run, then extremes."""
    generator = torch.Generator().manual_seed(0)

    def draw(field: str) -> Tensor:
        normal = torch.randn(pairs, dtype=torch.float64, generator=generator)
        if field.endswith("lengths"):
            return torch.randint(1, 200, (pairs,), generator=generator).double()
        if field == "desirable":
            return torch.randint(0, 2, (pairs,), generator=generator).bool()
        if field == "kl":
            return normal.abs()
        return 10 * normal - 60 * field.endswith("logps")  # log-probabilities are below 0

    for _ in range(RANDOM):
        yield {field: draw(field) for field in fields}
    for first, second in EXTREMES:
        values = {field: draw(field) for field in fields}
        moved = [field for field in fields if field not in WITHOUT_GRADIENT]
        for field, value in zip(moved, (first, second, 0.0, 0.0), strict=False):
            # The log-probability of a policy without a reference is below 0.
            value = min(value, 0.0) - 1e-3 if field in family.LOGPS else value
            values[field] = torch.full_like(values[field], value)
        yield values | {f: torch.ones_like(values[f]) for f in fields if f.endswith("lengths")}


def case(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], hyperparameters: dict[str, float]
) -> dict:
    """Inputs, loss, and the gradients of the sum of the losses."""
    for field, value in inputs.items():
        value.requires_grad_(field not in WITHOUT_GRADIENT)
    loss = function(*inputs.values(), **hyperparameters)
    trained = {field: value for field, value in inputs.items() if value.requires_grad}
    gradients = torch.autograd.grad(loss.sum(), list(trained.values()))
    return {
        "inputs": {field: plain(value) for field, value in inputs.items()},
        "loss": plain(loss),
        "gradients": dict(zip(trained, map(plain, gradients), strict=True)),
    }


def plain(values: Tensor) -> float | list[float]:
    """One value as a number, several as a list."""
    numbers = values.detach().tolist()
    return numbers[0] if len(numbers) == 1 else numbers


def write(out: str) -> None:
    """Writes the golden values to a file. Raises ValueError if one is not finite."""
    content, path = golden(), Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    cases = sum(len(entry["cases"]) for entry in content["losses"].values())
    print(f"{'saved':<11} {path}: {len(content['losses'])} losses, {cases:,} cases")
