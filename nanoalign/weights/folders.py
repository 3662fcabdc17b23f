"""Folders of models, by their names: configs, tokenizers, and rows that a model can't read."""

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import huggingface_hub
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from nanoalign import model
from nanoalign.distributed import print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.files.run_folder import advice

# The head of the chat template that `pku` gives to a model. --template auto does not regard that.
OWN_TEMPLATE = "{#- The template 'pku' of nanoalign -#}"


def local_folder(name: str | Path) -> Path:
    """The folder of a model: a local one, "tiny", or OWNER/NAME, which is downloaded from the Hub.

    A name of a path that does not exist is not asked of the Hub. Raises RunError for it.
    """
    folder = model.TINY if str(name) == "tiny" else Path(name).expanduser()
    if not folder.exists():
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


def check_vocabulary(folder: Path, other: Path) -> None:
    """Raises RunError if two models have different tokens: log-probabilities can't be compared."""
    if other != folder and load_tokenizer(other).get_vocab() != load_tokenizer(folder).get_vocab():
        raise RunError(
            f"--reference {other} has another vocabulary than --model {folder}; their "
            "log-probabilities can't be compared"
        )


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
        raise RunError(
            f"model folder '{name}' does not exist; {nearest_folder(Path(name).expanduser())}"
        )
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


def nearest_folder(path: Path) -> str:
    """What to give in place of a path that does not exist."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {each.name: each for each in beside if each.is_dir()}
    for name in get_close_matches(path.name, folders, n=1):
        return f"is it {folders[name]}?"
    return "give a folder, 'tiny' or OWNER/NAME"
