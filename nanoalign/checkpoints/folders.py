"""Names of models -> local folders."""

from pathlib import Path

from nanoalign import tiny
from nanoalign.checkpoints.guards import read_config
from nanoalign.errors import RunError, in_a_line


def local_folder(name: str | Path) -> Path:
    """The folder of a model: a local one, "tiny", or OWNER/NAME, which is downloaded from the Hub.

    Raises RunError if there is none.
    """
    folder = tiny.MODEL if str(name) == "tiny" else Path(name)
    if folder.is_dir():
        read_config(folder)  # raises RunError if this is not a model
        return folder.resolve()
    if folder.exists():
        raise RunError(f"model '{name}' is a file; give the folder that holds it")
    if len(folder.parts) != 2 or folder.is_absolute():  # not OWNER/NAME
        raise RunError(f"model folder '{name}' does not exist; give a folder, 'tiny' or OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:  # one rank of a host downloads; the others wait for its lock
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, ValueError) as error:  # not found, no network, not a valid name
        raise RunError(
            f"model '{name}' is neither a folder here nor a model of the Hub: {in_a_line(error)}"
        ) from error
