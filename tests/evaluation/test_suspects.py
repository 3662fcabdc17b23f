"""python -m pytest tests/evaluation/test_suspects.py

evaluate.py suspects: each pair by the runs that held it out, cleaned data, and what is refused.
"""

import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluations import write_jsonl

import evaluate
import train_rm
from nanoalign.data.formats import names_of
from nanoalign.errors import RunError
from nanoalign.evaluation import plots
from nanoalign.evaluation.label_noise import interval
from nanoalign.evaluation.ranking import TrueRule
from nanoalign.evaluation.suspects import (
    Folds,
    Line,
    Pair,
    check_cleaning,
    flipped,
    pairs_of,
    read_lines,
    summary,
    truly_wrong,
)
from nanoalign.records import Record

FOLDS = [(seed, k) for seed in (0, 1) for k in (1, 2)]


def pair(n: int) -> dict:
    return {"prompt": f"question {n // 2}", "chosen": f"yes {n} " * (n % 3 + 1),
            "rejected": f"no {n}"}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, llama_folder) -> Path:
    """Four runs on 24 records, of which one has equal responses and one is there twice."""
    folder = tmp_path_factory.mktemp("suspects")
    records = [pair(n) for n in range(24)]
    records[5] |= {"chosen": "same", "rejected": "same"}
    write_jsonl(folder / "pairs.jsonl", [*records, records[7]])
    for seed, k in FOLDS:
        train(folder, llama_folder, seed, k)
    return folder


def train(folder: Path, model: Path, seed: int, k: int, *flags: str) -> None:
    data = ["--data", str(folder / "pairs.jsonl"), "--template", "raw", "--steps", "2"]
    run = ["--out", str(folder / f"run{seed}{k}"), "--seed", str(seed), "--fold", f"{k}/2"]
    train_rm.main(["--model", str(model), "--lr", "1e-3", *data, *run, *flags])


def runs(folder: Path) -> list[str]:
    return [str(folder / f"run{seed}{k}") for seed, k in FOLDS]


