"""The exercises of docs/exercises.md: what a solution must compute, on which inputs.

Each is a function that a student writes in a file of their own. `check` calls it on many inputs and
compares it with a function of the core, or shows the first input on which it differs.
"""

import importlib.util
import math
import traceback
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
    trained: bool = False  # the gradient of its sum must be right, too


def check(number: int, path: Path, stop: bool = False) -> int:
    """Raises RunError with the first case on which a solution is wrong; returns how many it passed.

    path: of the file with the function. stop: opens the debugger before that case is tried again.
    """
    exercise = EXERCISES[number]
    function = getattr(load(path), exercise.name, None)
    if not callable(function):
        raise RunError(f"{path} has no function {exercise.name}")
    for done, inputs in enumerate(cases(exercise)):
        if wrong := mistake(exercise, function, inputs, path):
            if stop:
                breakpoint()
                function(*copied(inputs, exercise.trained))
            shown = ", ".join(map(text, inputs))
            raise RunError(f"{exercise.name}({shown}) {wrong}; right cases before it: {done}")
    return done + 1


def mistake(
    exercise: Exercise, function: Callable[..., object], inputs: tuple, path: Path
) -> str | None:
    """What is wrong with the function on some inputs, as the end of a sentence; None: nothing."""
    given, own = (copied(inputs, exercise.trained) for _ in range(2))
    expected = exercise.expected(*own)
    try:
        found = function(*given)
        if exercise.trained and not difference(found, expected):
            return wrong_gradient(found, given, expected, own)
    except NotImplementedError:
        return f"is not written yet: {path} raises NotImplementedError"
    except (Exception, SystemExit) as error:
        return f"raises {in_a_line(error)}{line_of(error, path)}"
    return difference(found, expected)


