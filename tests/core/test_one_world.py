"""python -m pytest tests/core/test_one_world.py

What one reads is what runs: the functions of the core are those that a plain run enters.
"""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run_ranks

import train_dpo
import train_rm
from nanoalign.distributed import environment_ranks, run
from nanoalign.ranks.report import report

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "nanoalign").glob("*.py"))
Place = tuple[str, int]  # a file of the core and the line where a function begins
# By themselves, on two ranks, and in the precision that one GPU computes in.
RUNS = [
    (1, train_dpo.main, []),
    (2, train_dpo.main, []),
    (1, train_rm.main, ["--precision", "bf16"]),
    (2, train_rm.main, []),
]


def functions(path: Path) -> dict[Place, tuple[str, int]]:
    """Name and lines of each function of a file, by its place; a hook without a body is none."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            body = [each for each in node.body if not isinstance(each, ast.Expr | ast.Pass)]
            if body or not ast.get_docstring(node):
                found[path.name, first] = node.name, node.end_lineno - node.lineno + 1
    return found


def enter(main: Callable[[list[str]], None], argv: list[str], out: str) -> None:
    """Runs a script as `python train_dpo.py` does; writes the functions of the core it enters."""
    names, places = {str(path): path.name for path in CORE}, set()

    def note(frame, event: str, value: object) -> None:
        if event == "call" and (name := names.get(frame.f_code.co_filename)):
            places.add((name, frame.f_code.co_firstlineno))

    def noted_main() -> None:
        main(argv)
        sys.setprofile(None)  # `run` ends the process of a rank, so the file is written here
        Path(f"{out}.{environment_ranks()[0]}").write_text(json.dumps(sorted(places)))

    sys.setprofile(note)
    run(noted_main, report)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> set[Place]:
    """All functions that the RUNS enter, on pairs of prompt, chosen and rejected."""
    folder, places = tmp_path_factory.mktemp("plain"), set()
    record = {"chosen": "Hello!", "rejected": "No."}
    lines = [json.dumps({"prompt": f"Say {n}."} | record) for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    for n, (ranks, main, flags) in enumerate(RUNS):
        argv = ["--data", str(folder / "pairs.jsonl"), "--steps", "2", "--batch_size", "8",
                "--out", str(folder / f"run{n}"), *flags]  # fmt: skip
        outcome = run_ranks(ranks, enter, main, argv, str(folder / f"places{n}"))
        assert outcome.codes == [0] * ranks, outcome.stderr
    for path in folder.glob("places*"):
        places |= {tuple(place) for place in json.loads(path.read_text())}
    return places


def test_a_plain_run_enters_the_functions_of_the_core(places):
    known = {place: found for path in CORE for place, found in functions(path).items()}
    lines = sum(count for _, count in known.values())
    missing = {place: found for place, found in known.items() if place not in places}
    share = 1 - sum(count for _, count in missing.values()) / lines
    assert share >= 0.92, f"{share:.3f}; not entered: {sorted(missing.values())}"
