"""The exercises of docs/exercises.md: what a solution must compute, on which inputs.

Each is a function that a student writes in a file of their own. `check` calls it on many inputs and
compares it with a function of the core, or shows the first input on which it differs.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanoalign import losses
from nanoalign.errors import RunError, in_a_line
from nanoalign.family import losses as family
from nanoalign.logps import IGNORE, sequence_logps
from nanoalign.metrics import hits

CASES = 20


class Exercise(NamedTuple):
    name: str  # of the function
    expected: Callable[..., object]
    inputs: Callable[[torch.Generator], tuple]  # of one case
    extremes: tuple[tuple, ...] = ()  # further cases


def check(number: int, path: Path) -> int:
    """Raises RunError with the first case on which a solution is wrong; returns how many it passed.

    path: of the file with the function.
    """
    exercise = EXERCISES[number]
    function = getattr(load(path), exercise.name, None)
    if not callable(function):
        raise RunError(f"{path} has no function {exercise.name}")
    done = 0
    for inputs in cases(exercise):
        expected, shown = exercise.expected(*inputs), ", ".join(map(text, inputs))
        try:
            found = function(*inputs)
        except Exception as error:
            raise RunError(f"{exercise.name}({shown}) raises {in_a_line(error)}") from error
        if not same(found, expected):
            raise RunError(
                f"{exercise.name}({shown}) is {text(found)}, and should be {text(expected)}; "
                f"{done} cases before it are right"
            )
        done += 1
    return done


def cases(exercise: Exercise) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(CASES):
        yield exercise.inputs(generator)
    yield from exercise.extremes


def load(path: Path):
    """The module of a file. Raises RunError if it can't be imported."""
    spec = importlib.util.spec_from_file_location("solution", path)
    if spec is None or not path.is_file():
        raise RunError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RunError(f"{path} can't be imported: {in_a_line(error)}") from error
    return module


def same(found: object, expected: object) -> bool:
    """Whether two results are equal: tensors and numbers up to rounding, and finite."""
    if isinstance(expected, tuple):
        return (
            isinstance(found, tuple | list)
            and len(found) == len(expected)
            and all(map(same, found, expected))
        )
    if isinstance(expected, list):
        return found == expected
    if not isinstance(found, Tensor | int | float):
        return False
    found, expected = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def text(value: object) -> str:
    """A value in a few characters."""
    if isinstance(value, Tensor):
        if value.ndim > 2:
            return f"numbers of shape {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(text, value[:8])) + ", ..." * (len(value) > 8)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return repr(value)


# --- what is expected -----------------------------------------------------------------------------


def labels_of(prompt: list[int], response: list[int], width: int) -> list[int]:
    labels = [IGNORE] * len(prompt) + response
    return labels + [IGNORE] * (width - len(labels))


def gradient_of_dpo(w: float, v: float, ref_w: float, ref_v: float, beta: float) -> tuple:
    logps = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (w, v)]
    fixed = [torch.tensor([x], dtype=torch.float64) for x in (ref_w, ref_v)]
    loss = losses.dpo_loss(*logps, *fixed, beta)[0]
    return tuple(each.item() for each in torch.autograd.grad(loss.sum(), logps))


def kl_of_kto(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    return (policy_logps - reference_logps).mean().clamp(min=0)


def positions_of(prompt: int, responses: list[int]) -> list[int]:
    return [*range(prompt), *(prompt + n for length in responses for n in range(length))]


def kl_of_best(n: int) -> float:
    return math.log(n) - (n - 1) / n


def accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    return hits(chosen_rewards, rejected_rewards).mean()


# --- inputs ---------------------------------------------------------------------------------------


def normal(generator: torch.Generator, *shape: int, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator)


def number(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number of [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))


def ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    count = number(generator, low, high)
    return torch.randint(0, 100, (count,), generator=generator).tolist()


def logits_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[:, : number(generator, 1, 4)] = IGNORE  # the prompt
    labels[0, 5:] = IGNORE  # padding
    return normal(generator, 3, 6, 7), labels


def prompt_and_response(generator: torch.Generator) -> tuple[list[int], list[int], int]:
    prompt, response = ids(generator, 1, 6), ids(generator, 1, 6)
    return prompt, response, len(prompt) + len(response) + number(generator, 0, 4)


def of_means(generator: torch.Generator) -> tuple:
    lengths = torch.randint(1, 50, (2, 4), generator=generator)
    logps = -normal(generator, 2, 4, scale=30).abs()
    return *logps, *lengths, 2.0, 0.5


def four_logps(generator: torch.Generator) -> tuple:
    return *(-normal(generator, 4, scale=20).abs()).tolist(), 0.1


ZERO, FAR = torch.zeros(3), torch.tensor([1e4, -1e4, 0.0])
EXERCISES = {
    1: Exercise("hinge", family.hinge, lambda g: (normal(g, 4), normal(g, 4), 0.1),
                ((ZERO, ZERO, 0.1), (FAR, -FAR, 0.1))),
    2: Exercise("labels", labels_of, prompt_and_response),
    3: Exercise("sequence_logps", sequence_logps, logits_and_labels),
    4: Exercise("accuracy", accuracy, lambda g: (normal(g, 5).round(), normal(g, 5).round()),
                ((ZERO, ZERO),)),
    5: Exercise("reward_loss", losses.pairwise_reward_loss,
                lambda g: (normal(g, 4), normal(g, 4)), ((FAR, -FAR), (ZERO, ZERO))),
    6: Exercise("gradient", gradient_of_dpo, four_logps, ((-5.0, -5.0, -5.0, -5.0, 0.1),)),
    7: Exercise("simpo", family.simpo, of_means),
    8: Exercise("kl", kl_of_kto, lambda g: (normal(g, 6), normal(g, 6)), ((ZERO - 1, ZERO),)),
    9: Exercise("positions", positions_of,
                lambda g: (number(g, 1, 6), [number(g, 1, 5) for _ in range(number(g, 1, 4))])),
    10: Exercise("kl_of_best", kl_of_best, lambda g: (number(g, 1, 1000),), ((1,),)),
}  # fmt: skip
