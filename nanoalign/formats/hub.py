"""Files of datasets on the Hugging Face Hub, in the local cache of huggingface_hub."""

import re
from pathlib import Path

import huggingface_hub

from nanoalign.errors import RunError, in_a_line
from nanoalign.formats.sources import SUFFIXES, Source

PLACE = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)/(?P<path>[^@:]+)"
    r"(?:@(?P<revision>[^:]+))?(?::(?P<split>[\w-]+))?"
)


class OnHub(Source):
    """A file, or a split."""

    def __init__(self, name: str, place: str):
        """Raises RunError for a place that is not of the grammar."""
        if (found := PLACE.fullmatch(place)) is None:
            raise RunError(
                f"data source '{place}': expected hf://datasets/OWNER/NAME/PATH[@REVISION][:SPLIT]"
            )
        super().__init__(name or Path(found["path"]).name.split(".")[0], place)

    @property
    def absolute(self) -> str:
        return self.place

    @property
    def parts(self) -> tuple[str, str, str | None, str | None]:
        """(OWNER/NAME, path, revision, split)."""
        return PLACE.fullmatch(self.place).group("repo", "path", "revision", "split")

    def files(self) -> list[Path]:
        return fetch(self.place, *self.parts)


def fetch(place: str, repo: str, path: str, revision: str | None, split: str | None) -> list[Path]:
    """The file, or with a split the files in the folder `path` that have it in their names.

    place: the source as it was given, for errors. Raises RunError for what the Hub does not give.
    """
    options = {"repo_type": "dataset", "revision": revision}
    try:
        names = [path]
        if split:
            below = re.compile(rf"{re.escape(path)}/(.*[/._-])?{re.escape(split)}[/._-].*")
            found = huggingface_hub.HfApi().list_repo_files(repo, **options)
            names = [n for n in sorted(found) if below.fullmatch(n) and n.endswith(SUFFIXES)]
        files = [Path(huggingface_hub.hf_hub_download(repo, name, **options)) for name in names]
    except (OSError, ValueError) as error:  # no network, no such file, not a valid name
        raise RunError(f"data source '{place}' can't be fetched: {in_a_line(error)}") from error
    if not files:
        raise RunError(f"data source '{place}': {path} has no files of '{split}'")
    return files
