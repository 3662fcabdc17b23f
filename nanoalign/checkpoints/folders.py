"""Names of models -> local folders."""

from pathlib import Path

from nanoalign import tiny
from nanoalign.checkpoints.guards import read_config
from nanoalign.errors import RunError


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
