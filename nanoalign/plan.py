"""Which rows an optimizer step takes, and how they are cut into micro-batches and dealt to ranks.

Pure functions of what all ranks know: they compute the same plan without a word.
"""

import math

import numpy as np

from nanoalign.rows import Row

# What a forward and backward pass costs whatever its size (launches, gathering parameters), as the
# number of tokens that would take as long. A rough figure, and only the plan's speed depends on it.
FORWARD_TOKENS = 256


def step_indices(step: int, pairs: int, batch_size: int, seed: int) -> np.ndarray:
    """The pairs of optimizer step `step` (from 0): a slice of a permutation drawn from (seed, epoch).

    A pure function, so a resumed run needs to know its step alone. The last step of an epoch may be
    smaller.
    """
    epoch, place = divmod(step, math.ceil(pairs / batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(pairs)
    return order[place * batch_size : (place + 1) * batch_size]


def plan_micro_batches(
    rows: list[Row], world_size: int, micro_batch_tokens: int, share_prefix: bool = True
) -> list[list[list[int]]]:
    """Cuts rows into micro-batches and deals them to ranks: plan[round][rank] = indices into `rows`.

    No micro-batch has more than micro_batch_tokens padded tokens, save a single pair that alone is
    longer. All ranks run the same number of rounds, since the collectives of sharded parameters
    must match; an empty list is a place without a pair. A pure function of its arguments: all ranks
    compute the same plan.
    """
    widths, heights = _sizes(rows, share_prefix)
    order = sorted(range(len(rows)), key=lambda i: -widths[i])  # similar lengths together

    def padded(group: list[int]) -> int:
        return widths[group[0]] * sum(heights[i] for i in group) if group else 0

    def cut(limit: int) -> list[list[int]]:
        groups, height = [], 0
        for i in order:
            if not groups or (height + heights[i]) * widths[groups[-1][0]] > limit:
                groups.append([])
                height = 0
            groups[-1].append(i)
            height += heights[i]
        return groups

    def cut_evenly(count: int, limit: int) -> list[list[int]]:
        """At most `count` micro-batches, the largest of them as small as can be; largest first."""
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(middle)) <= count else (middle, high)
        groups = sorted(cut(high), key=padded, reverse=True)
        return groups + [[] for _ in range(count - len(groups))]

    def time(groups: list[list[int]]) -> int:
        """Of all rounds, in tokens: a round lasts as long as its largest micro-batch, its first."""
        return sum(padded(group) + FORWARD_TOKENS for group in groups[::world_size])

    # From the fewest micro-batches that the limit allows, more of them pad less and begin more
    # often. Their time falls, then rises, if not quite smoothly: two rises in a row end the search.
    fewest = math.ceil(len(cut(micro_batch_tokens)) / world_size) * world_size
    best = cut_evenly(fewest, micro_batch_tokens)
    rises = 0
    for count in range(fewest + world_size, len(rows) + world_size, world_size):
        groups = cut_evenly(count, micro_batch_tokens)
        if time(groups) < time(best):
            best, rises = groups, 0
        elif (rises := rises + 1) == 2:
            break
    return [best[start : start + world_size] for start in range(0, len(best), world_size)]


def _sizes(rows: list[Row], share_prefix: bool) -> tuple[list[int], list[int]]:
    """(tokens of its longest row, number of rows) of every pair, in the layout."""
    if share_prefix:
        return [len(row) for row in rows], [1] * len(rows)
    longest = [len(row.prompt) + max(map(len, row.responses)) for row in rows]
    return longest, [len(row.responses) for row in rows]


def padded_tokens(rows: list[Row], share_prefix: bool = True) -> int:
    """Tokens that a micro-batch of these rows computes, padding included."""
    widths, heights = _sizes(rows, share_prefix)
    return max(widths, default=0) * sum(heights)
