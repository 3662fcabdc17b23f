"""Whether all ranks of a run have the same models and data.

Each rank reads its own shards of the weights, and encodes the data for itself. Hosts with other
copies of a file would train together, on what no single file has, without an error.
"""

import hashlib
from pathlib import Path

from nanoalign.data.split import Data
from nanoalign.data.store import TOKENIZER_FILES
from nanoalign.distributed import World
from nanoalign.ranks.collectives import check_equal

BLOCKS, BLOCK = 64, 2**14  # of a file that are hashed, and bytes of each
ADVICE = "Give every host a copy of the same files"


def check_inputs(folders: dict[str, Path], data: Data, world: World) -> None:
    """Raises RunError on all ranks if the models or the data differ between ranks. A collective.

    folders: of the models, by the flag that names each.
    """
    if world.size == 1:
        return
    digests = {
        f"{path.relative_to(folder)} of {flag}": sampled_digest(path)
        for flag, folder in folders.items()
        for pattern in ("config.json", "*.safetensors", *TOKENIZER_FILES)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    check_equal(digests, ADVICE, world)
    values = {}
    for name, records in zip(("data", "held-out data"), data.digests, strict=True):
        digest = hashlib.blake2b(records.tobytes(), digest_size=4).hexdigest()
        values[f"the {name}"] = f"{len(records):,} records (hash {digest})"
    check_equal(values, ADVICE, world)


def sampled_digest(path: Path) -> str:
    """Returns a hash of a file's size and of BLOCKS blocks, spread evenly over it, as 8 digits.

    A file of up to 1 MiB is hashed whole. Reading a model of many gigabytes whole would take longer
    than the rest of a run's start.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=4)
    with path.open("rb") as file:
        for n in range(BLOCKS):
            file.seek(max(n * BLOCK, n * (size - BLOCK) // (BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
