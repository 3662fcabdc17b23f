"""What is kept on disk for further runs: encoded data, and the log-probabilities of a reference.

load.py         --data -> rows of a store, which is made if it is not there
encode.py       makes a store: all ranks of a host encode parts of the data
disk.py         the files of a store, and rows that are read from them
reference.py    --precompute_reference
folder.py       where all of it is kept
"""

import argparse
from argparse import Namespace


def add_arguments(parser: argparse.ArgumentParser, reference: bool = False) -> None:
    """Adds --cache, and --precompute_reference if the script has a reference."""
    add = parser.add_argument_group("what is kept on disk").add_argument
    add("--cache", metavar="FOLDER",
        help="keep encoded data here for further runs; default: data of less than 64 MiB are "
        "not kept, others in $NANOALIGN_CACHE, or nanoalign in $XDG_CACHE_HOME or "
        "~/.cache")  # fmt: skip
    if reference:
        add("--precompute_reference", action="store_true",
            help="run the reference once, before the policy is loaded, and keep its "
            "log-probabilities")  # fmt: skip
        parser.refusals.append(refusal)


def refusal(args: Namespace) -> str | None:
    """What does not go with --precompute_reference, if anything does not."""
    if not args.precompute_reference:
        return None
    for reason, refused in (
        (f"--loss {args.loss} has no reference", args.reference == "none"),
        ("--loss kto needs it for responses to other prompts", args.loss == "kto"),
        ("--ld_alpha needs it for single tokens", args.ld_alpha is not None),
        ("--sync_reference_every moves it", args.sync_reference_every is not None),
    ):
        if refused:
            return f"--precompute_reference runs the reference once, but {reason}"
    return None
