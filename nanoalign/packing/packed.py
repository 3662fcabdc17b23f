"""Rows -> Batches without padding: one row behind the other, the prompt of each computed once.

    row         0  0  0  0  0  0  0  0 | 1  1  1
    tokens     p0 p1 p2 c0 c1 c2 r0 r1 | p0 c0 r0
    position    0  1  2  3  4  5  3  4 | 0  1  1
    predicted at      c0 c1 c2: 2 3 4; r0 r1: 2 6; then 8 for c0 and for r0

Positions restart behind the prompt for each response; the first token of a response is predicted
at the last token of the prompt.

Shapes: T tokens of all rows, as in nanoalign/batch.py, with N = 1.
"""

import argparse
import heapq
import math
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch

from nanoalign.batch import Batch, Row, comparisons
from nanoalign.loop import Batcher
from nanoalign.model import Scorer
from nanoalign.packing import rope
from nanoalign.packing.attention import use_tree_attention
from nanoalign.packing.tree import Tree


def collate(rows: Sequence[Row], weight: float = 1.0, border: int | None = None) -> Batch:
    """Returns one Batch of the rows, packed.

    weight: of each row, shared evenly by its pairs. border: of the model, see rope.border_of.
    Raises RunError if the rows do not have the same names in `extra`.
    """
    start, tokens, positions, predicted_at, ends_at, parts = 0, [], [], [], [], []
    for row in rows:
        width = len(row.prompt)
        for responses, mark in rope.split_at(row, border):
            tokens += [row.prompt, *responses]
            parts.append((width, *map(len, responses)))
            positions.append(np.arange(width) + mark)
            end = last = start + width  # of the prompt
            for response in responses:
                start, end = end, end + len(response)
                positions.append(np.arange(width, width + len(response)) + mark)
                predicted_at.append(np.concatenate(([last - 1], np.arange(start, end - 1))))
                ends_at.append(end - 1)
            start = end
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(np.concatenate(tokens).astype(np.int64)[None]),
            "position_ids": torch.from_numpy(np.concatenate(positions)[None]),
            # A mask of 4 dimensions is used as it is: so transformers makes none of T x T places.
            "attention_mask": torch.zeros(1, 1, 1, 1),
            "tree": Tree(parts),
        },
        predicted_at=torch.from_numpy(np.concatenate(predicted_at)),
        ends_at=torch.tensor(ends_at),
        **comparisons(rows, weight),
    )


class PaddedBatcher(Batcher):
    """Makes micro-batches of padded lines, as the core does, also for models with LongRoPE."""

    border: int | None = None  # of the model

    def prepare(self, model: Scorer) -> None:
        self.border = rope.border_of(model.model.config)
        rope.read_marks(model.model)

    def collate(self, rows: Sequence[Row], weight: float = 1.0) -> Batch:
        batch = super().collate(rows, weight)
        if self.border is not None:
            added = torch.tensor([m for row in rows for m in rope.marks(row, self.border)])[:, None]
            places = torch.arange(batch.inputs["input_ids"].shape[1])
            short = places.clamp(max=self.border - 1)  # what is behind it is padding
            batch.inputs["position_ids"] = torch.where(added > 0, places + added, short)
        return batch


