"""The folder of an evaluation, and the files in it."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nanoalign.errors import RunError, in_a_line
from nanoalign.evaluation import kept, pictures, reward_pictures
from nanoalign.evaluation.cases import cases
from nanoalign.evaluation.commands import POLICY, REWARD_MODEL
from nanoalign.evaluation.comparison import Compared, answer_lines, new_pairs
from nanoalign.evaluation.diagnosis import diagnosis
from nanoalign.evaluation.page import comparison_page
from nanoalign.evaluation.ranking import Figures, Scored
from nanoalign.files import lock
from nanoalign.files.lock import let_go
from nanoalign.files.run_folder import ARGS

METRICS = "metrics.json"
# What the results of `frontier` must have in common.
COMPARABLE = ("baseline", "baseline_answers", "reward", "combine", "reward_template",
              "reward_max_length", "data", "template", "max_length", "temperature", "top_p",
              "max_new_tokens")  # fmt: skip


# --- before an evaluation -------------------------------------------------------------------------


def check_models(names: Iterable[str | None]) -> None:
    """Raises RunError if a default model of evaluate.py has not been trained yet."""
    scripts = {REWARD_MODEL: "train_rm.py", POLICY: "train_dpo.py"}
    for name in names:
        if name in scripts and not Path(name).exists():
            raise RunError(f"there is no model in {name} yet; train one: python {scripts[name]}")


def check_out(name: str) -> None:
    """Raises RunError if --out can't be written, or has other files than those of an evaluation.

    Locks the folder, until its results are written, and names what a killed evaluation has left.
    """
    out = Path(os.path.realpath(name))
    if not out.name:
        raise RunError(f"--out {name} can't be replaced by a folder of results; give another")
    if out.is_symlink():  # a loop
        raise RunError(f"--out {name} is a symbolic link that leads nowhere; give a folder")
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {name} is a file; give a folder")
    partial, old = _beside(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock.hold(_lock_of(out), f"--out {name}")
    if old.exists() and not out.exists():  # a replacement was interrupted
        os.rename(old, out)
    if out.is_dir():
        own = {ARGS, *_files_of(out / ARGS)} if (out / ARGS).exists() else set()
        if foreign := sorted(path.name for path in out.iterdir() if path.name not in own):
            raise RunError(
                f"--out {name} has files that are not an evaluation's "
                f"({', '.join(foreign[:3])}); give another --out"
            )
    shutil.rmtree(partial, ignore_errors=True)  # of an evaluation that was killed
    partial.mkdir(parents=True)  # raises OSError here, not after hours of scoring
    partial.rmdir()
    if advice := kept.advice(name):  # of an evaluation that did not end
        print(f"{'answers':<11} {advice}")


def check_pairs_out(name: str, out: str) -> None:
    """Raises RunError if --pairs_out can't be written, exists, or would be lost with --out."""
    if Path(out).resolve() in Path(name).resolve().parents:
        raise RunError(
            f"--pairs_out {name} is in --out, which the next evaluation replaces; give another path"
        )
    check_new_file("--pairs_out", name)


