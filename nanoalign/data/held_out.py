"""records.npz in the folder of a run: which records it was trained on, and which it held out.

Hashes of 8 bytes (rows.record_digests), so a million pairs take about 17 MB:

    trained    (N,) uint64   prompts with their responses that the run was trained on, each once
    prompts    (P,) uint64   their prompts, each once
    held_out   (M,) uint64   the held-out records, in their order
    sources    (K, 2) text   name and place of the sources of these
    format     ()            version of this file

A model that is trained further has in the first two also those of the runs before.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nanoalign.data.formats import decode_renamed, formats, names_of, single
from nanoalign.data.readers import HELD_OUT, Located, Source
from nanoalign.data.split import Data, hashes
from nanoalign.distributed import print0
from nanoalign.errors import RunError, in_a_line
from nanoalign.files.run_folder import ARGS, RECORDS, RECORDS_FORMAT
from nanoalign.records import parse


def recall(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of the file; None for a model of another program, which has no such file."""
    if not (path := folder / RECORDS).exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickled objects
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} can't be read: {in_a_line(error)}; remove it") from error
    if found.get("format") != RECORDS_FORMAT:
        raise RunError(
            f"{path} has the format {found.get('format', 0)} of another version of nanoalign, not "
            f"{RECORDS_FORMAT}; remove it, which forgets what that run was trained on"
        )
    return found


class HeldOut(Source):
    """The held-out records of a run. Its folder may have moved; the sources must be in place."""

    def __init__(self, name: str, place: str, source_at: Callable[[str, str], Source]):
        """source_at: makes the sources that the run was given, from their place and name."""
        self.source_at = source_at
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
        return [self.source_at(place, name) for name, place in self.recalled()["sources"].tolist()]

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
        known = formats(settings["preference"], single(settings.get("loss", "")))
        names = names_of(settings.get("keys", ()))
        for source in sources:
            for where, name, _, raw in source.records():
                raw = decode_renamed(raw, where, names)
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


def training_mask(training: np.ndarray, held_out: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """A mask (N,) of the records to train on; prints how many share a prompt with held-out ones.

    training, held_out: rows.record_digests, (N, 3) and (M, 3). sources: those of --eval_data.
    Records of held_out:RUN must not be trained on, so those that share a prompt with them are left
    out. Other sources may be the training data themselves, so all of them stay.
    """
    shared = np.isin(training[:, 0], held_out[:, 0])
    left_out = any(HELD_OUT in source for source in sources)
    if shared.any():
        what = "are left out of --data" if left_out else "of --data are trained on"
        print0(f"{'shared':<11} {shared.sum():,} records with prompts of --eval_data {what}")
    return ~shared if left_out else np.ones_like(shared)


def record_arrays(data: Data, folder: Path, sources: Sequence[Source]) -> dict[str, np.ndarray]:
    """The arrays of RECORDS: what a run is trained on, what it holds out, and where that is from.

    folder: of the model, which may have been trained on other records before. sources: of what is
        held out.
    """
    (trained, held_out), before = data.digests, {}
    if (folder / RECORDS).exists():
        before = recall(folder)
    return {
        "trained": np.union1d(trained[:, 1], before.get("trained", trained[:0, 1])),
        "prompts": np.union1d(trained[:, 0], before.get("prompts", trained[:0, 0])),
        "held_out": held_out[:, 2],
        "sources": np.array([origin for source in sources for origin in source.origins]),
        "format": np.array(RECORDS_FORMAT),
    }