class PackedBatcher(PaddedBatcher):
    """Makes micro-batches of packed rows."""

    advice = "this architecture can't share rows: use --no-share_prefix"
    costs = (1, 0, 0)  # of `operations`, which then are tokens

    def collate(self, rows: Sequence[Row], weight: float = 1.0) -> Batch:
        return collate(rows, weight, self.border)

    def prepare(self, model: Scorer) -> None:
        """Changes the model in place so that it reads packed rows, and sets `costs` by its sizes.

        Raises RunError for a model that can't read them.
        """
        super().prepare(model)
        use_tree_attention(model.model)
        # Multiply-adds of a forward pass, as if there were no sliding windows, and all experts ran.
        config, blocks = model.model.config.get_text_config(), model.blocks()
        head, per_head = model.model.get_output_embeddings(), config.to_dict().get("head_dim")
        width = per_head * config.num_attention_heads if per_head else config.hidden_size
        elements = sum(p.numel() for block in blocks for p in block.parameters())
        self.costs = (elements, head.weight.numel() if head else 0, 2 * width * len(blocks))

    def plan(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        split = [rope.split_at(row, self.border) for row in rows]
        parts = [
            (len(row.prompt), *map(len, responses))
            for row, copies in zip(rows, split, strict=True)
            for responses, _ in copies  # each of them computes the prompt
        ]
        lengths = np.array([*zip_longest(*parts, fillvalue=0)])  # (1 + K, C), K of most responses
        first = np.cumsum([0, *map(len, split[:-1])])  # the first copy of each row, (N,)
        tokens, work = (
            np.add.reduceat(values, first)
            for values in (lengths.sum(0), operations(lengths, self.costs))
        )
        groups = pack(tokens, work, self.world.size, self.tokens)
        return [groups[n : n + self.world.size] for n in range(0, len(groups), self.world.size)]


def operations(lengths: np.ndarray, costs: tuple[int, int, int]) -> np.ndarray:
    """The multiply-adds of a forward pass of each row, (N,).

    lengths: (1 + K, N) tokens of the prompts and, behind them, of K responses; 0 for none.
    costs: multiply-adds of a token, of a scored token (one of a response), and of a query with a
        key that it sees.
    """
    prompts, responses = lengths[0], lengths[1:]
    seen = (prompts**2 + (responses * (2 * prompts + responses)).sum(0)) // 2
    return costs[0] * lengths.sum(0) + costs[1] * responses.sum(0) + costs[2] * seen


def pack(tokens: np.ndarray, work: np.ndarray, ranks: int, limit: int) -> list[list[int]]:
    """Returns groups of indices of rows, `ranks` groups a round, one round behind the other.

    A group has at most `limit` tokens; a longer row is alone. There are few rounds, and the groups
    of a round have similar work; some of the last round may be empty. tokens, work: (N,), of rows.
    From the most work to the least, each row goes to the group with the least that has room (Graham
    1969).
    """
    order, over = np.argsort(-work, kind="stable").tolist(), np.minimum(tokens, limit).sum()
    tokens, work = tokens.tolist(), work.tolist()  # sums that do not overflow, items read faster
    rounds, share = 0, sum(work) / ranks
    while over:  # tokens that have no room in so many rounds
        rounds = min(rounds + math.ceil(over / (limit * ranks)), math.ceil(len(work) / ranks))
        # The first round is filled to its longest row, or evenly, or with the work of its tokens.
        level = min(max(work[order[0]], share / rounds), share * ranks * limit / sum(tokens))
        rest = level - (share - level) / max(1, rounds - 1)  # what others have less than the first
        groups = [[] for _ in range(ranks * rounds)]
        least = [(rest if n >= ranks else 0, n) for n in range(len(groups))]  # a heap
        over, room = 0, [limit] * len(groups)
        for i in order:
            while least and room[least[0][1]] < tokens[i] and groups[least[0][1]]:
                heapq.heappop(least)
            if least:
                done, n = least[0]
                groups[n].append(i)
                room[n] -= tokens[i]
                heapq.heapreplace(least, (done + work[i], n))
            else:
                over += min(tokens[i], limit)
    groups = sorted(filter(None, groups), key=lambda group: -sum([work[i] for i in group]))
    return groups + [[] for _ in range(-len(groups) % ranks)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = (
        "compute a prompt once for all its responses, without padding; --no-share_prefix: a padded "
        "line for each response, for models that can't share a prompt"
    )
    action = argparse.BooleanOptionalAction
    group = parser.add_argument_group("packing")
    group.add_argument("--share_prefix", action=action, default=True, help=text)


def layout(args: argparse.Namespace) -> type[Batcher]:
    """The class that makes batches: of packed rows, or with --no-share_prefix of padded lines."""
    return PackedBatcher if args.share_prefix else PaddedBatcher
