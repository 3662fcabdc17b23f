"""python -m pytest tests/lab/test_lab_docs.py docs/lab.md and docs/lab/ against their figures."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from nanoalign.errors import RunError
from nanoalign.lab import lab_docs
from nanoalign.lab.findings import SHARE, Findings, Panel, to_json
from nanoalign.lab.perform import EXPERIMENTS
from nanoalign.lab.picture import draw

ABOUT = {"seeds": [0, 1, 2], "prompts": 9, "cpu_minutes": 3.6, "versions": "torch 9"}
ABOUT |= {"date": "2026-01-02"}


def test_the_pages_are_made_of_the_figures_beside_them():
    """Each sentence about a result is a verdict of docs/lab/NAME.json."""
    for path, text in lab_docs.texts(lab_docs.DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run nanoalign.lab.lab_docs"


def test_each_experiment_has_a_page_and_a_picture():
    index = (lab_docs.DOCS / "lab.md").read_text(encoding="utf-8")
    for name in EXPERIMENTS:
        assert f"(lab/{name}.md): `{name}`" in index and f"(lab/{name}.svg)" in index
    files = {path.name for path in (lab_docs.DOCS / "lab").iterdir() if "-seeds-" not in path.name}
    assert files == {f"{name}.{kind}" for name in EXPERIMENTS for kind in ("json", "svg", "md")}


def findings(mean: float) -> Findings:
    values = mean + np.linspace(-0.1, 0.1, 60).reshape(3, 20)
    series = {"a": [(1, values), (10, values)], "b": [(1, values), (10, values)]}
    panels = [Panel("lines", "x", "y", series, log=True, scale=SHARE, lines={"half": 0.5}),
              Panel("texts", "", "y", {"b": [("one", values), ("two", values)]})]  # fmt: skip
    return Findings({"a": ["b"], "share": [values]}, panels, [("it [rises|falls]", values - 0.5)])


@pytest.fixture
def docs(tmp_path):
    """A copy of docs/ without results of other seeds."""
    ignored = shutil.ignore_patterns("*-seeds-*")
    return Path(shutil.copytree(lab_docs.DOCS, tmp_path / "docs", ignore=ignored))


def test_pages_are_written_from_results(tmp_path, docs):
    results = tmp_path / "lab"
    (results / "beta").mkdir(parents=True)
    argv = ["--docs", str(docs), "--results", str(results)]
    with pytest.raises(RunError, match="has no results; run python -m nanoalign.lab beta"):
        lab_docs.main(argv)
    for mean, sentence in (
        (0.8, "It rises (0.300 ["),
        (0.2, "Other than guessed, it falls (0.300"),
    ):
        (results / "beta" / "findings.json").write_text(to_json(ABOUT, findings(mean)))
        lab_docs.main(argv)
        index, page = (docs / name for name in ("lab.md", "lab/beta.md"))
        assert sentence in index.read_text() and f"| b | {mean:.3f} [" in page.read_text()
        alt = rf"!\[Picture: lines, y; texts, y. {re.escape(sentence)}.*\]\(lab/beta.svg\)"
        assert re.search(alt, index.read_text())
        assert (
            "Seeds 0, 1, 2; 9 held-out prompts or pairs; 4 CPU minutes; torch 9; 2026-01-02."
            in page.read_text()
        )
        assert "`beta`, 4 CPU minutes" in index.read_text()
    before = (docs / "lab.md").read_text()
    lab_docs.main(argv[:2])
    assert (docs / "lab.md").read_text() == before


def test_a_page_says_which_verdicts_hold_with_other_seeds(tmp_path, docs):
    results = tmp_path / "lab"
    for name, mean, seeds in (
        ("beta", 0.8, [0, 1, 2]),
        ("beta-seeds-3-4", 0.7, [3, 4]),
        ("beta-seeds-5-6", 0.2, [5, 6]),
    ):
        (results / name).mkdir(parents=True)
        text = to_json(ABOUT | {"seeds": seeds}, findings(mean))
        (results / name / "findings.json").write_text(text)
    lab_docs.main(["--docs", str(docs), "--results", str(results)])
    page, index = (docs / "lab" / "beta.md").read_text(), (docs / "lab.md").read_text()
    for sentence in (
        "Of 1 verdicts 1 are the same with seeds 3, 4.",
        "Of 1 verdicts 0 are the same with seeds 5, 6.",
    ):
        assert sentence in page and sentence in index
    assert "- It rises (0.200 [" in page
    assert "- Another verdict: Other than guessed, it falls (0.300 [" in page


def test_a_picture_has_one_look_for_a_name_marks_of_seeds_and_dark_colours(tmp_path):
    draw(tmp_path / "a.svg", findings(0.8).panels)
    draw(tmp_path / "b.svg", findings(0.8).panels)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    root = ElementTree.fromstring(text)
    assert float(root.get("width").removesuffix("pt")) * 4 / 3 < 500  # pixels, of CSS
    # a: one panel; b: two, in one colour; three seeds at each of two points
    seeds = {colour: len(re.findall(rf"<use[^>]*fill: none; stroke: {colour}", text))
             for colour in ("#0072b2", "#d55e00")}  # fmt: skip
    assert seeds == {"#0072b2": 6, "#d55e00": 12}
    assert "half, 0.5" in text and "prefers-color-scheme: dark" in text