def check_new_file(flag: str, name: str) -> None:
    """Raises RunError if a .jsonl file of a flag can't be written, or exists."""
    path = Path(name)
    if path.suffix != ".jsonl":
        raise RunError(f"{flag} {name}: give a file that ends with .jsonl")
    if path.exists():
        raise RunError(f"{flag} {name} exists; give another name, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise RunError(f"{flag} {name} can't be written: {in_a_line(error)}") from error


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


def _beside(out: Path) -> tuple[Path, Path]:
    """Where new results are written, and where older ones are kept while they are replaced."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def _files_of(path: Path) -> list[str]:
    """The files of an evaluation, by its args.json."""
    try:
        return list(json.loads(path.read_text()).get("files", []))
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(
            f"{path} is not an evaluation's ({in_a_line(error)}); give another --out"
        ) from error


# --- after it -------------------------------------------------------------------------------------


@contextmanager
def results_folder(name: str, settings: dict) -> Iterator[Path]:
    """A new folder to write results into; at the end it replaces --out as a whole.

    settings: for args.json. If writing fails, --out keeps what it had; if the process is killed
    while it replaces --out, `check_out` restores the older results. Rank 0 alone.
    """
    out = Path(os.path.realpath(name))
    partial, old = _beside(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        settings = {**settings, "files": sorted(path.name for path in partial.iterdir())}
        (partial / ARGS).write_text(json.dumps(settings, indent=2) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
        kept.remove(name)
        let_go(_lock_of(out))
    except OSError as error:
        problem = f"results can't be written to '{name}': {in_a_line(error)}"
        advice = f"; {kept.advice(name)}" if kept.advice(name) else ""
        raise RunError(problem + advice) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Writes a JSON object per line; the file gets its name when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_ranking(folder: Path, scored: Sequence[Scored], figures: dict, count: int) -> None:
    """Writes the files of `evaluate.py rm`. count: cases of each kind in cases.md."""

    write_records(folder / "scores.jsonl", (asdict(line) for line in scored))
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "cases.md").write_text(cases(scored, count), encoding="utf-8")
    for subset, own in figures["subsets"].items():
        lines = [line for line in scored if line.subset == subset]
        reward_pictures.reward_picture(folder / picture_name(subset), subset, lines, own)


def picture_name(subset: str) -> str:
    return re.sub(r"[^\w.-]", "_", subset) + ".png"


def write_comparison(
    folder: Path, title: str, compared: Sequence[Compared], figures: Figures, log: list[dict]
) -> None:
    """Writes the files of `evaluate.py policy`. log: the lines of the policy's metrics.jsonl."""

    write_records(folder / "answers.jsonl", answer_lines(compared))
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    picture = folder / "answers.png"
    pictures.policy_picture(picture, compared, figures)
    page = comparison_page(title, compared, figures, diagnosis(figures, log), picture)
    (folder / "report.html").write_text(page, encoding="utf-8")


def write_pairs(name: str, compared: Sequence[Compared]) -> None:
    """Writes the preference records of --pairs_out, and prints how many there are."""
    answers = [x for each in compared for x in each.policy]
    counts = {
        "sampling stopped": sum(x.ended is False for x in answers),
        "the reward model read only in part": sum(x.cut for x in answers),
    }
    notes = "".join(f"; without {n:,} answers that {what}" for what, n in counts.items() if n)
    records = new_pairs(compared)
    if not records:
        print(
            f"{'pairs':<11} none, so no {name}: no two answers to a prompt differ in reward{notes}"
        )
        return
    try:
        write_records(Path(name), records)
    except OSError as error:
        raise RunError(f"--pairs_out {name} can't be written: {in_a_line(error)}") from error
    print(f"{'pairs':<11} {name}: {len(records):,} of {len(compared):,} prompts{notes}")


def read_comparable(folders: Sequence[str]) -> dict[str, Figures]:
    """The figures of several results of `policy`, by folder.

    Raises RunError if they were made with different baselines, reward models or data.
    """
    settings, results = {}, {}
    for name in folders:
        settings[name], results[name] = read_results(name)
        for key in ("kl_per_answer", "policy_tokens_mean"):
            if key not in results[name]:
                raise RunError(
                    f"{name} has no {key}; it needs evaluate.py policy with two models of one "
                    "vocabulary, at temperature 1 without top_p"
                )
        for key in COMPARABLE:
            value, first = settings[name].get(key), settings[folders[0]].get(key)
            if value != first:
                raise RunError(
                    f"{name} was evaluated with --{key} {value}, {folders[0]} with {first}; they "
                    "can't be compared"
                )
    return results


def read_results(folder: str) -> tuple[dict, dict]:
    """(settings, figures) of the evaluation in a folder."""
    try:
        settings, figures = (
            json.loads((Path(folder) / name).read_text()) for name in (ARGS, METRICS)
        )
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} has no results of evaluate.py: {in_a_line(error)}") from error
    if not (isinstance(settings, dict) and isinstance(figures, dict)):
        raise RunError(f"{folder} has no results of evaluate.py: they must be JSON objects")
    return settings, figures
