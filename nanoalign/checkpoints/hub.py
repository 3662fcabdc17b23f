"""Names of models for which there is no folder: models of the Hugging Face Hub, and mistakes."""

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from nanoalign.distributed import print0
from nanoalign.errors import RunError, in_a_line

# No code, nothing pickled, no folders: original/ has the weights of some models again.
SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
INDEX, WEIGHTS = "model.safetensors.index.json", ("model.safetensors", "adapter_model.safetensors")


@cache  # a script may ask for a model twice
def fetch(name: str) -> Path:
    """Downloads a model of the Hub, after it has said so; its folder in the cache of the Hub.

    name: OWNER/NAME, or OWNER/NAME@REVISION. Of its weights only the files that the index names.
    Raises RunError for a path, which is not sent to the Hub, and for what the Hub does not have.
    """
    if not is_hub_name(name):
        raise RunError(f"model folder '{name}' does not exist; {advice(Path(name).expanduser())}")
    constants = huggingface_hub.constants
    if not constants.HF_HUB_OFFLINE:
        host = re.sub(r".*(//|@)", "", constants.ENDPOINT)  # of $HF_ENDPOINT, without its password
        print0(f"{'model':<11} {name}: asked of {host}")
    repo, _, revision = name.partition("@")
    options = {"revision": revision or None, "ignore_patterns": ["*/*"]}
    try:  # one rank of a host downloads; the others wait for its lock
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=SMALL, **options))
        names = WEIGHTS
        if (folder / INDEX).is_file():
            names = {*json.loads((folder / INDEX).read_text())["weight_map"].values()}
        options["revision"] = folder.name  # the commit: a branch may move in between
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*names], **options))
    except GatedRepoError as error:
        raise RunError(
            f"model '{name}' is gated: accept its terms on the page of {repo}, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise RunError(
            f"model '{name}' is neither a folder here nor a public model of the Hub; for a private "
            "one set HF_TOKEN"
        ) from error
    except (OSError, ValueError) as error:  # no such revision, no network
        raise RunError(
            f"model '{name}' is neither a folder here nor a model of the Hub: {in_a_line(error)}"
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name is OWNER/NAME[@REVISION].

    runs/NAME, and a NAME in a folder that is here, are paths.
    """
    owner = name.split("/")[0]
    matches = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", name, re.ASCII)
    return bool(matches) and owner != "runs" and not Path(owner).exists()


def public_name(name: str) -> str | None:
    """OWNER/NAME of a model that was given so, or as its folder in the cache of the Hub."""
    if found := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{name}/"):
        return "/".join(found.groups())
    return name.partition("@")[0] if is_hub_name(name) and not Path(name).exists() else None


def advice(path: Path) -> str:
    """What to give in place of a path that does not exist."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {each.name: each for each in beside if each.is_dir()}
    for name in get_close_matches(path.name, folders, n=1):
        return f"is it {folders[name]}?"
    return "give a folder, 'tiny' or OWNER/NAME"
