"""Names of models -> their folders, downloaded from the Hugging Face Hub if they are there.

Also reads the config and the tokenizer of a folder.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import huggingface_hub
import transformers
from huggingface_hub.errors import GatedRepoError

from nanoalign import model
from nanoalign.distributed import print0
from nanoalign.errors import RunError
from nanoalign.files import network
from nanoalign.files.text import in_a_line, read_json
from nanoalign.weights.tensor_files import INDEX, SINGLE_FILE, names_in_index

# How the chat template begins that a training by the template pku writes. nanoalign ignores that
# chat template, so that --template auto means for the result what it meant for the model.
OWN_TEMPLATE = "{#- The template 'pku' of nanoalign -#}"

# What is fetched of a model beside its weights. Of subfolders these are chat templates alone:
# original/ often stores the weights again.
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
READ_WHOLE = ["*config.json", "*tokenizer*.json", "*tokens*.json", "vocab*", "merges.txt"]
READ_WHOLE += ["*.model", "*.jinja", MORE_TEMPLATES]
LARGEST, LARGEST_CONFIG = 10**8, 2**24  # bytes of one of them; of config.json
COUNTS = re.compile("layer|num_labels|extra_ids")  # names of such numbers
MOST = 10_000  # layers, labels or additional tokens: of each a library makes an object


def local_folder(name: str | Path) -> Path:
    """Returns the folder of a model, as an absolute path, downloaded from the Hub if need be.

    name: a folder, "tiny", or OWNER/NAME of the Hub.
    Raises RunError for a path that does not exist (it is not sent to the Hub), a file, a folder
    that read_config refuses, and as fetch does.
    """
    folder = model.TINY if str(name) == "tiny" else Path(name).expanduser()
    if not folder.exists():
        if not is_hub_name(str(name)):
            raise RunError(
                f"model folder '{name}' does not exist; give a folder, 'tiny' or OWNER/NAME"
            )
        folder = fetch(str(name))
    if not folder.is_dir():
        raise RunError(f"model '{name}' is a file; give the folder that holds it")
    read_config(folder)
    return folder.resolve()


def read_config(folder: Path) -> "transformers.PretrainedConfig":
    """Returns the config of a model folder, whose Python code is not run.

    Prints a line if the config names such code. Raises RunError if there is no config that
    transformers can use, or if the model is quantized.
    """
    path = folder / "config.json"
    if not path.is_file() and (adapter := folder / ADAPTER_CONFIG).is_file():
        base = re.search(r'"base_model_name_or_path": *"(.*?)"', adapter.read_text())
        raise RunError(
            f"model folder '{folder}' is an adapter (LoRA) of {base[1] if base else 'a model'}; "
            "give the merged model: that of a run of nanoalign is in the folder above"
        )
    if not path.is_file():
        raise RunError(
            f"model folder '{folder}' has no config.json; give a model in Hugging Face format, or "
            "the folder of a run that has finished (--resume continues one)"
        )
    check_files(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        "".join(config.architectures or ())  # they must be names
    except Exception as error:  # of transformers, of any kind
        if "custom code" in str(error):
            raise RunError(
                f"model folder '{folder}' needs Python code of its own, which is never run; give a "
                "model whose architecture transformers has"
            ) from error
        raise RunError(f"{path}: {in_a_line(error)}; correct it, or give another model") from error
    if getattr(config, "auto_map", None):
        print0(f"{'model':<11} {folder} names Python code of its own (auto_map), which is not run")
    if getattr(config, "quantization_config", None) is not None:
        raise RunError(
            f"model folder '{folder}' is quantized; give the model with its full weights"
        )
    return config


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file of a model folder is a link out of it, but not into blobs of the Hub's cache.

    What such a link leads to would become a part of the result, which may be published.
    """
    target, own = path.resolve(), folder.resolve()
    # blobs/ of a repository, or blobs/XX/ of the cache: large files that repositories share.
    blobs = next((parent for parent in target.parents[:2] if parent.name == "blobs"), None)
    of_commit = own.parent.name == "snapshots" and blobs in (
        up / "blobs" for up in own.parents[1:3]
    )
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()
    of_cache = blobs is not None and blobs.is_relative_to(cache)
    return not (target.is_relative_to(own) or of_commit or of_cache)


