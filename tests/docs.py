"""Runs the commands of README.md and docs/*.md, and compares their output with the pages.

    python tests/docs.py                        every page: about 25 minutes on two cores
    python tests/docs.py README.md docs/data.md

The blocks of a page run in their order, in a temporary folder that links to the files of the
repository, so a page may use what its earlier blocks have written to runs/.

    ```bash                     runs; a command that fails, fails the page
    ```python                   runs as a script
    ```text                     the block before it has printed this: each word and number, in this
                                order; what the page leaves out may be between them
    <!-- not run: REASON -->    before a block: it is skipped, and listed at the end
    <!-- tolerance: 0.05 -->    before a ```text block: numbers may differ by this share, and those
                                below 1 by this much
    <!-- fresh folder -->       what follows starts in an empty folder

A block without a language is not looked at: file formats, layouts.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/course/*.md")),
]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|tolerance): (?P<value>[^>]*) -->\n)?"
    r"```(?P<kind>bash|python|text)\n(?P<text>.*?)```|(?P<fresh><!-- fresh folder -->)",
    re.DOTALL,
)
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
TOKEN = re.compile(rf"{NUMBER}|[^\s\d]+")


def first_missing(shown: str, printed: str, tolerance: float = 0.0) -> str | None:
    """The first word or number of `shown` that `printed` does not have behind those before it."""
    tokens = iter(TOKEN.findall(printed))
    for token in TOKEN.findall(shown):
        if token != "..." and not any(equal(token, other, tolerance) for other in tokens):
            return token
    return None


def equal(shown: str, printed: str, tolerance: float) -> bool:
    if tolerance and re.fullmatch(NUMBER, shown) and re.fullmatch(NUMBER, printed):
        a, b = (float(text.replace(",", "")) for text in (shown, printed))
        return abs(a - b) <= tolerance * max(1.0, abs(a))
    return shown == printed


def tracked() -> list[str]:
    return subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()


def new_folder(parent: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=parent))
    for name in {path.partition("/")[0] for path in tracked()}:
        (folder / name).symlink_to(ROOT / name)
    return folder


def execute(kind: str, text: str, folder: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a block."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = folder / f"block.{kind}"
    script.write_text(text)
    command = [sys.executable, script] if kind == "python" else ["bash", "-euo", "pipefail", script]
    environment = os.environ | {"PATH": paths, "NANOALIGN_CACHE": str(folder / "cache")}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


def check(page: Path, parent: Path) -> tuple[list[str], list[str]]:
    """(what is wrong with a page, which of its blocks were not run)."""
    problems, skipped, folder, printed = [], [], new_folder(parent), ""
    for block in BLOCK.finditer(content := page.read_text()):
        line = content.count("\n", 0, block.start()) + 1
        where, kind, text = f"{page.relative_to(ROOT)}:{line}", block["kind"], block["text"]
        if block["fresh"]:
            folder = new_folder(parent)
        elif block["mark"] == "not run":
            skipped.append(f"{where}: {block['value']}")
        elif kind == "text":
            tolerance = float(block["value"] or 0)
            if (missing := first_missing(text, printed, tolerance)) is not None:
                problems.append(f"{where}: '{missing}' was not printed, but this:\n{printed}")
        else:
            start = time.monotonic()
            code, printed, errors = execute(kind, text, folder)
            print(f"{where}: {time.monotonic() - start:.0f} s", flush=True)
            if code:
                problems.append(f"{where}: exit code {code}\n{printed}{errors[-4000:]}")
    return problems, skipped


def main() -> None:
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    start, problems, skipped = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as parent:
        for page in pages:
            wrong, left_out = check(page, Path(parent))
            problems, skipped = problems + wrong, skipped + left_out
            for problem in wrong:
                print(problem, flush=True)
    for line in skipped:
        print(f"not run     {line}")
    print(f"{len(problems)} problems on {len(pages)} pages, {time.monotonic() - start:.0f} s")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
