"""Embedded records that are in no file: tiny:tiny-a, tiny:test:tiny-a, ..."""

from collections.abc import Iterator
from pathlib import Path

from nanoalign import tiny
from nanoalign.formats.sources import Located, Source


class Generated(Source):
    def __init__(self, name: str, place: str):
        super().__init__(name or place, place)

    @property
    def absolute(self) -> str:
        return self.place

    @property
    def key(self) -> str:
        return f"{self.name}={self.place}"

    def files(self) -> list[Path]:
        """The code that generates them."""
        return sorted(Path(tiny.__file__).parent.glob("*.py"))

    def records(self) -> Iterator[Located]:
        from nanoalign.tiny import world  # imported here, as it generates for a second

        *_, name = self.place.split(":")
        split = "test" if self.place.startswith("tiny:test") else "train"
        for n, record in enumerate(world.records(split, name), start=1):
            yield f"{self.place}:{n}", f"{self.name}:{n}", self.name, record