def check_files(folder: Path) -> None:
    """Raises RunError for settings or a tokenizer that are not files of the folder, or too large.

    Too large is what would take many gigabytes of memory: a file, or a number of layers, labels or
    additional tokens.
    """
    for path in (path for pattern in READ_WHOLE for path in folder.glob(pattern)):
        if leads_out(path, folder):
            raise RunError(f"{path} is a link out of its folder to {path.resolve()}; give a copy")
        limit = LARGEST_CONFIG if path.name == "config.json" else LARGEST
        if (size := path.stat().st_size) > limit:
            raise RunError(f"{path} has {size:,} bytes; no model has more than {limit:,} there")
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if path.is_file():
            check_counts(path, read_json(path))


def check_counts(path: Path, settings: dict) -> None:
    """Raises RunError for a number of layers, labels or tokens above MOST. path: for the error."""
    for name, value in settings.items():
        if isinstance(value, dict):
            check_counts(path, value)
        elif isinstance(value, int) and value > MOST and COUNTS.search(name):
            raise RunError(f"{path}: {name} is {value:,}; no model has more than {MOST:,}")


def load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """Loads the tokenizer of a model folder, without the chat template that begins as OWN_TEMPLATE.

    Raises RunError if there is none, or it can't be used.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("x")  # settings that can't be used are errors here
    except Exception as error:  # of transformers, of any kind
        raise RunError(
            f"model '{folder}' has no readable tokenizer: {in_a_line(error)}; restore its files"
        ) from error
    if str(tokenizer.chat_template).startswith(OWN_TEMPLATE):
        tokenizer.chat_template = None
    return tokenizer


def check_vocabulary(folder: Path, other: Path) -> None:
    """Raises RunError if a reference has other tokens than the policy.

    folder: of the policy. other: of the reference.
    """
    if other != folder and load_tokenizer(other).get_vocab() != load_tokenizer(folder).get_vocab():
        raise RunError(
            f"--reference {other} has another vocabulary than the policy {folder}, so their "
            "log-probabilities can't be compared; give a reference with the same tokens"
        )


# --- models of the Hub ----------------------------------------------------------------------------


def is_hub_name(name: str) -> bool:
    """Whether a name is OWNER/NAME or OWNER/NAME@REVISION, not a path.

    runs/NAME is a path, and so is OWNER/NAME if there is a folder OWNER here.
    """
    owner = name.split("/")[0]
    matches = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", name, re.ASCII)
    return bool(matches) and owner != "runs" and not Path(owner).exists()


def public_name(name: str) -> str | None:
    """Returns OWNER/NAME, without @REVISION, of a name of the Hub; None for a local folder."""
    return name.partition("@")[0] if is_hub_name(name) and not Path(name).exists() else None


@cache  # a script may ask for a model twice
def fetch(name: str) -> Path:
    """Downloads a model of the Hub, after printing a line; returns its folder in the Hub's cache.

    name: OWNER/NAME, or OWNER/NAME@REVISION. Its weights are fetched from safetensors files alone,
        and from no others than the index names.
    Raises RunError if the Hub does not have it, or can't be reached.
    """
    constants = huggingface_hub.constants
    if not constants.HF_HUB_OFFLINE:
        host = re.sub(r".*(//|@)", "", constants.ENDPOINT)  # of $HF_ENDPOINT, without its password
        print0(f"{'model':<11} {name}: asked of {host}")
    _, _, revision = name.partition("@")
    folder = download(name, revision or None, SMALL_FILES)
    has_index = (folder / INDEX).is_file()
    names = names_in_index(folder / INDEX) if has_index else [SINGLE_FILE]
    # The folder is called after its commit: a branch may move between the two downloads.
    folder = download(name, folder.name, [*names, MORE_TEMPLATES], [])
    network.check_content(path for path in folder.rglob("*") if path.is_file())
    return folder


def download(
    name: str, revision: str | None, patterns: list[str], without: Sequence[str] = ("*/*",)
) -> Path:
    """Downloads the files of a model that match a pattern, and none of `without` (of subfolders).

    Returns their folder in the Hub's cache. One rank of a host downloads, the others wait for its
    lock. Raises RunError as fetch.
    """
    repo = name.partition("@")[0]
    network.limit_requests()
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(without)
        )
        return Path(folder)
    except GatedRepoError as error:
        raise RunError(
            f"model '{name}' is gated: accept its terms on the page of {repo}, and set HF_TOKEN"
        ) from error
    except RunError:
        raise
    except Exception as error:  # no such model or revision; any kind of its library for HTTP
        raise RunError(
            f"model '{name}' is neither a folder here nor a public model of the Hub; for a private "
            f"one set HF_TOKEN ({in_a_line(error)})"
        ) from error
