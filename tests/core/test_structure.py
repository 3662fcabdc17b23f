"""python -m pytest tests/core/test_structure.py

The rules of the house, which docs/design.md explains. They are about files as they are read: what
a rule counts can't be met by moving code to where it is not seen.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanoalign"
CORE = sorted(PACKAGE.glob("*.py"))
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [ROOT / name for name in ("train_rm.py", "train_dpo.py", "evaluate.py")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
FACES = ("__init__.py", "__main__.py")
# Packages that the core imports, beside the standard library.
OF_CORE = {"torch", "transformers", "numpy", "tqdm", "nanoalign"}
# What may be imported inside a function: optional packages, and what would make --help slow.
INSIDE = {
    "datasets", "matplotlib", "peft", "pyarrow", "tensorboard", "trackio", "wandb",
    "torch.utils.tensorboard", "torch.nn.attention.flex_attention", "transformers",
}  # fmt: skip


def name_of(path: Path) -> str:
    """nanoalign/data/rows.py -> nanoalign.data.rows"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """Each import statement and a module or name that it imports, as nanoalign.data.rows."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            found += [(node, node.module)]
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def modules_of(path: Path) -> set[str]:
    """The modules of nanoalign that a file imports, but for the faces of packages."""
    names = {name for _, name in imports(ast.parse(path.read_text()))}
    return {name for name in names if MODULES.get(name, path).name != "__init__.py"} & {*MODULES}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def lines_of_code(path: Path) -> int:
    """Lines without comments, docstrings and blank lines."""
    text = path.read_text()
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
                              tokenize.DEDENT, tokenize.ENDMARKER):  # fmt: skip
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def package_of(module: str) -> str:
    """nanoalign.data.rows -> data; nanoalign.loop -> core"""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "core"


# --- sizes ----------------------------------------------------------------------------------------


def test_the_core_is_read_in_an_hour():
    assert sum(map(lines_of_code, CORE)) <= 1000


def test_lines_of_code_are_counted():
    assert lines_of_code(PACKAGE / "__init__.py") == 1


def test_no_file_is_too_long_or_too_short():
    code = [*FILES, *SCRIPTS, *TESTS, *BENCHMARKS]
    assert {path.name: lines(path) for path in code if lines(path) > 450} == {}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert {path.name: lines(path) for path in pages if lines(path) > 450} == {}
    short = [path for path in (*FILES, *TESTS) if lines(path) < 50 and path.name not in FACES]
    assert [str(path.relative_to(ROOT)) for path in short] == []


def test_a_face_holds_a_docstring_and_names_that_it_hands_on():
    for path in FILES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), path
            for node in tree.body[1:]:
                handed = isinstance(node, ast.Import | ast.ImportFrom)
                named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                assert handed or (named and node.targets[0].id in ("__all__", "__version__")), path


def test_names_of_files_are_unique():
    """But for losses.py, which is a public name twice."""
    names = Counter(path.name for path in FILES if path.name not in FACES)
    assert {name: count for name, count in names.items() if count > 1} == {"losses.py": 2}


def test_the_layout_of_code_is_that_of_the_formatter():
    skipped = sum(path.read_text().count("# fmt: skip") for path in (*FILES, *SCRIPTS))
    assert skipped <= 20


# --- imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_no_subpackage_and_few_packages(path):
    names = {name for _, name in imports(ast.parse(path.read_text()))}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | OF_CORE
    assert {package_of(name) for name in modules_of(path)} <= {"core"}


def test_own_modules_are_imported_at_the_head_of_a_file():
    """A reader sees at its head what a file needs, and nothing is imported by a string."""
    for path in (*FILES, *SCRIPTS):
        tree = ast.parse(path.read_text())
        head = {id(node) for node in tree.body}
        for node, name in imports(tree):
            allowed = any(f"{name}.".startswith(f"{each}.") for each in INSIDE)
            assert id(node) in head or allowed, f"{path}:{node.lineno} imports {name}"
        for node in ast.walk(tree):
            name = getattr(node, "id", "") or getattr(node, "attr", "")
            by_string = name in ("import_module", "__import__", "sys.modules")
            by_string |= isinstance(node, ast.Name) and name in ("globals", "locals")
            assert not by_string, f"{path}:{node.lineno} uses {name}"


def test_no_two_files_import_each_other():
    """Nor in a circle of more: the files are sorted so that each imports earlier ones alone."""
    left = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := [name for name, needed in left.items() if needed <= done]:
        done |= set(ready)
        for name in ready:
            del left[name]
    assert not left


def order() -> list[set[str]]:
    """The floors of docs/design.md, from the top: what stands on one line is on one floor."""
    text = (ROOT / "docs" / "design.md").read_text()
    (block,) = re.findall(r"<!-- floors -->\n((?:    .+\n)+)", text)
    return [set(re.match(r"    ((?:\w+  ?)+)", line)[1].split()) for line in block.splitlines()]


def test_subpackages_import_downwards():
    floors = order()
    floor = {name: len(floors) - n for n, names in enumerate(floors) for name in names}
    assert floor.keys() == {*SUBPACKAGES, "core", "scripts"}
    for name, path in MODULES.items():
        for other in modules_of(path):
            above, below = package_of(name), package_of(other)
            assert above == below or floor[above] > floor[below], f"{name} imports {other}"


# --- the scripts ----------------------------------------------------------------------------------


def test_no_function_writes_to_args():
    for path in [*SCRIPTS, *FILES]:
        for node in ast.walk(ast.parse(path.read_text())):
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
            assert not (written and getattr(node.value, "id", "") == "args"), path
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "")
            assert call not in ("setattr", "delattr") or node.args[0].id != "args", path