def copied(inputs: tuple, trained: bool) -> tuple:
    """The inputs, of which a function may spoil its own; floating tensors with requires_grad."""
    return tuple(
        x.clone().requires_grad_(trained and x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    )


def wrong_gradient(found: Tensor, given: tuple, expected: Tensor, own: tuple) -> str | None:
    """What is wrong with the gradient of the sum of a result, likewise; None: nothing.

    given, own: the inputs of which `found` and `expected` were computed.
    """
    if not found.requires_grad:
        return "has no gradient: it was not computed from its inputs by torch"
    for result in (found, expected):
        result.sum().backward()
    for n, (x, y) in enumerate(zip(given, own, strict=True)):
        if isinstance(x, Tensor) and x.requires_grad:
            wrong = difference(torch.zeros_like(x) if x.grad is None else x.grad, y.grad)
            if wrong:
                return f"has a wrong gradient by argument {n + 1}, which {wrong}"
    return None


def line_of(error: BaseException, path: Path) -> str:
    """The line of the file where an error was raised, as the end of a sentence; "": of no line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" in line {lines[-1]} of {path}" if lines else ""


def cases(exercise: Exercise) -> Iterator[tuple]:
    """Yields the inputs of CASES random cases, the same in every run, then of the extremes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(CASES):
        yield exercise.inputs(generator)
    yield from exercise.extremes


def load(path: Path):
    """The module of a file. Raises RunError if it can't be imported."""
    spec = importlib.util.spec_from_file_location("solution", path)
    if spec is None or not path.is_file():
        what = "is no Python file" if path.exists() else "is not there"
        raise RunError(f"{path} {what}; give the file with your function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RunError(f"{path} can't be imported: {in_a_line(error)}") from error
    return module


def difference(found: object, expected: object) -> str | None:
    """How a result differs from what is expected, as the end of a sentence.

    None if tensors, numbers, or lists or tuples of numbers are equal up to rounding.
    """
    if isinstance(expected, tuple | list):
        if not isinstance(found, tuple | list):
            return f"is {text(found)}, of type {type(found).__name__}; {kind(expected)} is expected"
        if len(found) != len(expected):
            return f"is {text(found)}, of length {len(found)}, and should be {text(expected)}"
        places = [
            n for n, pair in enumerate(zip(found, expected, strict=True)) if difference(*pair)
        ]
    elif not isinstance(found, Tensor | int | float):
        return f"is {text(found)}, of type {type(found).__name__}; {kind(expected)} is expected"
    else:
        values, right = (
            torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected)
        )
        if values.shape != right.shape:
            return f"is {text(found)}, {kind(found)}; {kind(expected)} is expected"
        close = torch.isclose(values, right, rtol=1e-5, atol=1e-6)
        places = (~close).flatten().nonzero().flatten().tolist()
    if not places:
        return None
    first = f", first at place {places[0]}" if isinstance(expected, list) else ""
    return f"is {text(found)}, and should be {text(expected)}{first}"


def kind(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    names = {list: "a list", tuple: "a pair of numbers"}
    return names.get(type(value), "a number")


def text(value: object) -> str:
    """A value in a few characters."""
    if isinstance(value, Tensor):
        if value.ndim > 2:
            return f"numbers of shape {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, float):
        return f"{value + 0.0:.6g}"  # no -0
    if isinstance(value, tuple | list):
        inner = ", ".join(map(text, value[:20])) + ", ..." * (len(value) > 20)
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
    labels[2, 0] = 3  # which nothing predicts
    return normal(generator, 3, 6, 7), labels


def prompt_and_response(generator: torch.Generator) -> tuple[list[int], list[int], int]:
    prompt, response = ids(generator, 1, 6), ids(generator, 1, 6)
    return prompt, response, len(prompt) + len(response) + number(generator, 0, 4)


def of_means(generator: torch.Generator) -> tuple:
    lengths = torch.randint(1, 50, (2, 4), generator=generator)
    logps = -normal(generator, 2, 4, scale=30).abs()
    return *logps, *lengths, beta(generator), beta(generator)


def four_logps(generator: torch.Generator) -> tuple:
    return *(-normal(generator, 4, scale=20).abs()).tolist(), beta(generator)


def beta(generator: torch.Generator) -> float:
    return number(generator, 1, 40) / 20


def steps_apart(generator: torch.Generator) -> Tensor:
    """Rewards that are often tied, and as near to each other as those of DPO."""
    return normal(generator, 5).round() / 100


def of_a_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = number(generator, 2, 9)
    return normal(generator, count), normal(generator, count)


ZERO, FAR, ONES = torch.zeros(3), torch.tensor([1e4, -1e4, 0.0]), torch.ones(3, dtype=torch.long)
EXERCISES = {
    1: Exercise(
        "hinge",
        family.hinge,
        lambda g: (normal(g, 4), normal(g, 4), beta(g)),
        ((ZERO, ZERO, 0.1), (FAR, -FAR, 0.1)),
        trained=True,
    ),
    2: Exercise("labels", labels_of, prompt_and_response),
    3: Exercise("sequence_logps", sequence_logps, logits_and_labels),
    4: Exercise(
        "accuracy",
        accuracy,
        lambda g: (steps_apart(g), steps_apart(g)),
        ((ZERO, ZERO), (FAR, -FAR)),
    ),
    5: Exercise(
        "reward_loss",
        losses.pairwise_reward_loss,
        lambda g: (normal(g, 4), normal(g, 4)),
        ((FAR, -FAR), (ZERO, ZERO)),
        trained=True,
    ),
    6: Exercise(
        "gradient",
        gradient_of_dpo,
        four_logps,
        ((-5.0, -5.0, -5.0, -5.0, 0.1), (-100.0, -1e5, -100.0, -1e3, 0.1)),
    ),
    7: Exercise(
        "simpo",
        family.simpo,
        of_means,
        ((-FAR.abs(), ZERO - 1, ONES, ONES, 2.0, 0.5),),
        trained=True,
    ),
    8: Exercise("kl", kl_of_kto, of_a_batch, ((ZERO - 1, ZERO),)),
    9: Exercise(
        "positions",
        positions_of,
        lambda g: (number(g, 1, 6), [number(g, 1, 5) for _ in range(number(g, 1, 4))]),
    ),
    10: Exercise("kl_of_best", kl_of_best, lambda g: (number(g, 1, 1000),), ((1,),)),
}
