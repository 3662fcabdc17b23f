"""Errors of packing."""

from transformers import PreTrainedModel

from nanoalign.errors import RunError


def unpackable(model: PreTrainedModel, kinds: list[str]) -> RunError:
    """Why a model can't read packed rows. kinds: of its layers, those that mix responses."""
    what = f"{type(model).__name__} has an attention of its own, which"
    if kinds:
        what = f"layers of the type '{kinds[0]}'"
    return RunError(f"{what} can't keep the responses of a prompt apart; use --no-share_prefix")
