"""Weight files whose tensors are not those of the model: transformers converts them on rank 0.

So are the experts of a mixture, which a file has one by one and a model in one tensor, and names
that have changed. Rank 0 holds the whole model meanwhile.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from nanoalign.checkpoints.guards import FOREIGN_ERRORS
from nanoalign.checkpoints.slices import local_rows
from nanoalign.errors import RunError, in_a_line


def load_by_transformers(
    model: PreTrainedModel, tensors: dict[tuple[str, ...], Tensor], folder: Path
) -> None:
    """Rank 0 loads by transformers, which converts names and layouts, and sends each tensor."""
    loaded, problem = {}, [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            loaded = from_pretrained(model, folder)
        except RunError as error:
            problem = [str(error)]
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise RunError(problem[0])
    for names, tensor in tensors.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if names[0] in loaded:
            whole.copy_(loaded[names[0]])
        if several:
            dist.broadcast(whole, src=0)
        rows = local_rows(tensor)
        sharded = isinstance(tensor, DTensor)
        (tensor.to_local() if sharded else tensor).copy_(
            whole[rows.start : rows.stop] if sharded else whole
        )


def from_pretrained(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The tensors by name, as transformers loads them; a name without a place is an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the RunError below takes the place of its report
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = type(model).from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except FOREIGN_ERRORS as error:
        raise RunError(f"model folder '{folder}' can't be loaded: {in_a_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[kind])):
            more = f" and {len(found) - 3} more" * (len(found) > 3)
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(found[:3])}{more}")
    if problems:
        raise RunError(
            f"model folder '{folder}': its weights are not those of the {type(loaded).__name__} in "
            f"config.json; {'; '.join(problems)}"
        )
    return loaded.state_dict()
