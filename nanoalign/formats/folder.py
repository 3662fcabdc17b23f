"""A source of data that is a folder of files, or a mistake."""

import json
import re
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.formats.sources import EMBEDDED, SUFFIXES


def files_of(place: str) -> list[Path]:
    """The files of a folder, in the order of their names. Raises RunError where there are none.

    Of a folder that Dataset.save_to_disk made, they are those that its state.json names.
    """
    path = Path(place)
    above, _, split = place.rpartition(":")
    if not path.exists() and above and Path(above).is_dir():
        return files_of_split(Path(above), split)
    if not path.exists():
        raise RunError(
            f"data file '{place}' does not exist; give a path, hf://datasets/... or one of the "
            f"embedded {', '.join(EMBEDDED)}"
        )
    if not path.is_dir():
        raise RunError(
            f"data file '{place}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
        )
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise RunError(
            f"data source '{place}' has the splits {', '.join(splits)}; give one: "
            f"{place.rstrip('/')}:{splits[0]}"
        )
    if (path / "state.json").is_file():
        saved = json.loads((path / "state.json").read_text())["_data_files"]
        return [path / each["filename"] for each in saved]
    paths = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
    if not paths:
        raise RunError(f"data source '{place}': the folder has no {', '.join(SUFFIXES)} files")
    return paths


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files in the folder of a split, or those that have it in their names."""
    if (folder / split).is_dir():
        return files_of(str(folder / split))
    named = re.compile(rf"(.*[._-])?{re.escape(split)}[._-].*")
    paths = [path for path in sorted(folder.iterdir()) if named.fullmatch(path.name)]
    paths = [path for path in paths if path.name.endswith(SUFFIXES)]
    if not paths:
        raise RunError(f"data source '{folder}:{split}': the folder has no files of '{split}'")
    return paths
