"""Makes mutants of the modules that compute numbers, and runs the tests of each against them.

    python tests/mutants.py                                  300 mutants, two at a time
    python tests/mutants.py --count 20 --only family/losses

A mutant is a module with one change: another operator, comparison or constant, a condition that is
always true or false, two arguments swapped, a keyword left out, a statement replaced by `pass`. It
is killed if a test fails or takes too long; a mutant that survives is equivalent to the module, or
shows what no test asserts. Messages and annotations stay. One process that has imported torch forks
another for every mutant, in a temporary copy of the repository that has the changed file.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # before torch is imported

import argparse
import ast
import compileall
import contextlib
import copy
import difflib
import multiprocessing.connection
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
import torch.distributed.checkpoint.state_dict  # noqa: F401  imported once, before the forks
import tqdm
import transformers.models.llama.modeling_llama  # noqa: F401

ROOT = Path(__file__).parents[1]
# Module -> folder/name of the tests that are meant for it, those that take least time first.
STEPS, RUNS = "family/steps family/objectives ", "family/preference_runs"
MODELS, TEMPLATES = "core/policy core/reward_model ", "data/chat_template data/published_templates"
TABLE = {
    **{name: f"core/{name}" for name in ("losses", "logps", "batch", "encode", "metrics")},
    "model": MODELS + "core/sharding weights/heads core/training",
    "sharding": MODELS + "core/sharding core/training",
    "distributed": "core/distributed core/sharding core/training ranks/report",
    "loop": "core/batch core/loop core/training",
    "packing/rope": "packing/rope",
    "packing/packed": "packing/rope packing/plan packing/attention",
    "packing/attention": MODELS + "packing/attention packing/flex",
    "packing/flex": "packing/attention packing/flex",
    "packing/tree": "packing/plan packing/attention packing/flex",
    "packing/self_check": "packing/rope rewards/rule core/loop family/objectives",
    "data/messages": "data/messages",
    "data/templates": "data/templates " + TEMPLATES,
    "data/chat_template": TEMPLATES,
    "weights/folders": "weights/folders weights/remote_code data/hub weights/model_files",
    "weights/tensor_files": "weights/model_files weights/heads",
    "weights/slices": "weights/model_files weights/heads weights/remote_code",
    "weights/write": "weights/write weights/remote_code rewards/rule weights/model_files",
    "weights/heads": "weights/heads weights/remote_code",
    **{f"weights/{name}": "weights/lora rewards/reward_lora" for name in ("lora", "adapters")},
    "family/losses": "family/loss_family",
    "family/objectives": "family/loss_flags " + STEPS + RUNS,
    "family/pairs": "family/divergences " + STEPS,
    **{f"family/{name}": STEPS for name in ("paired", "tokens")},
    **{f"family/{name}": STEPS + RUNS for name in ("kto", "steps", "moving")},
    "runs/folder": "runs/folder files/checksums core/training",
    "runs/checkpoints": "runs/checkpoints runs/best",
    "runs/best": "runs/best",
    "rewards/rule": "rewards/rule weights/remote_code rewards/reward_variants",
    "rewards/prompt_kinds": "rewards/prompt_kinds rewards/reward_variants",
    **{f"rewards/{name}": "rewards/reward_variants" for name in ("length_debias", "variants")},
    "rewards/several": "rewards/reward_variants evaluation/preferences",
    "evaluation/scoring": "evaluation/scoring evaluation/score evaluation/preferences "
    "evaluation/evaluate_rm",
}
TESTS = {
    module: ["tests/{}/test_{}.py".format(*test.split("/")) for test in tests.split()]
    for module, tests in TABLE.items()
}
PAIRS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitOr, ast.BitAnd), (ast.And, ast.Or),
         (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
         (ast.In, ast.NotIn), (ast.FloorDiv, ast.Mult), (ast.Mod, ast.FloorDiv))  # fmt: skip
OPERATORS = {b: a for a, b in PAIRS} | dict(PAIRS) | {ast.Mult: ast.Div, ast.Pow: ast.Mult}
STATEMENTS = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Continue, ast.Break)
MESSAGES = ("help", "metavar", "description")  # keywords of argparse
FORK = multiprocessing.get_context("fork")
Mutant = namedtuple("Mutant", ("module", "line", "source"))  # source: of the whole module


def is_message(node: ast.AST) -> bool:
    """Whether a node is text for the user, or for a reader of the code."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or is_message(node.value)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "print0"
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.keyword) and node.arg in MESSAGES


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be changed."""
    if is_message(node) or isinstance(node, ast.Import | ast.ImportFrom):
        return
    yield node
    if isinstance(node, ast.Raise):  # may be left out, but what it raises is a message
        return
    if isinstance(node, ast.FunctionDef) and ast.unparse(node.body[-1]) == "return None":
        node.body.pop()  # without it the function returns the same
    for field, children in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for child in children if isinstance(children, list) else [children]:
                if isinstance(child, ast.AST):
                    yield from nodes_of(child)


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes, this one or a condition in it, and what is put in their place."""

    def with_field(name: str, value: object) -> tuple[ast.AST, str]:
        setattr(changed := copy.copy(node), name, value)
        text = ast.unparse(changed)
        return node, f"({text})" if isinstance(node, ast.expr) else text

    if isinstance(node, STATEMENTS):
        yield node, "pass"
    if (operator := type(getattr(node, "op", None))) in OPERATORS:
        yield with_field("op", OPERATORS[operator]())
    if isinstance(node, ast.Compare):
        yield with_field("ops", [OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp):  # not x, -x, ~x
        yield node, f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | None):
        is_number = node.value is not None and not isinstance(node.value, bool)
        yield node, str(node.value + 1 if is_number else not node.value)
    if isinstance(node, ast.Call):
        args, keywords = node.args, node.keywords
        for i in range(len(args) - 1):
            yield with_field("args", [*args[:i], args[i + 1], args[i], *args[i + 2 :]])
        for left_out in (each for each in keywords if each.arg and not is_message(each)):
            yield with_field("keywords", [each for each in keywords if each is not left_out])
    conditions = [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else []
    for condition in conditions + getattr(node, "ifs", []):
        yield from ((condition, "True"), (condition, "False"))


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a module."""
    text, found = source.encode(), []  # columns of ast are those of UTF-8
    tree = ast.dump(ast.parse(source))
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    for changeable in nodes_of(ast.parse(source)):
        for node, change in changes(changeable):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            changed = (text[:start] + change.encode() + text[end:]).decode()
            if ast.dump(ast.parse(changed)) != tree:
                found.append(Mutant(module, node.lineno, changed))
    return found


class Place:
    """A copy of the repository, in which one process at a time runs tests."""

    def __init__(self, folder: Path, timeout: float):
        folders = [ROOT / name for name in ("nanoalign", "tests", "benchmarks", "docs")]
        files = (ROOT.glob(pattern) for pattern in ("*.py", "*.toml", "requirements*"))
        for path in chain(folders, *files):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        mode = PycInvalidationMode.CHECKED_HASH  # compiles once what no mutant changes
        compileall.compile_dir(folder, quiet=1, force=True, invalidation_mode=mode)
        (folder / "tmp").mkdir()
        self.folder, self.timeout = folder, timeout

    def start(self, mutant: Mutant) -> None:
        self.end = time.monotonic() + self.timeout
        self.file = self.folder / f"nanoalign/{mutant.module}.py"
        self.original = self.file.read_text()
        self.file.write_text(mutant.source)
        self.process = FORK.Process(target=run_tests, args=(self.folder, TESTS[mutant.module]))
        self.process.start()

    def finish(self) -> int:
        """Ends what the tests have started; returns the exit code of pytest, 0 if all passed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.file.write_text(self.original)
        return self.process.exitcode


def run_tests(folder: Path, tests: list[str]) -> None:
    """The body of a forked process: exits with the code of pytest."""
    os.setpgid(0, 0), os.chdir(folder), sys.path.insert(0, str(folder))
    with open("log", "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")  # NANOALIGN_CACHE will be there
    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]
    os._exit(pytest.main([*options, "--rootdir", str(folder), *tests]))


