"""Exercise 20: who sees whom in a packed sequence."""

import torch
from torch import Tensor


def mask(rows: list[list[int]]) -> Tensor:
    """Whether token q sees token k: (T, T), of rows that stand one behind the other.

    rows: of each row the number of tokens of its prompt, then of each of its responses.
    """
    row, segment = [], []
    for n, lengths in enumerate(rows):
        for k, length in enumerate(lengths):
            row += [n] * length
            segment += [k] * length  # 0: the prompt
    row, segment = torch.tensor(row), torch.tensor(segment)
    same_row = row == row[:, None]
    same_segment = (segment == 0) | (segment == segment[:, None])
    return (same_row & same_segment).tril()
