"""Data sets of the Hugging Face Hub, and those that Dataset.save_to_disk has written.

A single file of the Hub comes through huggingface_hub, all else through the datasets library.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub

from nanoalign.data.table_files import import_datasets
from nanoalign.errors import RunError
from nanoalign.files import network
from nanoalign.files.text import in_a_line


@contextmanager
def hub_errors(place: str, repo: str) -> Iterator[None]:
    """Turns errors of the Hub's libraries inside this context into a RunError of one line.

    Such errors are: a gated data set, none of this name, no such file or split, no network.
    place: the data source, for the message. repo: its OWNER/NAME.
    """
    network.limit_requests()
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # of huggingface_hub, datasets, and what these use for HTTP
        text = " ".join(str(error).split())[:300]  # its further lines name the splits, or subsets
        raise RunError(
            f"data source '{place}' can't be fetched: {type(error).__name__}: {text}; for a gated "
            f"or private data set accept its terms on the page of {repo} and set HF_TOKEN"
        ) from error


def fetch_file(place: str, repo: str, path: str, revision: str | None) -> Path:
    """Downloads a file of a data set into the cache of huggingface_hub; returns its path.

    Raises RunError as hub_errors does.
    """
    with hub_errors(place, repo):
        options = {"repo_type": "dataset", "revision": revision}
        file = Path(huggingface_hub.hf_hub_download(repo, path, **options))
    network.check_content([file])
    return file


def load_split(place: str, repo: str, part: str | None, revision: str | None, split: str):
    """Returns a split of a data set as a datasets.Dataset, in the cache of the datasets library.

    repo: OWNER/NAME. part: a configuration of the data set ("subset" on its page), or a folder in
    it; None: the default configuration. Raises RunError as hub_errors does, and if the datasets
    library is not installed.
    """
    datasets = import_datasets(place)
    load = partial(datasets.load_dataset, repo, split=split, revision=revision)
    with hub_errors(place, repo):
        if not part:
            return load()
        if part in datasets.get_dataset_config_names(repo, revision=revision):
            return load(name=part)
        try:
            return load(data_dir=part)
        except ValueError:
            if not datasets.config.HF_HUB_OFFLINE:
                raise
            return load(name=part)  # without the Hub the configurations are not known


def load_saved(place: str):
    """Returns the datasets.Dataset of a folder that Dataset.save_to_disk has written.

    Raises RunError if the folder can't be read or has several splits, and if the datasets library
    is not installed.
    """
    datasets = import_datasets(place)
    try:
        saved = datasets.load_from_disk(place)
    except Exception as error:  # of datasets, of any kind
        raise RunError(
            f"data source '{place}': not a readable data set of Dataset.save_to_disk: "
            f"{in_a_line(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        raise RunError(
            f"data source '{place}' has the splits {', '.join(saved)}; give one: "
            f"{place.rstrip('/')}:{next(iter(saved))}"
        )
    return saved
