"""The folder of a run -> a model of the Hugging Face Hub, in one commit."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from nanoalign.checkpoints.card import CARD, CARD_MARK
from nanoalign.checkpoints.folders import read_config
from nanoalign.checkpoints.runs import ARGS, METRICS
from nanoalign.checkpoints.slices import stored_tensors
from nanoalign.checkpoints.write import TOKENIZER_FILES
from nanoalign.errors import RunError, in_a_line

# Of httpx or httpx2, as the version of huggingface_hub has it: also that there is no connection.
HTTPError = next(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
FILES = ("config.json", "generation_config.json", "model*.safetensors",
         "model.safetensors.index.json", *TOKENIZER_FILES, CARD, ARGS, METRICS, "curves.png",
         "adapter/*")  # fmt: skip


def push(name: str, folder: Path, private: bool = False, revision: str | None = None) -> str:
    """Uploads the result in a folder as the model `name`. Returns the address of the commit.

    private: of a model that is created; one that is there stays as it is.
    revision: a branch, which is created where there is none; None: main.
    Raises RunError if the folder has no finished result, without a token, and for what the Hub
    refuses.
    """
    files = files_of(folder)
    if huggingface_hub.get_token() is None:
        raise RunError("no token for the Hub; run `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path, content_of(path, folder, name)) for path in files
    ]
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.create_commit(
            name, operations, commit_message=f"Upload {folder.name}", revision=revision
        )
    except HFValidationError as error:
        raise RunError(f"'{name}' is no name of a model: {in_a_line(error)}") from error
    except (HTTPError, OSError) as error:  # refused; no network
        raise RunError(f"'{name}' could not be pushed: {in_a_line(error)}") from error
    return done.commit_url


def files_of(folder: Path) -> list[str]:
    """The files that are uploaded, by their path in the folder.

    Raises RunError if there is no such folder, or its run has not finished.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder '{folder}'; give the --out of a run")
    read_config(folder)  # raises RunError for a run without a model, with the command to go on
    stored_tensors(folder)  # and if weights are missing
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def content_of(path: str, folder: Path, name: str) -> Path | bytes:
    """The file, or a card of ours as it is read on the Hub: its code loads the model from there."""
    if path == CARD and CARD_MARK in (text := (folder / path).read_text()):
        out = json.loads((folder / ARGS).read_text())["out"]
        return text.replace(f'from_pretrained("{out}")', f'from_pretrained("{name}")').encode()
    return folder / path
