"""Self-checks before the first step: of the layout, and of policy and reference at the start."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch.distributed import DistError, ReduceOp
from torch.distributed.fsdp import FSDPModule

from nanoalign.batch import Row, collate, lengths_of
from nanoalign.distributed import sum_over_ranks
from nanoalign.errors import RunError
from nanoalign.files.text import in_a_line
from nanoalign.loop import Batcher, Objective
from nanoalign.model import Policy, Scorer
from nanoalign.packing import rope

CHECKED_ROWS = 4  # from the shortest to the longest
CHECKED_TOKENS = 2048  # of the longest, if there are shorter rows: all its logits are made
# Allowed difference of two ways to compute a score: see `unit`; bfloat16 has 8 bits, float16 11.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 6e-3}
REWARDS = ("rewards/chosen", "rewards/rejected")
START_TOLERANCE = 1e-4  # policy and reference run the same kernels on the same numbers


@contextmanager
def one_line_errors(name: str, advice: str) -> Iterator[None]:
    """Raises RunError, of one line that ends with `advice`, for errors of a model's first forward.

    Errors that are not those of the architecture are raised as they are: of memory, of other ranks.
    """
    try:
        yield
    except (RunError, DistError, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException):
        raise  # not of the architecture
    except Exception as error:
        raise RunError(f"self-check: {name}: {in_a_line(error)}; {advice}") from error


def prepare(model: Scorer, data: object, batcher: Batcher, name: str) -> None:
    """Changes a model in place so that it reads the batches.

    Raises RunError if it can't read them, or a row of the data. name: of the model, for errors.
    """
    batcher.prepare(model)
    check_fits(model, data.rows, name)
    check_fits(model, data.held_out, name)


def check_fits(model: Scorer, rows: Sequence[Row], name: str) -> None:
    """Raises RunError for rows with token ids or positions that the model `name` does not have."""
    config = model.model.config.get_text_config()
    ids = model.model.get_input_embeddings().num_embeddings
    positions = max(0, getattr(config, "max_position_embeddings", 0) or 0) or math.inf  # XLNet: -1
    largest, longest = getattr(rows, "limits", (math.inf, math.inf))  # known of rows on disk
    for row in rows if largest >= ids or longest > positions else ():
        largest = max(int(part.max(initial=0)) for part in (row.prompt, *row.responses))
        if largest >= ids:
            raise RunError(
                f"{row.name}: has the token id {largest}, but {name} knows {ids} ids; its "
                "tokenizer belongs to another model"
            )
        if row.longest > positions:
            raise RunError(
                f"{row.name}: has {row.longest} tokens, but {name} knows {positions} positions; "
                f"give --max_length {positions} or less"
            )


@torch.no_grad()
def check_layout(model: Scorer, rows: Sequence[Row], batcher: Batcher, name: str) -> None:
    """Raises RunError if scores of a batch differ from the model's own on separate sequences.

    So a model that mixes the responses of a row is found before it is trained. Four rows are
    compared, the same on all ranks, and one beyond a border of LongRoPE. name: of the model, for
    errors.
    """
    lengths = lengths_of(rows)
    order, last = np.argsort(lengths, kind="stable"), int((lengths <= CHECKED_TOKENS).sum()) - 1
    places = [n * max(0, last) // (CHECKED_ROWS - 1) for n in range(CHECKED_ROWS)]
    picked = [rows[order[n]] for n in places]
    picked += across_border(model, rows, lengths, picked)
    device = batcher.world.device
    split = [
        replace(row, responses=(r,), pairs=(), extra={}) for row in picked for r in row.responses
    ]
    with one_line_errors(name, f"{type(model.model).__name__} is not supported"):
        plain = torch.cat([model.textbook(collate([row]).to(device)) for row in split])  # (S,)
    if not plain.isfinite().all():
        raise RunError(
            f"self-check: {name} gives {model.SCORES} of {plain.tolist()} on "
            f"{', '.join(row.name for row in picked)}; are its weights complete?"
        )
    batch = batcher.collate(picked).to(device)
    with one_line_errors(name, batcher.advice):
        scores = model(batch)
    if isinstance(model, FSDPModule):
        model.reshard()  # else an optimizer that is made after this would get the gathered copies
    # The error of a log-probability grows with its tokens, so it is divided by their number. 5 is
    # added because the errors of few tokens do not average out. Errors of rewards are proportional
    # to the rewards.
    unit = batch.lengths + 5 if isinstance(model, Policy) else 1 + plain.abs().max()
    off = ((scores - plain).abs() / unit).max().item()
    if not off <= (allowed := LAYOUT_TOLERANCE[model.dtype]):
        raise RunError(
            f"self-check: {name} gives {model.SCORES} that differ by up to {off:.2g} from those of "
            f"its own forward on separate sequences, on {picked[-1].name} and others (at most "
            f"{allowed:g} allowed); {batcher.advice}"
        )


def across_border(
    model: Scorer, rows: Sequence[Row], lengths: np.ndarray, picked: list[Row]
) -> list[Row]:
    """Returns the shortest row beyond the border of a model with LongRoPE; [] if one is picked."""
    border = rope.border_of(model.model.config)
    if border is None or any(row.longest > border for row in picked):
        return []
    candidates = (rows[n] for n in np.argsort(lengths, kind="stable") if lengths[n] > border)
    return list(islice((row for row in candidates if row.longest > border), 1))


@torch.no_grad()
def check_start(
    objective: Objective, rows: Sequence[Row], batcher: Batcher, reference: object = None
) -> None:
    """Raises RunError if losses and rewards are not those of a policy that is its reference.

    Rewards are then 0, and losses those of Objective.losses_at_start (ln 2 for DPO). reference: may
        have `tolerances`, of losses and of rewards. A collective: all ranks raise it together.
    """
    tolerances = getattr(reference, "tolerances", (START_TOLERANCE, START_TOLERANCE))
    objective.before_step(rows, batcher.step)
    batch = next(batcher.step(rows))
    losses, metrics = objective(batch)
    loss_off = (losses - objective.losses_at_start(batch)).abs().max()
    rewards = [v[0] if isinstance(v, tuple) else v for k, v in metrics.items() if k in REWARDS]
    off = [loss_off, torch.stack(rewards).abs().max()]
    loss_off, reward_off = sum_over_ranks(torch.stack(off).double(), ReduceOp.MAX).tolist()
    if not (loss_off <= tolerances[0] and reward_off <= tolerances[1]):
        raise RunError(
            f"self-check: with policy == reference, losses are up to {loss_off:.3g} from the loss "
            f"of log-ratios of 0, and rewards up to {reward_off:.3g} from 0, on the first "
            f"{len(rows)} pairs; at most {tolerances[0]:g} and {tolerances[1]:g} are allowed"
        )
