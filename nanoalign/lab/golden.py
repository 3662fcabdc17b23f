"""Golden values: inputs, losses and gradients of every loss, for the tests of other frameworks.

    {"format": 1, "losses": {"sigmoid": {
        "fields": ["chosen_logratios", "rejected_logratios"],      the inputs, in nats or tokens
        "hyperparameters": {"beta": 0.1},                          all at their defaults
        "cases": [{"inputs": {"chosen_logratios": 1.5, ...}, "loss": 0.6, "gradients": {...}}]}}}

All of it is float64. A case is one pair, but for aot, whose loss is of a batch: there values are
lists. Lengths, kl, shift and desirable have no gradient.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanoalign import losses
from nanoalign.family import losses as family

FORMAT = 1
RANDOM = 50  # cases of each loss, beside the extremes
SIZE = 6  # pairs of a case of aot
WITHOUT_GRADIENT = ("chosen_lengths", "rejected_lengths", "kl", "shift", "desirable")
# Of a pair: nothing has changed; far in either direction; the shortest responses.
EXTREMES = ((0.0, 0.0), (1e3, -1e3), (-1e3, 1e3), (1e-8, 0.0), (40.0, 40.0))


def golden() -> dict:
    """What golden.json holds."""
    core = {"dpo_loss": dpo_loss, "pairwise_reward_loss": losses.pairwise_reward_loss}
    fields = {
        "dpo_loss": ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
                     "reference_rejected_logps"),
        "pairwise_reward_loss": ("chosen_rewards", "rejected_rewards"),
    }  # fmt: skip
    found = {name: entry(name, core[name], fields[name]) for name in core}
    found |= {name: entry(name, family.LOSSES[name], family.FIELDS[name]) for name in family.LOSSES}
    return {"format": FORMAT, "losses": found}


def dpo_loss(*logps: Tensor, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    return losses.dpo_loss(*logps, beta, label_smoothing)[0]


def entry(name: str, function: Callable[..., Tensor], fields: tuple[str, ...]) -> dict:
    """The values of one loss."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    cases = [case(function, inputs, defaults) for inputs in inputs_of(name, fields)]
    return {"fields": list(fields), "hyperparameters": defaults, "cases": cases}


def inputs_of(name: str, fields: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """The inputs of the cases of a loss: random ones, the same in every run, then extremes."""
    generator = torch.Generator().manual_seed(0)
    size = SIZE if family.KIND.get(name) == family.SORTED else 1

    def draw(field: str) -> Tensor:
        normal = torch.randn(size, dtype=torch.float64, generator=generator)
        if field.endswith("lengths"):
            return torch.randint(1, 200, (size,), generator=generator).double()
        if field == "desirable":
            return torch.randint(0, 2, (size,), generator=generator).bool()
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


def case(function: Callable[..., Tensor], inputs: dict[str, Tensor], more: dict) -> dict:
    """Inputs, loss, and the gradients of its sum."""
    for field, value in inputs.items():
        value.requires_grad_(field not in WITHOUT_GRADIENT)
    loss = function(*inputs.values(), **more)
    trained = {field: value for field, value in inputs.items() if value.requires_grad}
    gradients = torch.autograd.grad(loss.sum(), list(trained.values()))
    return {
        "inputs": {field: plain(value) for field, value in inputs.items()},
        "loss": plain(loss),
        "gradients": dict(zip(trained, map(plain, gradients), strict=True)),
    }


def plain(values: Tensor) -> object:
    """A number of one value, a list of several."""
    found = values.detach().tolist()
    return found[0] if len(found) == 1 else found


def write(out: str) -> None:
    """Writes golden values to a file. Raises ValueError if one is not finite."""
    found = golden()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    cases = sum(len(each["cases"]) for each in found["losses"].values())
    print(f"{'saved':<11} {path}: {len(found['losses'])} losses, {cases:,} cases")