def suspects(folder: Path, *flags: object) -> tuple[list[dict], dict]:
    """(lines of suspects.jsonl, metrics.json)."""
    out = folder / "suspects"
    evaluate.main(["suspects", *runs(folder), "--out", str(out), *map(str, flags)])
    lines = [json.loads(line) for line in (out / "suspects.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "metrics.json").read_text())


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "suspects_picture", lambda path, *rest: path.write_bytes(b"-"))


def test_each_pair_is_scored_by_the_runs_that_held_it_out(world, no_pictures, capsys):
    """As evaluate.py rm scores what each run has held out, divided by the run's mean square."""
    lines, figures = suspects(world)
    printed = capsys.readouterr().out
    assert "of 24 labels are wrong, by the estimate" in printed and "Fewer than 300" in printed
    margins = {}
    for run in runs(world):
        evaluate.main(["rm", "--model", run, "--data", f"held_out:{run}", "--out", f"{run}_eval"])
        found = Path(f"{run}_eval", "scores.jsonl").read_text().splitlines()
        found = list(map(json.loads, found))
        own = {
            chosen["pair_id"].split(":", 2)[2]: chosen["score"] - rejected["score"]
            for chosen, rejected in zip(found[::2], found[1::2], strict=True)
        }
        own = {name: margin for name, margin in own.items() if name != "pairs:6"}
        scale = np.sqrt(np.mean(np.square(list(own.values()))))
        for name, margin in own.items():
            margins.setdefault(name, []).append(margin / scale)
    assert {len(each) for each in margins.values()} == {2}  # once by each seed
    expected = {name: sum(each) / 2 for name, each in margins.items()}
    assert {line["id"]: line["margin"] for line in lines} == pytest.approx(expected, abs=1e-6)
    probabilities = [line["probability"] for line in lines]
    assert probabilities == sorted(probabilities, reverse=True)
    records = [json.loads(text) for text in (world / "pairs.jsonl").read_text().splitlines()]
    for line in lines:
        record = records[int(line["id"].partition(":")[2]) - 1]
        assert {key: line[key] for key in record} == record
    assert figures["pairs"] == 24
    names = sorted(
        margins, key=lambda name: int(name.partition(":")[2])
    )  # in the order of the data
    by_seed = np.array([margins[name] for name in names]).T
    ends = interval(by_seed, [records[int(n.partition(":")[2]) - 1]["prompt"] for n in names], 2)
    found = figures["wrong_share_low"], figures["wrong_share_high"]
    assert found == pytest.approx(ends, abs=1e-6) and ends[0] < ends[1]
    assert "true_wrong_share" not in figures


@pytest.mark.parametrize("flag", ["--drop", "--flip"])
def test_cleaned_data_are_the_records_without_doubtful_labels(world, no_pictures, flag):
    """A quarter of 24 pairs; the others, and what is no pair, stay as they were, in their order."""
    path = world / f"cleaned{flag}.jsonl"
    lines, _ = suspects(world, flag, 0.25, "--cleaned", path)
    before = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    after = [json.loads(line) for line in path.read_text().splitlines()]
    doubted = {int(line["id"].partition(":")[2]) - 1 for line in lines[:6]}
    assert 5 not in doubted and len(doubted) == 6
    if flag == "--drop":
        assert after == [record for n, record in enumerate(before) if n not in doubted]
    else:
        assert len(after) == len(before)
        for n, (old, new) in enumerate(zip(before, after, strict=True)):
            swapped = old | {"chosen": old["rejected"], "rejected": old["chosen"]}
            assert new == (swapped if n in doubted else old)


def test_the_data_must_be_those_of_the_runs(world, tmp_path, no_pictures):
    """A record that is missing, and one that no run has held out."""
    data = world / "pairs.jsonl"
    text = data.read_text()
    try:
        data.write_text(text.partition("\n")[2])
        with pytest.raises(RunError, match=r"held out \d+ records, and \d+ of them are in .*pairs"):
            suspects(world)
        data.write_text(text + json.dumps(pair(99)) + "\n")
        with pytest.raises(RunError, match=r"pairs.jsonl:26: no run has held this record out"):
            suspects(world)
    finally:
        data.write_text(text)


def changed(folder: Path, tmp_path: Path, **settings: object) -> str:
    """A run whose args.json has other settings."""
    run = shutil.copytree(folder / "run12", tmp_path / "changed")
    args = json.loads((run / "args.json").read_text()) | settings
    (run / "args.json").write_text(json.dumps(args))
    return str(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": None}, "changed is no run of train_rm.py --fold K/N; train one for each K"),
        ({"preference": "better"}, "changed is no run of train_rm.py"),
        ({"preference": ["safer"]}, r"with --preference \['safer'\], .*run01 with \['better'\]"),
        ({"keys": ["prompt=q"]}, "changed was trained with --keys"),
        ({"fold": "1/2"}, "the runs of --seed 1 are the folds 1/2 1/2; give one of each of 1/2 2"),
        ({"fold": "2/3"}, "the runs of --seed 1 are the folds 1/2 2/3"),
        ({"seed": 2}, "the runs of --seed 1 are the folds 1/2; give"),
    ],
)
def test_runs_must_be_all_folds_of_the_same_data(world, tmp_path, settings, message):
    run = changed(world, tmp_path, **settings)
    with pytest.raises(RunError, match=message):
        evaluate.main(["suspects", *runs(world)[:3], run, "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "runs of one --seed can't tell a wrong label from an error of the models"),
        ("--drop 0.1", "--cleaned is the file of --drop or --flip; give both, or neither"),
        ("--cleaned x.jsonl", "--cleaned is the file of --drop or --flip; give both, or neither"),
        ("--drop 0.1 --flip 0.1 --cleaned x.jsonl", "--drop and --flip both say what becomes of"),
        ("--drop 1 --cleaned x.jsonl", "expected a number above 0 and below 1"),
        ("--drop 0.1 --cleaned OUT/x.jsonl", "is in --out, which the next evaluation replaces"),
    ],
)
def test_refused(world, tmp_path, flags, message):
    out = str(tmp_path / "out")
    argv = ["suspects", *runs(world)[:2], "--out", out, *flags.replace("OUT", out).split()]
    with pytest.raises(RunError, match=message):
        evaluate.main(argv)


