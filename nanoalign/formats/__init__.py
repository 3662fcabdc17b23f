"""Records of every format and files of every kind, and what is scored of them: docs/data.md.

sources.py      names of data sources -> files -> records
hub.py          files on the Hugging Face Hub
folder.py       folders of files
generated.py    embedded records that are in no file
held_out.py     what a run held out
arrays.py       JSON arrays
tables.py       parquet, arrow, csv
share.py        a share of the records of a source
records.py      further formats of records
ranked.py       several responses with scores
messages.py     messages, tools and system prompts of records
templates.py    records as text, by the template of a name
chat.py         records as a chat template renders them
rendering.py    chat templates as functions that end
columns.py      columns that nothing reads
ignored.py      their names in one line
dialogues.py    pairs: with a prompt, HH-RLHF dialogues
foreign.py      formats of other programs and data sets
keys.py         --keys: other names of keys
unpaired.py     single responses (--loss kto, sft)
prompts.py      prompts alone, and answers that were made elsewhere
selected.py     records by their numbers, for a store
rows.py         --data -> the rows of a run: in memory, or from a store on disk
remembered.py   which records a run was trained on, and which it held out
overlap.py      training records whose prompts are held out
audit.py        --audit: examples token by token
"""

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence

PREFERENCES = ("better", "safer")
TEMPLATES = ("auto", "chat", "raw", "pku")
SOURCES = ("tiny-a", "tiny-b", "tiny-c")  # simulated assistants of the embedded data
# Keys of records of other programs, and the function of foreign.py that reads them.
FOREIGN = {
    ("conversations", "chosen", "rejected"): "sharegpt",
    ("instruction", "chosen", "rejected"): "alpaca",
    ("question", "chosen", "rejected"): "orca",
    ("input", "chosen", "rejected"): "orca_of_argilla",
    ("context_messages", "chosen", "rejected"): "openrlhf",
    ("messages", "chosen", "rejected"): "openai",
    ("history", "human_ref_A", "human_ref_B", "labels"): "shp",
    ("prompt", "answers"): "nectar",
    ("instruction", "completions"): "ultrafeedback",
    ("prompt", "response_1", "response_2", "preference_strength"): "helpsteer2",
    ("context", "response1", "response2", "overall_preference"): "helpsteer3",
    ("prompt", "response", "helpfulness"): "helpsteer_ratings",
    ("messages",): "conversation",
    ("conversations",): "conversation",
    ("instruction", "output"): "instructed",
}
# The embedded training data, and the data that are held out where these are trained on.
TEST_OF = {"tiny": "tiny:test"} | {f"tiny:{name}": f"tiny:test:{name}" for name in SOURCES}


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """several: whether --preference may name several labels."""
    from nanoalign.flags import number

    add = parser.add_argument_group("formats of data").add_argument
    add("--preference", choices=PREFERENCES, nargs="+" if several else None,
        default=["better"] if several else "better",
        help="which label of PKU-SafeRLHF orders a pair" + ", or both" * several)  # fmt: skip
    add("--template", choices=TEMPLATES, default="auto", help="text of a prompt: docs/data.md")
    add_keys_argument(add)
    add("--audit", type=number(int, 1), metavar="N",
        help="print N training examples token by token, and a table of all, and do not train; "
        "default: train")  # fmt: skip
    parser.derived.append(eval_data_of)


def add_keys_argument(add) -> None:
    add("--keys", nargs="+", default=[], metavar="OURS=THEIRS",
        help="other names of keys: prompt=question chosen=good rejected=bad")  # fmt: skip


def eval_data_of(args: Namespace) -> dict:
    """The default of --eval_data: the embedded test data, where --data is embedded."""
    return {"eval_data": [TEST_OF[source] for source in args.data]} if is_embedded(args) else {}


def is_embedded(args: Namespace) -> bool:
    """Whether --data are embedded training data alone."""
    return TEST_OF.keys() >= set(args.data)


def single(loss: str) -> str:
    """The loss, if it learns from single responses; else ""."""
    return loss if loss in ("kto", "sft") else ""


def named(sources: Sequence[str]) -> str:
    """Sources as a line names them: a file's name may have escape sequences of terminals."""
    return " ".join(each if each.isprintable() else repr(each) for each in sources)


def readable(path: str | os.PathLike[str], base: str = "") -> str:
    """A path below `base` as text that files can hold: its name on the disk may be no UTF-8."""
    name = os.path.relpath(path, base) if base else os.fspath(path)
    return name.encode(errors="replace").decode()
