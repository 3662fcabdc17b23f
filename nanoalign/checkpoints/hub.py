"""Names of models for which there is no folder: models of the Hugging Face Hub, and mistakes."""

import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import huggingface_hub

from nanoalign.distributed import print0
from nanoalign.errors import RunError, in_a_line

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no code, nothing pickled


@cache  # a script may ask for a model twice
def fetch(name: str) -> Path:
    """Downloads a model of the Hub, after it has said so; its folder in the cache of the Hub.

    Raises RunError for a path, which is not sent to the Hub, and for what the Hub does not have.
    """
    if not is_hub_name(name):
        raise RunError(f"model folder '{name}' does not exist; {advice(Path(name).expanduser())}")
    constants = huggingface_hub.constants
    if not constants.HF_HUB_OFFLINE:
        host = re.sub(r".*(//|@)", "", constants.ENDPOINT)  # of $HF_ENDPOINT, without its password
        print0(f"{'model':<11} {name}: asked of {host}")
    try:  # one rank of a host downloads; the others wait for its lock
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # not found, no network
        raise RunError(
            f"model '{name}' is neither a folder here nor a model of the Hub: {in_a_line(error)}"
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name is OWNER/NAME: runs/NAME, and a NAME in a folder that is here, are paths."""
    owner = name.split("/")[0]
    matches = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII)
    return bool(matches) and owner != "runs" and not Path(owner).exists()


def public_name(name: str) -> str | None:
    """OWNER/NAME of a model that was given so, or as its folder in the cache of the Hub."""
    if found := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{name}/"):
        return "/".join(found.groups())
    return name if is_hub_name(name) and not Path(name).exists() else None


def advice(path: Path) -> str:
    """What to give in place of a path that does not exist."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {each.name: each for each in beside if each.is_dir()}
    for name in get_close_matches(path.name, folders, n=1):
        return f"is it {folders[name]}?"
    return "give a folder, 'tiny' or OWNER/NAME"
