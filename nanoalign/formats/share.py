"""SOURCE*SHARE: a share of the records of another source."""

import random
from collections.abc import Iterator
from pathlib import Path

from nanoalign.errors import RunError
from nanoalign.formats.sources import Located, Source, source_at


class Share(Source):
    def __init__(self, name: str, place: str):
        """Raises RunError for a share that is not a number between 0 and 1."""
        inner, _, share = place.rpartition("*")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not inner or not 0 < number < 1:
            raise RunError(
                f"data source '{place}': expected SOURCE*SHARE, a number above 0 and below 1; for "
                "more of one source give less of the others, and more --epochs"
            )
        super().__init__(name or source_at(inner, "").name, place)

    @property
    def inner(self) -> Source:
        return source_at(self.place.rpartition("*")[0], self.name)

    @property
    def share(self) -> float:
        return float(self.place.rpartition("*")[2])

    @property
    def absolute(self) -> str:
        return f"{self.inner.absolute}*{self.share}"

    @property
    def key(self) -> str:
        return f"{self.inner.key}*{self.share}"

    def files(self) -> list[Path]:
        return self.inner.files()

    def records(self) -> Iterator[Located]:
        """Each is drawn by itself, so their number is about the share; always the same ones."""
        draw = random.Random("share of a source")
        return (located for located in self.inner.records() if draw.random() < self.share)
