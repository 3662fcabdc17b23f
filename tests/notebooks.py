"""Makes the notebooks of docs/notebooks from the pages, and runs them.

    python tests/notebooks.py --write           writes all
    python tests/notebooks.py                   compares them with what --write makes; runs them
    python tests/notebooks.py walk              this one alone

A ```bash block of a page is a %%bash cell, a ```python block a cell; the rest is text, also what is
marked as not run. The first cell installs, where it is not run inside the repository.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

from docs import new_folder

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
# Name -> (title, page, the heading at which the notebook begins, the heading before which it ends).
NOTEBOOKS = {
    "first_run": ("The first run", "README.md", "## The first run", "## Real models and data"),
    "walk": ("A walk", "docs/walk.md", "# A walk", None),
    "reward_model": ("A reward model", "docs/reward_models.md", "# Rewa", "## Memorized pairs"),
    "experiment": ("Implicit against true reward", "docs/course/3_dpo.md", "## Implicit", None),
}  # fmt: skip
SETUP = """# Installs nanoalign, unless this notebook runs inside its repository.
import os, subprocess, sys
from pathlib import Path

REPOSITORY = "URL_OF_THIS_REPOSITORY"  # on Colab or Kaggle: its address, https://...
HERE = Path.cwd()
ROOT = next((p for p in [HERE, *HERE.parents] if (p / "train_dpo.py").exists()), None)
if ROOT is None:
    if "://" not in REPOSITORY:
        raise SystemExit("write the address of the repository into this cell: REPOSITORY")
    subprocess.run(["git", "clone", "-q", REPOSITORY, "nanoalign"], check=True)
    ROOT = Path("nanoalign")
    requirements = str(ROOT / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", requirements], check=True)
os.chdir(ROOT)
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]"""
BLOCK = re.compile(r"(<!-- not run: [^>]* -->\n)?```(bash|python)\n(.*?)\n```\n", re.DOTALL)


def notebook(title: str, page: str, begin: str, end: str | None) -> dict:
    """A notebook in the format of nbformat 4, with cells named by their number."""
    text = (ROOT / page).read_text()
    text = text[text.index(begin) :]
    text = text[: text.index(end)] if end else text
    links = f"](../../{page.rpartition('/')[0]}/".replace("//", "/")
    text = re.sub(r"\]\((?!https?:|#|\.\./\.\./)", links, text)  # from the folder of notebooks
    text = re.sub(r"<!-- (tolerance: [^>]*|fresh folder) -->\n", "", text)
    sources, place = [("markdown", f"# nanoalign: {title}"), ("code", SETUP)], 0
    for block in BLOCK.finditer(text):
        if block[1]:
            continue
        sources.append(("markdown", text[place : block.start()]))
        code = block[3] if block[2] == "python" else f"%%bash\n{block[3]}"
        sources.append(("code", code))
        place = block.end()
    sources.append(("markdown", text[place:]))
    cells = []
    for kind, source in sources:
        if source.strip():
            lines = source.strip("\n").splitlines(keepends=True)
            cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines}
            cells.append(
                cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
            )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def written(name: str) -> str:
    """The file of a notebook."""
    return json.dumps(notebook(*NOTEBOOKS[name]), indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> None:
    names = [name for name in argv if name != "--write"] or [*NOTEBOOKS]
    for name in names:
        path = FOLDER / f"{name}.ipynb"
        if "--write" in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(written(name), encoding="utf-8")
            continue
        begin = time.monotonic()
        if path.read_text(encoding="utf-8") != written(name):
            sys.exit(f"{path} is not what its page makes; run python tests/notebooks.py --write")
        content = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as parent:
            resources = {"metadata": {"path": str(new_folder(Path(parent)))}}
            nbclient.NotebookClient(content, timeout=600, resources=resources).execute()
        print(f"{path.relative_to(ROOT)}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