def run_all(places: list[Place], mutants: list[Mutant]) -> Iterator[tuple[Mutant, int]]:
    """Mutants with the exit codes of their tests, as they end."""
    running, free = {}, list(places)
    for number, mutant in enumerate(tqdm.tqdm(mutants, unit="mutant")):
        running[number] = free.pop()
        running[number].start(mutant)
        while not free or running and number == len(mutants) - 1:
            sentinels = [place.process.sentinel for place in running.values()]
            ended = multiprocessing.connection.wait(sentinels, timeout=1)
            for n, place in list(running.items()):
                if place.process.sentinel in ended or time.monotonic() > place.end:
                    yield mutants[n], place.finish()
                    free.append(running.pop(n))


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("--count", type=int, default=300, help="mutants (default: 300)")
    add("--seed", type=int, default=0, help="of the choice of mutants (default: 0)")
    add("--only", nargs="+", default=list(TESTS), metavar="MODULE", help="default: all of TESTS")
    add("--workers", type=int, default=2, help="processes (default: 2)")
    add("--timeout", type=float, default=400, help="seconds of a mutant (default: 400)")
    args = parser.parse_args()
    counts, codes = Counter(), (0, -signal.SIGKILL)  # of (module, code of pytest); 1 is usual
    with tempfile.TemporaryDirectory(prefix="nanoalign_mutants_") as folder:
        places = [Place(Path(folder) / str(n), args.timeout) for n in range(args.workers)]
        sources = {m: (places[0].folder / f"nanoalign/{m}.py").read_text() for m in args.only}
        unchanged = [Mutant(module, 0, source) for module, source in sources.items()]
        if failed := [f"{m.module}: {code}" for m, code in run_all(places, unchanged) if code]:
            sys.exit(f"exit codes of pytest without a mutant: {failed}")
        every = [mutant for m, source in sources.items() for mutant in mutants_of(m, source)]
        mutants = random.Random(args.seed).sample(every, min(args.count, len(every)))
        for mutant, code in run_all(places, mutants):
            counts[mutant.module, code if code in codes else 1] += 1
            if code in codes:
                before, after = sources[mutant.module].splitlines(), mutant.source.splitlines()
                changed = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
                how = "survives" if code == 0 else "takes too long"
                head = f"nanoalign/{mutant.module}.py:{mutant.line} {how}"
                tqdm.tqdm.write("\n    ".join([head, *changed]))
    print(f"{'module':<20} {'mutants':>8} {'killed':>8} {'too long':>8} {'survived':>8}")
    for module in [*sources, None]:
        alive, late, failed = (
            sum(counts[m, code] for m in ([module] if module else sources)) for code in (*codes, 1)
        )
        name = module or f"of {len(every)} possible"
        print(f"{name:<20} {alive + late + failed:>8} {failed:>8} {late:>8} {alive:>8}")


if __name__ == "__main__":
    main()
