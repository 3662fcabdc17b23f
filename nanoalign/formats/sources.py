"""Names of data sources -> records: [NAME=]SOURCE, where SOURCE is one of

    a path          .jsonl, .json, both also .gz, .parquet; or a folder of such files
    tiny            the embedded training data; tiny:test the test data; tiny:tiny-a,
                    tiny:test:tiny-a, ... a pair of one simulated assistant for every prompt
    hf://datasets/OWNER/NAME/PATH[@REVISION]        a file on the Hugging Face Hub

A record's name is that of its source and its line, so names of sources must differ.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoalign import tiny
from nanoalign.errors import RunError, in_a_line
from nanoalign.formats import TEST_OF
from nanoalign.formats.files import records_of

EMBEDDED = (*TEST_OF, *TEST_OF.values())
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
Located = tuple[str, str, str, str | dict]  # where, name and line, name, record (JSON, or decoded)


def open_source(spec: str) -> Iterator[Located]:
    """The records of a source, in its order: the `open_source` of pairs.read."""
    name, source = split_name(spec)
    if source in EMBEDDED and source.split(":")[-1] not in ("tiny", "test"):
        from nanoalign.tiny import world  # the generator takes a second; most runs do without it

        split = "test" if "test" in source else "train"
        for n, record in enumerate(world.records(split, source.split(":")[-1]), start=1):
            yield f"{source}:{n}", f"{name}:{n}", name, record
        return
    paths = paths_of(source)
    for path in paths:
        label = name if len(paths) == 1 else f"{name}/{path.name}"
        for n, where, raw in records_of(path):
            yield where, f"{label}:{n}", name, raw


def split_name(spec: str) -> tuple[str, str]:
    """NAME=SOURCE -> (NAME, SOURCE); without a name, that of the file without its suffixes."""
    name, equals, source = spec.partition("=")
    if equals and not Path(spec).exists():
        if not name or not source:
            raise RunError(f"data source '{spec}': expected NAME=SOURCE")
        return name, source
    return Path(spec).name.split("@")[0].split(".")[0] or spec, spec


def check_sources(specs: Sequence[str]) -> list[Path]:
    """The files of some sources. Raises RunError if one is missing, or two names are the same."""
    names = [split_name(spec)[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"two data sources are named '{name}'; write A=SOURCE B=SOURCE")
    sources = [split_name(spec)[1] for spec in specs]
    return [path for source in sources for path in paths_of(source)]


def paths_of(source: str) -> list[Path]:
    """The local files of a source, fetched from the Hub if need be; the generator of tiny:NAME."""
    if source in ("tiny", "tiny:test"):
        return [tiny.TRAIN if source == "tiny" else tiny.TEST]
    if source in EMBEDDED:
        return sorted(Path(tiny.__file__).parent.glob("*.py"))
    if source.startswith("hf://"):
        return [from_hub(source)]
    path = Path(source)
    if not path.exists():
        raise RunError(
            f"data file '{source}' does not exist; give a path, hf://datasets/... or one of the "
            f"embedded {', '.join(EMBEDDED)}"
        )
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
        if not paths:
            raise RunError(f"data source '{source}': the folder has no {', '.join(SUFFIXES)} files")
        return paths
    if not path.name.endswith(SUFFIXES):
        raise RunError(
            f"data file '{source}': unknown kind of file; expected one of {', '.join(SUFFIXES)}"
        )
    return [path]


def from_hub(source: str) -> Path:
    name, _, revision = source.removeprefix("hf://").partition("@")
    parts = name.split("/", 3)
    if len(parts) != 4 or parts[0] != "datasets":
        raise RunError(f"data source '{source}': expected hf://datasets/OWNER/NAME/PATH[@REVISION]")
    from huggingface_hub import hf_hub_download

    options = {"repo_type": "dataset", "revision": revision or None}
    try:
        return Path(hf_hub_download(f"{parts[1]}/{parts[2]}", parts[3], **options))
    except (OSError, ValueError) as error:  # no network, no such file, not a valid name
        raise RunError(f"data source '{source}' can't be fetched: {in_a_line(error)}") from error
