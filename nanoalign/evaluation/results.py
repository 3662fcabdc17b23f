"""The folder of an evaluation, and the files in it."""

import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanoalign.data.prompts import prompt_text
from nanoalign.errors import RunError
from nanoalign.evaluation import plots
from nanoalign.evaluation.answers import ROLES, Answers
from nanoalign.evaluation.commands import POLICY, REWARD_MODEL
from nanoalign.evaluation.comparison import Compared, answer_lines, new_pairs
from nanoalign.evaluation.diagnosis import diagnosis
from nanoalign.evaluation.page import comparison_page
from nanoalign.evaluation.ranking import Scored, TrueRule, is_label_error, pairs_of, score_line
from nanoalign.evaluation.statistics import Figures
from nanoalign.files import lock
from nanoalign.files.run_folder import ARGS
from nanoalign.files.text import in_a_line, in_markdown, read_json, visible
from nanoalign.files.writing import hidden_name, replacing, sync, sync_tree
from nanoalign.records import Record

METRICS = "metrics.json"
# What the results of `frontier` must have in common.
COMPARABLE = (
    *("baseline", "baseline_answers", "reward", "reward_head", "combine", "reward_template"),
    *("reward_max_length", "data", "keys", "template", "template_args", "max_length"),
    *("temperature", "top_p", "max_new_tokens"),
)
# The figures of `frontier`.
FRONTIER = (
    *("kl_per_answer", "policy_mean", "win_rate", "policy_true_mean", "true_win_rate"),
    *("policy_tokens_mean", "policy_ended_share", "policy_cut_share"),
)


# --- before an evaluation -------------------------------------------------------------------------


def check_models(names: Iterable[str | None]) -> None:
    """Raises RunError if one of the names is a default model of evaluate.py that does not exist."""
    scripts = {REWARD_MODEL: "train_rm.py", POLICY: "train_dpo.py"}
    for name in names:
        if name in scripts and not Path(name).exists():
            raise RunError(f"there is no model in {name} yet; train one: python {scripts[name]}")


def check_out(name: str) -> None:
    """Locks the folder --out until its results are written, and checks that they can be.

    Raises RunError if --out is no folder, has files that are not an evaluation's, or is locked by
    another process, and OSError if a folder beside it can't be made.
    """
    out = Path(os.path.realpath(name))
    if not out.name or out.is_symlink() or (out.exists() and not out.is_dir()):  # /, a loop, a file
        raise RunError(f"--out {name} can't be replaced by a folder of results; give another")
    partial, old = _beside(out, "partial"), _beside(out, "old")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock.hold(_beside(out, "lock"), f"--out {name}")
    if old.exists() and not out.exists():  # a replacement was interrupted
        os.rename(old, out)
    if foreign := _foreign_files(out):
        raise RunError(
            f"--out {name} has files that are not an evaluation's ({', '.join(foreign[:3])}); give "
            "another --out"
        )
    shutil.rmtree(partial, ignore_errors=True)  # of an evaluation that was killed
    partial.mkdir(parents=True)  # raises OSError here, not after hours of scoring
    partial.rmdir()


