"""python -m pytest tests/test_docs.py

What README.md and docs/ name exists, and their code is that of the scripts, or runs. tests/docs.py
runs their commands.
"""

import contextlib
import inspect
import io
import re
import textwrap

import notebooks
import pytest

import docs
import evaluate
import train_dpo
import train_rm
from docs import PAGES, ROOT, first_missing
from nanoalign.lab import __main__ as lab
from nanoalign.lab import lab_docs, plant
from nanoalign.runs import trackers

TEXTS = [*PAGES, ROOT / "docs/train.slurm"]
# Flags of torchrun, srun, sbatch, lm_eval, hf, vllm, alpaca_eval; and of tests/storm.py.
OTHERS = set(
    re.findall(
        r"\w+",
        """nnodes node_rank nproc_per_node master_addr master_port rdzv_backend rdzv_id
    rdzv_endpoint kill job nodes ntasks gpus cpus time requeue open signal signals shutdown
    include_path model_args tasks times seed private exclude model_outputs reference_outputs
    output_path runner dtype pooler max""",
    )
)
HELP = [
    *((script, ["--help", "all"]) for script in (train_rm, train_dpo)),
    *((module, ["--help"]) for module in (plant, trackers, lab_docs)),
    *(
        (evaluate, [word, "--help"])
        for word in ("rm", "bench", "policy", "score", "frontier", "suspects", "ask")
    ),
    *(
        (lab, [word, "--help"])
        for word in ("walk", "golden", "check", "grade", "world", "speedrun", "beta")
    ),
]


@pytest.fixture(scope="module")
def flags():
    """The flags of all commands of the project."""
    text = io.StringIO()
    for module, argv in HELP:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            module.main(argv)
    found = set(re.findall(r"--(\w+)", text.getvalue()))
    for benchmark in ROOT.glob("benchmarks/*.py"):
        found |= set(re.findall(r'"--(\w+)"', benchmark.read_text()))
    return found


def test_the_flags_of_the_docs_exist(flags):
    unknown = {
        f"{page.name}: --{flag}"
        for page in TEXTS
        for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", page.read_text())
        if flag not in flags | OTHERS
    }
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_files_that_a_page_names_exist(page):
    names = set(re.findall(r"(?<![\w/.])[\w/]+\.py\b", page.read_text()))
    folders = (ROOT, ROOT / "nanoalign", ROOT / "tests", page.parent)
    missing = {name for name in names if not any((folder / name).exists() for folder in folders)}
    missing = {name for name in missing if not name.startswith("torch/")}
    assert missing <= {"train_sft.py"}  # which docs/design.md writes


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_a_notebook_is_what_its_page_makes(name):
    path = notebooks.FOLDER / f"{name}.ipynb"
    assert path.read_text(encoding="utf-8") == notebooks.written(name)


def test_readme_is_short_and_names_every_page_and_subpackage():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 120] == []
    pages = [path.name for path in ROOT.glob("docs/*.md")]
    assert not [name for name in pages if f"(docs/{name})" not in text]
    subpackages = [path.parent.name for path in ROOT.glob("nanoalign/*/__init__.py")]
    assert not [name for name in subpackages if f"(nanoalign/{name})" not in text]


def test_readme_names_every_file_of_the_core():
    text = (ROOT / "README.md").read_text()
    core = {path.name for path in ROOT.glob("nanoalign/*.py")} - {"__init__.py", "errors.py"}
    assert not [name for name in core if f"(nanoalign/{name})" not in text]


def test_readme_shows_the_algorithm_as_train_dpo_has_it():
    """A block of README.md is the body of loss_of_batch, but for the metrics behind it."""
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    body = textwrap.indent(shown, "    ")
    assert "dpo_loss(" in body
    source = inspect.getsource(train_dpo.loss_of_batch)
    signature, docstring, rest = source.split('"""')
    assert rest.startswith(f"\n{body}    return losses, {{")


def test_the_script_of_the_design_page_is_short():
    """It trains when the page's commands are run (.ci/run)."""
    text = (ROOT / "docs" / "design.md").read_text()
    (script,) = re.findall(
        r"cat > train_sft.py <<'END'\n(.*?)^END$", text, re.DOTALL | re.MULTILINE
    )
    assert len(script.splitlines()) <= 55


def test_blocks_of_other_languages_are_no_commands():
    """A block is run, is output, or has no language: one in `sh` would be looked at by nobody."""
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)", page.read_text(), flags=re.MULTILINE))
        assert languages <= {"bash", "python", "text"}
        fences = re.findall(r"^```", page.read_text(), flags=re.MULTILINE)
        blocks = [block for block in docs.BLOCK.finditer(page.read_text()) if block["kind"]]
        assert len(fences) == 2 * len(blocks)


def test_output_is_compared_word_by_word_in_order():
    printed = "step 3,000: loss 0.6931 -> 0.5479 [0.743, 0.810]\nsaved runs/dpo"
    assert first_missing("loss 0.6931 -> 0.5479 ... saved", printed) is None
    assert first_missing("loss 0.6931 -> 0.5478", printed) == "0.5478"
    assert first_missing("saved runs/dpo loss", printed) == "loss"
    assert first_missing("loss 0.70 -> 0.55", printed) == "0.70"
    assert first_missing("loss 0.70 -> 0.55", printed, 0.01) is None
    assert first_missing("step 2,990", printed, 0.01) is None
    assert first_missing("step 2,900", printed, 0.01) == "2,900"


def test_a_page_fails_by_a_wrong_figure_and_by_a_command_that_fails(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\necho 1 > runs.txt; echo loss 0.25\n```\n```text\nloss 0.26\n```\n"
        "```bash\ncat runs.txt\n```\n```text\n1\n```\n"
        "<!-- not run: needs GPUs -->\n```bash\nfalse\n```\n"
        "<!-- fresh folder -->\n```bash\ncat runs.txt\n```\n"
    )
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "tracked", lambda: ["page.md"])
    problems, skipped = docs.check(page, tmp_path)
    assert [problem.partition("\n")[0] for problem in problems] == [
        "page.md:4: '0.26' was not printed, but this:",
        "page.md:18: exit code 1",
    ]
    assert skipped == ["page.md:13: needs GPUs"]