# --- labels of other formats

PKU = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1,
       "safer_response_id": 0}  # fmt: skip
HUMAN = "\n\nHuman: q\n\nAssistant:"


def line(tmp_path: Path, raw: dict, keys=(), preference: str = "better") -> tuple[Line, Folds]:
    """The record as suspects.read_lines reads it."""
    names = names_of(keys)
    source = ["a", str(write_jsonl(tmp_path / "a.jsonl", [raw]))]
    folds = Folds([], [], [], [source], names, preference, 2)
    return read_lines(folds)[0], folds


@pytest.mark.parametrize(
    ("raw", "options", "expected"),
    [
        (PKU, {}, PKU | {"better_response_id": 0}),
        (PKU, {"preference": "safer"}, PKU | {"safer_response_id": 1}),
        (
            {"chosen": f"{HUMAN} a", "rejected": f"{HUMAN} b"},
            {},
            {"chosen": f"{HUMAN} b", "rejected": f"{HUMAN} a"},
        ),
        (
            {"q": "p", "good": "a", "bad": "b", "margin": 2},
            {"keys": ["prompt=q", "chosen=good", "rejected=bad"]},
            {"q": "p", "good": "b", "bad": "a", "margin": 2},
        ),
        (
            {"question": "p", "chosen": "a", "rejected": "b", "score_chosen": 7,
             "score_rejected": 3, "chosen_by": "me"},
            {},
            {"question": "p", "chosen": "b", "rejected": "a", "score_chosen": 3,
             "score_rejected": 7, "chosen_by": "me"},
        ),
    ],
    ids=["pku", "safer", "hh", "keys", "question"],
)  # fmt: skip
def test_a_label_is_reversed_in_its_format(tmp_path, raw, options, expected):
    assert flipped(*line(tmp_path, raw, **options)) == expected


def test_a_label_of_scores_is_not_reversed(tmp_path):
    raw = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
    with pytest.raises(RunError, match=r"a.jsonl:1: --flip can't reverse .* responses \+ scores"):
        flipped(*line(tmp_path, raw))


def test_a_record_that_json_can_not_hold_is_refused_before_it_is_scored():
    """Parquet has dates and bytes."""
    raw = {"prompt": "p", "chosen": "a", "rejected": "b", "when": datetime.date(2020, 1, 1)}
    dated = Line("a.parquet:1", tuple(raw), raw, Record("p", ("a", "b")))
    with pytest.raises(
        RunError, match=r"a.parquet:1 can't be written as JSON by --cleaned: .*date"
    ):
        check_cleaning([dated], False, Folds([], [], [], [], {}, "better", 2))


def test_the_true_rule_judges_labels_where_it_knows_all_prompts():
    lines = [
        Line("", (), {}, Record("p", ("long", "a"))),
        Line("", (), {}, Record("p", ("b", "longer"))),
        Line("", (), {}, Record("q", ("same", "size"))),
        Line("", (), {}, Record("q", ("equal", "equal"))),
        Line("", (), {}, Record("q", ("x", "yy", "z"), ((1, 0), (1, 2)))),
    ]
    pairs = pairs_of(lines)
    assert pairs == [Pair(0, 0, 1), Pair(1, 0, 1), Pair(2, 0, 1), Pair(4, 1, 0), Pair(4, 1, 2)]
    truth = TrueRule({"p", "q"}.__contains__, {"better": lambda prompt, response: len(response)})
    assert truly_wrong(lines, pairs, "better", truth).tolist() == [0, 1, 0.5, 0, 0]
    assert truly_wrong(lines, pairs, "better", TrueRule({"p"}.__contains__, truth.rewards)) is None


def test_the_summary_says_where_the_estimate_says_little():
    figures = {"wrong_share": 0.2, "wrong_share_low": 0.1, "wrong_share_high": 0.3, "pairs": 300,
               "wrong_share_most": 0.4, "reliability": 0.1}  # fmt: skip
    assert "little" not in summary(figures) and "too few" not in summary(figures)
    assert "the estimate says little" in summary(figures | {"reliability": 0.09})
    assert "too few" in summary(figures | {"pairs": 299})