def check_new_file(flag: str, name: str, out: str | None = None) -> None:
    """Locks the new file `name` of a flag until it is written. Makes its folder.

    Raises RunError if it can't be made: it does not end with .jsonl, exists, is in the folder
    `out`, is being written by another process, or its folder can't be written.
    """
    path = Path(name)
    if out is not None and Path(out).resolve() in path.resolve().parents:
        raise RunError(
            f"{flag} {name} is in --out, which the next evaluation replaces; give another path"
        )
    if path.suffix != ".jsonl":
        raise RunError(f"{flag} {name}: give a file that ends with .jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.hold(_beside(path, "lock"), f"{flag} {name}")
        if os.path.lexists(path):
            raise RunError(f"{flag} {name} exists; give another name, or remove it")
        hidden = hidden_name(path)  # not `path`, which would exist after a kill here
        hidden.unlink(missing_ok=True)
        hidden.open("x").close()
        hidden.unlink()
    except OSError as error:
        raise RunError(f"{flag} {name} can't be written: {in_a_line(error)}") from error


def _beside(out: Path, kind: str) -> Path:
    """A hidden path beside a file or folder, by what is there: lock, partial or old results."""
    return out.with_name(f".{out.name}.{kind}")


def _foreign_files(out: Path) -> list[str]:
    """The names in --out that the args.json of an older evaluation there does not list, sorted."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    try:
        return sorted(names - {ARGS, *read_json(out / ARGS)["files"]})
    except (OSError, ValueError, KeyError, TypeError):  # there is none of an evaluation
        return sorted(names)


def keep_answers(out: str, role: str, prompts: Sequence[Record], answers: Answers) -> None:
    """Writes the sampled answers of a role to a hidden file beside --out, and prints its path.

    `results_folder` removes the file. Until then --policy_answers and --baseline_answers can read
    it, so an evaluation that was interrupted need not sample again.
    """
    path = _beside(Path(os.path.realpath(out)), f"{role}.jsonl")
    lines = (
        {"prompt": prompt.prompt}
        | ({"tools": prompt.tools} if prompt.tools else {})
        | answer._asdict()
        for prompt, own in zip(prompts, answers.written, strict=True)
        for answer in own
    )
    write_records(path, lines)
    print(f"{'answers':<11} kept until the results are written, for --{role}_answers: {path}")


# --- after it -------------------------------------------------------------------------------------


@contextmanager
def results_folder(name: str, settings: dict) -> Iterator[Path]:
    """Yields an empty folder to write results into, which replaces --out when the block ends.

    Then it also removes the kept answers, and unlocks --out. Rank 0 alone calls it.
    settings: what args.json gets, beside the names of the files.
    If the block fails, --out keeps what it had; if the process is killed while it replaces --out,
    `check_out` restores the older results. Raises RunError for an OSError.
    """
    out = Path(os.path.realpath(name))
    partial, old = _beside(out, "partial"), _beside(out, "old")
    try:
        partial.mkdir(parents=True)
        yield partial
        settings = {**settings, "files": sorted(path.name for path in partial.iterdir())}
        (partial / ARGS).write_text(json.dumps(settings, indent=2) + "\n")
        sync_tree(partial)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
        for role in ROLES:
            _beside(out, f"{role}.jsonl").unlink(missing_ok=True)
        lock.release(_beside(out, "lock"))
    except OSError as error:
        raise RunError(f"results can't be written to '{name}': {in_a_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Writes the records to a file, a JSON object per line, which gets its name when complete.

    Unlocks it if check_new_file has locked it. Raises RunError if the file can't be written.
    """
    try:
        with replacing(path) as hidden, hidden.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    except OSError as error:
        raise RunError(f"{path} can't be written: {in_a_line(error)}") from error
    lock.release(_beside(path, "lock"))


def write_ranking(folder: Path, scored: Sequence[Scored], figures: dict, count: int) -> None:
    """Writes the files of `evaluate.py rm`. count: cases of each kind in cases.md."""
    write_records(folder / "scores.jsonl", map(score_line, scored))
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "cases.md").write_text(cases(scored, count), encoding="utf-8")
    for subset, subset_figures in figures["subsets"].items():
        lines = [line for line in scored if line.subset == subset]
        plots.reward_picture(folder / picture_name(subset), subset, lines, subset_figures)


