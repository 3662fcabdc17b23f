"""Reward models that are read from the files of a language model."""

from pathlib import Path

import torch
import transformers

from nanoalign.checkpoints.slices import build


def reader_of(
    model: "transformers.PreTrainedModel", config: "transformers.PretrainedConfig",
    dtype: torch.dtype, folder: Path,
) -> "transformers.PreTrainedModel":  # fmt: skip
    """What reads the files of a folder into a reward model: itself, if they have a reward head.

    Those of a language model are read by one, into the body of the reward model.
    """
    if any("ForSequence" in name for name in config.architectures or ()):
        return model
    reader = build(transformers.AutoModelForCausalLM, config, dtype, folder)
    setattr(reader, reader.base_model_prefix, model.base_model)
    return reader
