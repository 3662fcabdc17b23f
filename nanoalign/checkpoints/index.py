"""The index of a model in several safetensors files, and the names of these."""

import json
from pathlib import Path

from nanoalign.errors import RunError, in_a_line


def write_index(folder: Path, names: list[list[str]], total: int) -> None:
    """Names the files unnamed-N.safetensors by their number, and writes their index.

    names: of the tensors of each file. total: their bytes.
    """
    count, weight_map = len(names), {}
    for n, each in enumerate(names):
        name = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"unnamed-{n}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(each, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def files_of(index: Path) -> list[str]:
    """The names of the files of an index. Raises RunError if it or one of them is
    damaged or not there."""
    if not index.is_file():
        from nanoalign.checkpoints.unfinished import advice

        raise RunError(
            advice(index.parent)
            or f"model folder '{index.parent}' has no weights: neither model.safetensors nor "
            f"{index.name} (other formats are not read; convert them with transformers' "
            "save_pretrained)"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{index}: not an index of files: {in_a_line(error)}") from error
    if missing:
        raise RunError(f"{index}: names the file {missing[0]}, which is missing")
    return names
