"""Exercise 20: who sees whom in a packed sequence."""

from torch import Tensor


def mask(rows: list[list[int]]) -> Tensor:
    """Whether token q sees token k: (T, T), of rows that stand one behind the other.

    rows: of each row the number of tokens of its prompt, then of each of its responses.
    """
    raise NotImplementedError
