"""The folder of an evaluation, and the files in it."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nanoalign.data.prompts import prompt_text
from nanoalign.errors import RunError, in_a_line
from nanoalign.evaluation import plots
from nanoalign.evaluation.answers import ROLES, Answers
from nanoalign.evaluation.commands import POLICY, REWARD_MODEL
from nanoalign.evaluation.comparison import Compared, answer_lines, new_pairs
from nanoalign.evaluation.diagnosis import diagnosis
from nanoalign.evaluation.page import comparison_page
from nanoalign.evaluation.ranking import Scored, pairs_of
from nanoalign.evaluation.statistics import Figures
from nanoalign.files import lock
from nanoalign.files.run_folder import ARGS
from nanoalign.files.text import visible
from nanoalign.records import Record

METRICS = "metrics.json"
# What the results of `frontier` must have in common.
COMPARABLE = (
    *("baseline", "baseline_answers", "reward", "combine", "reward_template", "reward_max_length"),
    *("data", "template", "max_length", "temperature", "top_p", "max_new_tokens"),
)
# The figures of `frontier`.
FRONTIER = (
    *("kl_per_answer", "policy_mean", "win_rate", "policy_true_mean", "true_win_rate"),
    *("policy_tokens_mean", "policy_ended_share", "policy_cut_share"),
)
BYTES = 32  # of a token in all results: in answers.jsonl, in report.html, in the kept answers


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
        known = {ARGS, *_files_of(out / ARGS)} if (out / ARGS).exists() else set()
        if foreign := sorted(path.name for path in out.iterdir() if path.name not in known):
            raise RunError(
                f"--out {name} has files that are not an evaluation's "
                f"({', '.join(foreign[:3])}); give another --out"
            )
    shutil.rmtree(partial, ignore_errors=True)  # of an evaluation that was killed
    partial.mkdir(parents=True)  # raises OSError here, not after hours of scoring
    partial.rmdir()
    if advice := kept_answers(name):  # of an evaluation that did not end
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


# --- sampled answers, which are kept beside --out until the results are written -------------------


def check_room(out: str, answers: int, tokens: int) -> None:
    """Raises RunError if the disk of --out has no room for so many answers of so many tokens."""
    free, size = shutil.disk_usage(Path(out).absolute().parent).free, answers * tokens * BYTES
    if free < size:
        raise RunError(
            f"--out {out}: the answers may need {size / 1e6:.3g} MB, and the disk has "
            f"{free / 1e6:.3g} MB left; make room, or give another --out"
        )


def keep_answers(out: str, role: str, prompts: Sequence[Record], answers: Answers) -> None:
    """Writes the answers of a role, as --policy_answers and --baseline_answers read them."""
    path = _kept_file(out, role)
    lines = (
        {"prompt": prompt.prompt, "completion": text}
        | ({"tools": prompt.tools} if prompt.tools else {})
        for prompt, texts in zip(prompts, answers.texts, strict=True)
        for text in texts
    )
    try:
        write_records(path, lines)
    except OSError as error:
        raise RunError(f"answers can't be written to {path}: {in_a_line(error)}") from error


def kept_answers(out: str) -> str | None:
    """Which sampled answers are kept beside --out, and the flags that read them; None if none."""
    kept = [role for role in ROLES if _kept_file(out, role).exists()]
    if not kept:
        return None
    flags = " ".join(f"--{role}_answers {shlex.quote(str(_kept_file(out, role)))}" for role in kept)
    sampled = " and ".join(f"--{role}" for role in kept)
    samples = ", without --samples" if kept == list(ROLES) else ""
    return f"sampled answers are kept; to use them, give in place of {sampled}{samples}: {flags}"


def _kept_file(out: str, role: str) -> Path:
    return Path(out).with_name(f".{Path(out).name}.{role}.jsonl")


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
        for role in ROLES:
            _kept_file(name, role).unlink(missing_ok=True)
        lock.release(_lock_of(out))
    except OSError as error:
        advice = f"; {kept}" if (kept := kept_answers(name)) else ""
        raise RunError(
            f"results can't be written to '{name}': {in_a_line(error)}{advice}"
        ) from error
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
    for subset, subset_figures in figures["subsets"].items():
        lines = [line for line in scored if line.subset == subset]
        plots.reward_picture(folder / picture_name(subset), subset, lines, subset_figures)


def cases(scored: Sequence[Scored], count: int) -> str:
    """cases.md: of each subset `count` pairs: the surest right, the surest wrong, the closest."""
    text = (
        "# Cases\n\nRight and wrong are by the labels, which may be wrong themselves; the winner's "
        "probability is the reward model's, sigmoid of the difference of the two rewards.\n"
    )
    for subset in dict.fromkeys(line.subset for line in scored):
        pairs = pairs_of([line for line in scored if line.subset == subset])
        falling = sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)  # by margin
        right = [pair for pair in falling if pair[0].score > pair[1].score]
        wrong = [pair for pair in reversed(falling) if pair[0].score < pair[1].score]
        close = sorted(pairs, key=lambda pair: abs(pair[0].score - pair[1].score))
        kinds = {"surest right": right, "surest wrong": wrong, "closest": close}
        for title, chosen in kinds.items():
            text += f"\n## {visible(subset)}: {title}\n"
            if not chosen:
                text += "\nNone.\n"
            for place, pair in enumerate(chosen[:count], start=1):
                text += _case(place, *pair)
    return text


def _case(place: int, better: Scored, worse: Scored) -> str:
    high, low = (better, worse) if better.score >= worse.score else (worse, better)
    result = "right" if better.score > worse.score else "wrong"
    result = "a tie" if better.score == worse.score else result
    prompt = prompt_text(better.prompt, "\n\n")
    probability = 1 / (1 + math.exp(low.score - high.score))
    name = visible(better.pair_id)
    title = f"{place}. {name}: {result}, the winner's probability {probability:.3f}"
    text = f"\n### {title}\n\nPrompt\n\n{_fenced(prompt)}"
    for name, line in (("Higher", high), ("Lower", low)):
        cut = ", cut: the model read only its beginning" * line.cut
        side = f"({line.side} in the data; tokens: {line.tokens}{cut})"
        text += f"\n{name} reward **{line.score:+.3f}** {side}\n\n{_fenced(line.response)}"
    return text


def _fenced(text: str) -> str:
    """A code block, with a fence that is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{visible(text)}\n{fence}\n"


def picture_name(subset: str) -> str:
    return re.sub(r"[^\w.-]", "_", subset) + ".png"


def write_comparison(
    folder: Path,
    title: str,
    compared: Sequence[Compared],
    figures: Figures,
    best_of_n: Sequence[dict[str, float]],
) -> None:
    """Writes the files of `evaluate.py policy`. best_of_n: the lines of comparison.best_of_n."""
    write_records(folder / "answers.jsonl", answer_lines(compared))
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    picture = folder / "answers.png"
    plots.policy_picture(picture, compared, figures)
    page = comparison_page(title, compared, figures, diagnosis(figures), picture)
    (folder / "report.html").write_text(page, encoding="utf-8")
    if len(best_of_n) > 1:
        write_records(folder / "best_of_n.jsonl", best_of_n)
        plots.best_of_n_picture(folder / "best_of_n.png", best_of_n)


def write_pairs(name: str, compared: Sequence[Compared]) -> None:
    """Writes the preference records of --pairs_out, and prints how many there are."""
    answers = [x for case in compared for x in case.policy]
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
