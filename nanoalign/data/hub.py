"""Files of datasets on the Hugging Face Hub, in the local cache of huggingface_hub."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from nanoalign.data.readers import SUFFIXES, Source
from nanoalign.errors import RunError, in_a_line

PLACE = re.compile(
    r"hf://datasets/(?P<repo>[^/@:]+/[^/@:]+)(?:/(?P<path>[^@:]+))?"
    r"(?:@(?P<revision>[^:]+))?(?::(?P<split>[\w-]+))?"
)


NAMED_TRAIN = re.compile(r"(?:^|[/.-])(train_\w+?)[/.-]")  # train_prefs, train_sft
OTHER_SPLITS = re.compile(r"(^|[/._-])(test|valid|validation|dev|eval)[/._-]")


class OnHub(Source):
    """A file, a split, or the training split of a data set."""

    def __init__(self, name: str, place: str):
        """Raises RunError for a place that is not of the grammar."""
        if (found := PLACE.fullmatch(place)) is None:
            raise RunError(
                f"data source '{place}': expected "
                "hf://datasets/OWNER/NAME[/PATH][@REVISION][:SPLIT]"
            )
        super().__init__(name or Path(found["path"] or found["repo"]).name.split(".")[0], place)

    @property
    def absolute(self) -> str:
        return self.place

    @property
    def parts(self) -> tuple[str, str | None, str | None, str | None]:
        """(OWNER/NAME, path, revision, split)."""
        return PLACE.fullmatch(self.place).group("repo", "path", "revision", "split")

    def files(self) -> list[Path]:
        return fetch_files(self.place, *self.parts)


def fetch_files(
    place: str, repo: str, path: str | None, revision: str | None, split: str | None
) -> list[Path]:
    """The file, or with a split the files in the folder `path` that have it in their names.

    Of a whole data set they are those of "train", or all that no split has in its name.
    place: the source as it was given, for errors. Raises RunError for what the Hub does not give.
    """
    options = {"repo_type": "dataset", "revision": revision}
    try:
        names = [path]
        if split or not path:
            folder = f"{re.escape(path)}/" if path else ""
            below = re.compile(rf"{folder}(.*[/._-])?{re.escape(split or 'train')}[/._-].*")
            info = huggingface_hub.HfApi().dataset_info(repo, revision=revision)
            options["revision"] = info.sha  # all files of one commit: a branch may move
            found = sorted(each.rfilename for each in info.siblings)
            found = [name for name in found if name.endswith(SUFFIXES)]
            names = [name for name in found if below.fullmatch(name)]
            if several := sorted({m[1] for m in map(NAMED_TRAIN.search, names) if m and not split}):
                raise RunError(
                    f"data source '{place}' has the training splits {', '.join(several)}; give "
                    f"one: {place}:{several[0]}"
                )
            if not names and not split:
                names = [name for name in found if not OTHER_SPLITS.search(name)]
        files = [Path(huggingface_hub.hf_hub_download(repo, name, **options)) for name in names]
    except RunError:
        raise
    except GatedRepoError as error:
        raise RunError(
            f"data source '{place}' is gated: accept its terms on the page of {repo}, and set "
            "HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise RunError(
            f"data source '{place}': the Hub has no public data set {repo}; for a private one set "
            "HF_TOKEN"
        ) from error
    except (OSError, ValueError) as error:  # no network, no such file, not a valid name
        raise RunError(f"data source '{place}' can't be fetched: {in_a_line(error)}") from error
    if not files:
        raise RunError(
            f"data source '{place}': {path or repo} has no files of '{split or 'train'}'"
        )
    return files
