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
    """Rounds of world_size groups of packed rows, as few as the limit allows, of like many tokens each.

    A round lasts as long as its longest row at least, and then its other groups may be as long: so each is
    filled to that length, or to the mean of all rounds to come if that is more.
    """
    lengths = [len(row) for row in rows]
    left = sorted(range(len(rows)), key=lambda i: -lengths[i])
    groups = []
    while left:
        tokens = sum(lengths[i] for i in left)
        rounds = math.ceil(tokens / (limit * world_size))
        level = max(lengths[left[0]], math.ceil(tokens / (rounds * world_size)))
        # Into the last round goes all that is left, as far as the limit allows.
        new, left = _fill(left, lengths, world_size, min(level, limit) if rounds > 1 else limit)
        groups += new
    return groups


def _fill(
    order: list[int], lengths: list[int], world_size: int, level: int
) -> tuple[list[Group], list[int]]:
    """(groups of a round, the rows that did not fit): each row to the group that has the fewest tokens.

    From the longest to the shortest, which ends at most 4/3 above the best division (Graham 1969).
    """
    groups: list[Group] = [[] for _ in range(world_size)]
    fewest = [(0, n) for n in range(world_size)]  # a heap of (tokens, group)
    over = []
    for i in order:
        tokens, n = fewest[0]
        if tokens and tokens + lengths[i] > level:
            over.append(i)
        else:
            groups[n].append(i)
            heapq.heapreplace(fewest, (tokens + lengths[i], n))
    return groups, over


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
