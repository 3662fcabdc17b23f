"""The upload of a run to the Hub, through huggingface_hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from nanoalign.errors import RunError, in_a_line
from nanoalign.hub.card import write_card

# The model, and how it came about. Checkpoints, hashes of the data and hidden files stay here.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "metrics.jsonl", "curves.png",
         "README.md", "adapter/*"]  # fmt: skip
PRIVATE = ["checkpoints/*", ".*"]


def push(run: Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads the model of a run as OWNER/NAME, in one commit. Returns the commit's address.

    A repository that does not exist is made. Raises RunError for a folder that is no finished run,
    without a token, and for what the Hub refuses.
    """
    write_card(run)
    if huggingface_hub.get_token() is None:
        raise RunError("there is no token of the Hub; set HF_TOKEN, or run `hf auth login`")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=run, revision=revision, allow_patterns=FILES,
            ignore_patterns=PRIVATE, commit_message=f"{run.resolve().name}, by nanoalign",
        )  # fmt: skip
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"'{run}' can't be uploaded as {name}: {in_a_line(error)}") from error
    return done.commit_url
