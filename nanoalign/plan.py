"""Which rows an optimizer step takes, and how they are cut into micro-batches and dealt to ranks.

Pure functions of what all ranks know: they compute the same plan without a word.
"""

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nanoalign.rows import Row

Group = list[int]  # the rows of a micro-batch


def step_indices(step: int, pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """The pairs of optimizer step `step` (from 0): a slice of a permutation drawn from (seed, epoch).

    A pure function, so a resumed run needs to know its step alone. The last step of an epoch may be
    smaller.
    """
    epoch, place = divmod(step, math.ceil(pairs / batch_size))
    return _permutation(pairs, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=1)
def _permutation(pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(pairs)


def plan_micro_batches(
    rows: Sequence[Row], world_size: int, micro_batch_tokens: int, share_prefix: bool = True
) -> list[list[Group]]:
    """Cuts rows into micro-batches and deals them to ranks: plan[round][rank] = indices into `rows`.

    No micro-batch has more than micro_batch_tokens tokens, padding included, save a single pair that
    alone is longer. All ranks run the same number of rounds, since the collectives of sharded
    parameters must match; an empty list is a place without a pair. A pure function of its
    arguments: all ranks compute the same plan.
    """
    divide = pack if share_prefix else cut_padded
    groups = divide(rows, world_size, micro_batch_tokens)
    return [groups[start : start + world_size] for start in range(0, len(groups), world_size)]


def pack(rows: Sequence[Row], world_size: int, limit: int) -> list[Group]:
    """A multiple of world_size groups of packed rows, as few as the limit allows, of like many tokens.

    From the longest row to the shortest, each goes to the group that has the fewest tokens so far
    (Graham 1969: at most 4/3 of the best largest one). The fullest groups come first, so that a
    round's are alike.
    """
    lengths = [len(row) for row in rows]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])
    count = world_size * max(1, math.ceil(sum(lengths) / (limit * world_size)))
    while True:
        groups: list[Group] = [[] for _ in range(count)]
        fewest = [(0, n) for n in range(count)]  # a heap of (tokens, group)
        for i in longest_first:
            tokens, n = fewest[0]
            groups[n].append(i)
            heapq.heapreplace(fewest, (tokens + lengths[i], n))
        if all(tokens <= limit or len(groups[n]) == 1 for tokens, n in fewest):
            fullest_first = sorted(fewest, key=lambda group: (-group[0], group[1]))
            return [groups[n] for _, n in fullest_first]
        count += world_size


def cut_padded(rows: Sequence[Row], world_size: int, limit: int) -> list[Group]:
    """A multiple of world_size groups of rows of similar length: a line a response, padded to the longest."""
    widths = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -widths[i])

    def cut(limit: int) -> list[Group]:
        groups, height = [], 0
        for i in order:
            height += len(rows[i].responses)
            if not groups or height * widths[groups[-1][0]] > limit:
                groups.append([])
                height = len(rows[i].responses)
            groups[-1].append(i)
        return groups

    # As few as the limit allows, and then the largest of them as small as can be.
    count = math.ceil(len(cut(limit)) / world_size) * world_size
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= count else (middle, high)
    groups = sorted(cut(high), key=lambda group: -padded_tokens([rows[i] for i in group], False))
    return groups + [[] for _ in range(count - len(groups))]


def padded_tokens(rows: Sequence[Row], share_prefix: bool = True) -> int:
    """Tokens that a micro-batch of these rows computes, padding included, which packed rows have not."""
    if share_prefix:
        return sum(map(len, rows))
    widest = max((len(row.prompt) + max(map(len, row.responses)) for row in rows), default=0)
    return widest * sum(len(row.responses) for row in rows)
