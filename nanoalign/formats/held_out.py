"""held_out:RUN: the records that a run held out, read again from the sources that it was given."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanoalign.checkpoints.runs import ARGS, RECORDS
from nanoalign.errors import RunError
from nanoalign.formats import single
from nanoalign.formats.keys import decoded, names_of
from nanoalign.formats.remembered import recall
from nanoalign.formats.rows import hashes, known_formats
from nanoalign.formats.sources import HELD_OUT, Located, Source, source_at
from nanoalign.pairs import parse


class HeldOut(Source):
    """The held-out records of a run. Its folder may have moved; the sources must be in place."""

    def __init__(self, name: str, place: str):
        run = Path(place.removeprefix(HELD_OUT)).resolve()
        super().__init__(name or f"{HELD_OUT}{run.name}", place)

    @property
    def run(self) -> Path:
        return Path(self.place.removeprefix(HELD_OUT))

    @property
    def origins(self) -> list[tuple[str, str]]:
        return [(f"{self.name}:{each.name}", each.place) for each in self.sources()]

    def recalled(self) -> dict[str, np.ndarray]:
        """records.npz of the run. Raises RunError if it held nothing out, or is no run."""
        found = recall(self.run)
        if found is None:
            raise RunError(
                f"data source '{self.place}': there is no {self.run / RECORDS}; give the folder of "
                "a run of train_rm.py or train_dpo.py"
            )
        if not len(found["held_out"]):
            raise RunError(
                f"data source '{self.place}': that run held nothing out (--eval_share 0); give "
                "other data"
            )
        return found

    def sources(self) -> list[Source]:
        """Those that the run was given."""
        return [source_at(place, name) for name, place in self.recalled()["sources"].tolist()]

    def files(self) -> list[Path]:
        return [self.run / RECORDS, *(path for each in self.sources() for path in each.files())]

    def records(self) -> Iterator[Located]:
        """Their keys have our own names, also where the run had --keys.

        Raises RunError behind the last record if some have gone or changed since the run.
        """
        wanted = Counter(self.recalled()["held_out"].tolist())
        total, sources = wanted.total(), self.sources()
        # Any labels may be read of the records; those of the run show whether they have changed.
        settings = json.loads((self.run / ARGS).read_text())
        preference = settings["preference"]
        preferences = [preference] if isinstance(preference, str) else preference
        loss = single(settings.get("loss", ""))
        known = known_formats(preferences, loss, ())
        names = names_of(settings.get("keys", ()))
        for source in sources:
            for where, name, _, raw in source.records():
                raw = decoded(raw, where, names)
                _, record = parse(raw, where, known)
                if wanted[key := int.from_bytes(hashes(record)[16:], "little")]:
                    wanted[key] -= 1
                    yield where, f"{self.name}:{name}", self.name, raw
        if missing := wanted.total():
            raise RunError(
                f"data source '{self.place}': {missing:,} of the {total:,} records that the run "
                f"held out are not in {' '.join(source.place for source in sources)} any more; "
                "restore these data"
            )
