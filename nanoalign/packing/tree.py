"""Which token sees which in packed rows: one behind the other in a sequence, without padding.

    row           0  0  0  0  0  0  0  0 | 1  1  1
    tokens       p0 p1 p2 c0 c1 c2 r0 r1 | p0 c0 r0
    position      0  1  2  3  4  5  3  4 | 0  1  1
    segment       0  0  0  1  1  1  2  2 | 0  1  2

    attends(q, k) = k <= q and row[q] == row[k] and (segment[k] == 0 or segment[k] == segment[q])

So a prompt is computed once for all of its responses, which do not see each other.

Shapes: T tokens of all rows, H heads of queries, G heads of keys and values, d their width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Tree:
    """Which token of a packed sequence sees which, and the masks for it, each made once."""

    def __init__(self, rows: list[tuple[int, ...]]):
        self.rows = rows  # of each: tokens of the prompt, and of every response
        self.parts = [length for row in rows for length in row]
        self._masks: dict[tuple, Tensor] = {}
        self.block_masks: dict[int | None, object] = {}  # BlockMasks of flex.py, by window

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns (queries, keys) to be added to scores: 0 where a query sees a key, else -inf.

        The queries are the last of the `keys` tokens, and see what precedes them and themselves.
        A sliding window is measured in positions, so a response sees as much of the prompt as it
        would alone.
        """
        key = (queries, keys, window, dtype)
        if key not in self._masks:
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            if window is not None:
                seen = seen.triu(keys - queries - window + 1)
            hidden = torch.zeros(queries, keys, dtype=dtype)
            self._masks[key] = hidden.masked_fill_(~seen, float("-inf"))
        return self._masks[key]


def spans(rows: Sequence[tuple[int, ...]], window: int | None) -> np.ndarray:
    """Which keys each query sees: (4, T), as int32.

    Query q sees the keys from spans[0, q] to before spans[1, q], which are of the prompt of its
    row, and from spans[2, q] to before spans[3, q] = q + 1, which are of its own response. For a
    token of a prompt the first of the two is empty. A window is measured in positions: a token of a
    response sees as much of the prompt as it would alone.

        rows [(3, 2, 1)]      p0 p1 p2 | c0 c1 | r0        without a window
        spans[0]               0  0  0    0  0    0
        spans[1]               0  0  0    3  3    3
        spans[2]               0  0  0    3  3    5
        spans[3]               1  2  3    4  5    6
    """
    lengths = np.array([length for row in rows for length in row])
    counts = np.array([len(row) for row in rows])  # parts of each row
    part_starts = np.cumsum(lengths) - lengths
    first = np.cumsum(counts) - counts  # the prompts, among the parts

    def of_tokens(of_rows: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(of_rows, counts), lengths)

    query = np.arange(lengths.sum())
    start, end = of_tokens(part_starts[first]), of_tokens((part_starts + lengths)[first])
    part = np.repeat(part_starts, lengths)
    in_prompt = part == start
    end = np.where(in_prompt, start, end)
    if window is not None:
        position = query - np.where(in_prompt, start, part - (end - start))
        start = np.minimum(start + np.maximum(position - window + 1, 0), end)
        part = np.maximum(part, query - window + 1)
    return np.stack([start, end, part, query + 1]).astype(np.int32)


def coordinates(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """Of each of the T tokens of packed rows: its row, its segment, its position.

    rows: tokens of the prompt and of every response, as a Tree has them.
    """
    numbers, segments, positions = [], [], []
    for n, (prompt, *responses) in enumerate(rows):
        for k, length in enumerate((prompt, *responses)):
            numbers += [n] * length
            segments += [k] * length
            start = prompt if k else 0
            positions += range(start, start + length)
    return numbers, segments, positions
