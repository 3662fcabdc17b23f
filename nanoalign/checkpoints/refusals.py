"""Errors of models and data that can't be used: what is wrong, and what to do."""

from pathlib import Path

from nanoalign.batch import Row
from nanoalign.checkpoints.unfinished import advice
from nanoalign.errors import RunError, in_a_line


def unreadable(folder: Path, error: Exception) -> RunError:
    """Why a folder has no config. error: of transformers."""
    if not (folder / "config.json").is_file():
        no_config = f"model folder '{folder}' has no config.json; is it a Hugging Face model?"
        return RunError(advice(folder) or no_config)
    if "custom code" in str(error):
        return RunError(
            f"model folder '{folder}' needs Python code of its own, which is never run; give a "
            "model whose architecture transformers has"
        )
    return RunError(f"{folder / 'config.json'}: {in_a_line(error)}")


def unfit(row: Row, name: str, largest: int, ids: int, positions: float) -> RunError:
    """Why the model `name` can't read a row.

    largest: token id of the row. ids, positions: how many the model has.
    """
    if largest >= ids:
        return RunError(
            f"{row.name}: has the token id {largest}, but {name} knows {ids} ids; its "
            "tokenizer belongs to another model"
        )
    return RunError(
        f"{row.name}: has {row.longest} tokens, but {name} knows {positions} positions; "
        f"give --max_length {positions} or less"
    )
