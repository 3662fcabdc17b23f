"""Safetensors files whose tensors are not those of the model: transformers converts them on rank 0.

Examples are the experts of a mixture, of which a file has each and a model one tensor for all, and
tensors that were renamed. Rank 0 needs host memory for the full model.
"""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from nanoalign.checkpoints.slices import local_rows
from nanoalign.checkpoints.tied import check_tied
from nanoalign.errors import RunError, in_a_line

# Nothing pickled, no code of the folder, and no attention whose code is fetched from the Hub.
SAFE = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}


def load_by_transformers(
    model: PreTrainedModel, tensors: dict[tuple[str, ...], Tensor], folder: Path
) -> None:
    """Fills tensors, by all their names, with those that rank 0 loads and sends. A collective.

    Raises RunError on all ranks if the files do not fit the model.
    """
    loaded, message = {}, [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            loaded = from_pretrained(model, folder)
            if lost := [names[0] for names in tensors if loaded.keys().isdisjoint(names)]:
                raise RunError(
                    f"model folder '{folder}' has no weights for {', '.join(sorted(lost)[:3])} of "
                    f"{type(model).__name__}"
                )
            check_tied(tensors, {name: partial(loaded.get, name) for name in loaded}, folder)
        except RunError as error:
            message = [str(error)]
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise RunError(message[0])
    for names, tensor in tensors.items():
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if found := [name for name in names if name in loaded]:  # on rank 0
            full.copy_(loaded[found[0]])
        if several:
            dist.broadcast(full, src=0)
        if isinstance(tensor, DTensor):
            rows = local_rows(tensor)
            tensor.to_local().copy_(full[rows.start : rows.stop])
        else:
            tensor.copy_(full)


def from_pretrained(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The tensors by name, as transformers loads them.

    Raises RunError if the files lack a tensor of the model, or have one that the model lacks.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the RunError below replaces its report
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = type(model).from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **SAFE
        )
    except Exception as error:
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
            f"config.json: {'; '.join(problems)}"
        )
    return loaded.state_dict()
