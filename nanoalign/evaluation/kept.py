"""Sampled answers, kept beside --out until its results are written: sampling takes the time."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nanoalign.distributed import environment_ranks
from nanoalign.errors import RunError, in_a_line
from nanoalign.evaluation.answers import ROLES, Answers
from nanoalign.files.run_folder import launcher
from nanoalign.records import Record

ROOM = 32  # bytes of a token in the results: in answers.jsonl, in report.html, in tables of these


def check_room(out: str, answers: int, tokens: int) -> None:
    """Raises RunError if the disk of --out has no room for so many answers of so many tokens."""
    free, size = shutil.disk_usage(Path(out).absolute().parent).free, answers * tokens * ROOM
    if free < size:
        raise RunError(
            f"--out {out}: the answers may need {size / 1e6:.3g} MB, and the disk has "
            f"{free / 1e6:.3g} MB left; make room, or give another --out"
        )


def file_of(out: str, role: str) -> Path:
    return Path(out).with_name(f".{Path(out).name}.{role}.jsonl")


def keep(out: str, role: str, prompts: Sequence[Record], answers: Answers) -> None:
    """Writes the answers of a role, as --policy_answers and --baseline_answers read them."""
    path = file_of(out, role)
    try:
        with path.open("w", encoding="utf-8") as file:
            for record, texts in zip(prompts, answers.texts, strict=True):
                tools = {"tools": record.tools} if record.tools else {}
                for text in texts:
                    line = {"prompt": record.prompt, "completion": text} | tools
                    file.write(json.dumps(line) + "\n")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RunError(f"answers can't be written to {path}: {in_a_line(error)}") from error


def remove(out: str) -> None:
    for role in ROLES:
        file_of(out, role).unlink(missing_ok=True)


def advice(out: str) -> str | None:
    """What is kept, and the command that takes it in place of sampling; None if nothing is."""
    kept = {role: str(path) for role in ROLES if (path := file_of(out, role)).exists()}
    if not kept:
        return None
    left_out = {f"--{role}" for role in kept} | ({"--samples"} if len(kept) == 2 else set())
    left_out |= {f"--{role}_answers" for role in kept}
    rest, words = [], iter(sys.argv[1:])
    for word in words:
        if word in left_out:
            next(words, None)
        elif word != "policy" and word.partition("=")[0] not in left_out:
            rest.append(word)
    flags = [word for role, path in kept.items() for word in (f"--{role}_answers", path)]
    command = shlex.join([*launcher(environment_ranks()[1]), sys.argv[0], "policy", *rest, *flags])
    return f"sampled answers are kept; without sampling again: {command}"