def cases(scored: Sequence[Scored], count: int) -> str:
    """The text of cases.md: for each subset up to `count` pairs of each of three kinds.

    The surest right and the surest wrong have the largest differences of reward, the closest the
    smallest. Where the ground truth is known, label errors are a kind of their own in place of
    right and wrong ones.
    """
    text = "# Cases\n\nRight and wrong are by the labels, which may be wrong themselves.\n"
    for subset in dict.fromkeys(line.subset for line in scored):
        pairs = pairs_of([line for line in scored if line.subset == subset])
        margins = np.array([better.score - worse.score for better, worse in pairs])  # (P,)
        errors = np.array([is_label_error(*pair) for pair in pairs])
        falling, rising = np.argsort(-margins), np.argsort(margins)
        right, wrong = margins > 0, margins < 0
        kinds = {
            "surest right": falling[(right & ~errors)[falling]],
            "surest wrong": rising[(wrong & ~errors)[rising]],
        }
        if errors.any():
            text += (
                f"\n{in_markdown(subset)}: {errors.sum():,} of {len(pairs):,} labels are errors by "
                f"the ground truth. Of the {wrong.sum():,} pairs that the model ranks otherwise "
                f"than labelled, {(wrong & errors).sum():,} are label errors: there it is right.\n"
            )
            kinds["label errors, where the model is right"] = rising[(wrong & errors)[rising]]
            kinds["label errors, which the model follows"] = falling[(right & errors)[falling]]
        kinds["closest"] = np.argsort(np.abs(margins))
        for title, places in kinds.items():
            text += f"\n## {in_markdown(subset)}: {title}\n"
            for n in places[:count]:
                mark = ", a label error" * bool(errors[n])
                text += f"\n### {in_markdown(pairs[n][0].pair_id)}: {margins[n]:+.3f}{mark}\n"
                text += _indented("Prompt", prompt_text(pairs[n][0].prompt, "\n\n"))
                for line in pairs[n]:
                    cut = ", cut: the model read only its beginning" * line.cut
                    known = line.true_reward is not None
                    true = f", true reward {line.true_reward:+.3f}" if known else ""
                    about = (
                        f"{line.side}, reward {line.score:+.3f}{true}, {line.tokens} tokens{cut}"
                    )
                    text += _indented(about, line.response)
    return text


def _indented(title: str, text: str) -> str:
    """A title, and the text below it as a block of code in Markdown."""
    return f"\n{title}\n\n{textwrap.indent(visible(text), '    ', lambda line: True)}\n"


def picture_name(subset: str) -> str:
    return re.sub(r"[^\w.-]", "_", subset) + ".png"


def write_comparison(
    folder: Path,
    title: str,
    compared: Sequence[Compared],
    figures: Figures,
    best_of_n: Sequence[dict[str, float]],
    truth: TrueRule,
) -> None:
    """Writes the files of `evaluate.py policy`. best_of_n: the lines of comparison.best_of_n."""
    write_records(folder / "answers.jsonl", answer_lines(compared))
    (folder / METRICS).write_text(json.dumps(figures, indent=2) + "\n")
    picture = folder / "answers.png"
    plots.policy_picture(picture, compared, figures)
    page = comparison_page(title, compared, figures, diagnosis(figures), picture, truth)
    (folder / "report.html").write_text(page, encoding="utf-8")
    if len(best_of_n) > 1:
        write_records(folder / "best_of_n.jsonl", best_of_n)


def write_pairs(name: str, compared: Sequence[Compared]) -> None:
    """Writes the records of `new_pairs` to the file `name`, and prints how many they are.

    Without any, writes no file and prints a line that says so.
    """
    records = new_pairs(compared)
    if not records:
        print(f"{'pairs':<11} none, so no {name}: no two answers to a prompt differ in reward")
        return lock.release(_beside(Path(name), "lock"))
    write_records(Path(name), records)
    print(f"{'pairs':<11} {name}: {len(records):,} of {len(compared):,} prompts")


def read_comparable(folders: Sequence[str]) -> dict[str, Figures]:
    """Reads the figures (metrics.json) of several folders of `evaluate.py policy`, by folder.

    Raises RunError for a folder without results or without a KL, and for folders that differ in a
    setting of COMPARABLE.
    """
    settings, results = {}, {}
    for name in folders:
        try:
            settings[name], results[name] = (
                read_json(Path(name) / file) for file in (ARGS, METRICS)
            )
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{name} has no results of evaluate.py: {in_a_line(error)}") from error
        if missing := {"kl_per_answer", "policy_tokens_mean"} - results[name].keys():
            raise RunError(
                f"{name} has no {min(missing)}; it needs evaluate.py policy with two models of one "
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
