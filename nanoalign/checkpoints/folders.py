"""Folders of models, by their names: configs, tokenizers, and rows that a model can't read."""

import math
from collections.abc import Sequence
from pathlib import Path

import transformers

from nanoalign import tiny
from nanoalign.batch import Row
from nanoalign.distributed import print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.model import Scorer

# The head of the chat template that `pku` gives to a model. --template auto does not regard that.
OWN_TEMPLATE = "{#- The template 'pku' of nanoalign -#}"


def local_folder(name: str | Path) -> Path:
    """The folder of a model: a local one, "tiny", or OWNER/NAME, which is downloaded from the Hub.

    A name of a path that does not exist is not asked of the Hub. Raises RunError for it.
    """
    folder = tiny.MODEL if str(name) == "tiny" else Path(name).expanduser()
    if not folder.exists():
        from nanoalign.checkpoints.hub import fetch

        folder = fetch(str(name))
    if not folder.is_dir():
        raise RunError(f"model '{name}' is a file; give the folder that holds it")
    read_config(folder)  # raises RunError if this is not a model
    return folder.resolve()


def read_config(folder: Path) -> "transformers.PretrainedConfig":
    """The config of a model folder. Raises RunError if there is none, or the model is quantized."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        "".join(config.architectures or ())  # they must be names
    except Exception as error:  # of transformers, of any kind
        from nanoalign.checkpoints.refusals import unreadable

        raise unreadable(folder, error) from error
    if getattr(config, "auto_map", None):
        print0(f"{'model':<11} {folder} names Python code of its own (auto_map), which is not run")
    if getattr(config, "quantization_config", None) is not None:
        raise RunError(f"model folder '{folder}' is quantized; training needs its full weights")
    return config


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder, without OWN_TEMPLATE. Raises RunError if there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("x")  # settings that can't be used are errors here
    except Exception as error:
        raise RunError(f"model '{folder}' has no readable tokenizer: {in_a_line(error)}") from error
    if str(tokenizer.chat_template).startswith(OWN_TEMPLATE):
        tokenizer.chat_template = None
    return tokenizer


def check_fits(model: Scorer, rows: Sequence[Row], name: str) -> None:
    """Raises RunError for rows with token ids or positions that the model `name` does not have."""
    config = model.model.config.get_text_config()
    ids = model.model.get_input_embeddings().num_embeddings
    positions = max(0, getattr(config, "max_position_embeddings", 0) or 0) or math.inf  # XLNet: -1
    largest, longest = getattr(rows, "limits", (math.inf, math.inf))  # known of rows on disk
    for row in rows if largest >= ids or longest > positions else ():
        largest = max(int(part.max()) for part in (row.prompt, *row.responses))
        if largest >= ids or row.longest > positions:
            from nanoalign.checkpoints.refusals import unfit

            raise unfit(row, name, largest, ids, positions)
