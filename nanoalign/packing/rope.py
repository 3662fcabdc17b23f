"""LongRoPE: rotary frequencies by response, not by the longest row of a forward.

A model of this kind (Phi-3-128k, Phi-3.5, Phi-4-mini; Ding et al. 2024, arXiv 2402.13753) has two
sets of frequencies, for sequences of up to `original_max_position_embeddings` tokens and for longer
ones. transformers takes the set of the longest sequence for all sequences of a forward, so scores
would depend on what else a micro-batch has. Here the positions of a long sequence are marked by
LONG, and each token gets the set of its own sequence: that of the prompt and one response.
"""

from functools import partial

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from nanoalign.batch import Row
from nanoalign.errors import RunError

LONG = 2**30  # is added to the positions of long sequences; no model has so many


def border_of(config: "transformers.PretrainedConfig") -> int | None:
    """The most tokens of a short sequence, for a model with LongRoPE; None for any other."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]  # by type of layer
    borders = {
        each["original_max_position_embeddings"]
        for each in nested or [parameters]
        if each.get("rope_type") == "longrope"
    }
    return min(borders, default=None)


def check_borders(
    config: "transformers.PretrainedConfig", reference: "transformers.PretrainedConfig"
) -> None:
    """Raises RunError if policy and reference, by their configs, can't read the same batches."""
    borders = [border_of(each) for each in (config, reference)]
    if borders[0] != borders[1]:
        own, others = ("nowhere" if n is None else f"behind token {n}" for n in borders)
        raise RunError(
            f"--model changes its rotary frequencies (LongRoPE) {own}, --reference {others}, so "
            "they can't read the same batches; give --precompute_reference"
        )


def read_marks(model: nn.Module) -> None:
    """Lets the rotary embeddings of a model with LongRoPE read positions that LONG marks."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        has_border = "longrope" in (kinds.values() if isinstance(kinds, dict) else [kinds])
        if has_border and not isinstance(module.forward, partial):
            module.forward = partial(embed, module.forward)


def embed(forward, x: Tensor, position_ids: Tensor, *more: object, **options: object):
    """(cos, sin) of each token by the frequencies of its sequence. forward: of the embedding."""
    is_long = position_ids >= LONG
    if not is_long.any():  # the model's own choice
        return forward(x, position_ids, *more, **options)
    zero = torch.zeros_like(position_ids)
    long = forward(x, (position_ids - LONG).where(is_long, zero), *more, **options)
    short = forward(x, position_ids.where(~is_long, zero), *more, **options)
    return tuple(torch.where(is_long[..., None], *pair) for pair in zip(long, short, strict=True))


def marks(row: Row, border: int | None) -> list[int]:
    """What is added to the positions of each response of a row: LONG or 0."""
    if border is None:
        return [0] * len(row.responses)
    return [LONG * (len(row.prompt) + len(r) > border) for r in row.responses]


def split_at(row: Row, border: int | None) -> list[tuple[tuple[np.ndarray, ...], int]]:
    """(responses that share one copy of the prompt, their mark), in the order of the row.

    All responses share it, unless they are on both sides of the border.
    """
    of_each = marks(row, border)
    if len({*of_each}) <= 1:
        return [(row.responses, max(of_each, default=0))]
    return [((r,), mark) for r, mark in zip(row.responses, of_each, strict=True)]
