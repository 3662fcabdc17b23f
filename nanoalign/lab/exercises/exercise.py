"""What an exercise is, and how its inputs are drawn.

An answer is right if it gives what `expected` gives, on the inputs of many cases. Where there is a
function of the core or of the family, it is what is expected.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Wrong(Exception):
    """What is wrong with an answer, as the end of a sentence that begins with the call."""


def plainly(function: Callable[..., object], *inputs: object) -> object:
    return function(*inputs)


class Exercise(NamedTuple):
    name: str  # of the function
    hint: str
    expected: Callable[..., object]
    inputs: Callable[[torch.Generator], tuple]  # of one case
    extremes: tuple[tuple, ...] = ()  # further cases
    trained: tuple[int, ...] = ()  # arguments by which the gradient of the first result is compared
    detached: bool = False  # no gradient may flow through the result
    # (function, *inputs) -> what is compared with expected(*inputs); raises Wrong
    use: Callable[..., object] = plainly
    cases: int = 20  # that are drawn
    close: float = 1e-5  # how far a number may be off, relative to it
    seconds: int = 10  # that a case may take


# --- inputs ---------------------------------------------------------------------------------------


def normal(generator: torch.Generator, *shape: int, scale: float = 5.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator)


def number(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number of [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))


def ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    """Token ids of [3, 100): `low` to `high - 1` of them."""
    count = number(generator, low, high)
    return torch.randint(3, 100, (count,), generator=generator).tolist()


def beta(generator: torch.Generator) -> float:
    return number(generator, 1, 40) / 20


def lengths(generator: torch.Generator) -> list[int]:
    """Tokens of a prompt, and of one to three responses."""
    return [number(generator, 1, 6) for _ in range(number(generator, 2, 5))]
