"""python -m pytest tests/core/test_structure.py"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
import train_rm

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nanoalign"
CORE = sorted(PACKAGE.glob("*.py"))
SUBPACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
SCRIPTS = [ROOT / "train_rm.py", ROOT / "train_dpo.py"]
# A plain run, after which it prints what was imported and whether dpo_loss itself was called.
PLAIN_RUN = """
import json, sys
sys.path.insert(0, {root!r})
import train_dpo
from nanoalign.losses import dpo_loss
called = set()
sys.setprofile(lambda frame, event, value: called.add(frame.f_code))
train_dpo.main(["--data", "pairs.jsonl", "--steps", "1", "--batch_size", "4"])
sys.setprofile(None)
files = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(json.dumps([dpo_loss.__code__ in called, [file for file in files if file]]))
"""


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions: nanoalign.a.b for `import a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_no_subpackage(path):
    subpackages = {f"nanoalign.{folder.name}" for folder in SUBPACKAGES}
    assert len(subpackages) > 8
    assert not {name for name in imported(path) if ".".join(name.split(".")[:2]) in subpackages}


@pytest.mark.parametrize("folder", SUBPACKAGES, ids=lambda path: path.name)
def test_a_subpackage_is_imported_at_no_cost(folder):
    """Importing it gives its flags: what it needs itself is imported inside functions."""
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top
    }
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"nanoalign"}
    assert {name for name in names if name.startswith("nanoalign")} <= {"nanoalign"}


ALLOWED = {"torch", "transformers", "safetensors", "numpy", "tqdm", "nanoalign"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_few_packages(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= sys.stdlib_module_names | ALLOWED


def test_no_function_writes_to_args():
    for path in [*SCRIPTS, ROOT / "evaluate.py", *PACKAGE.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
            assert not (written and getattr(node.value, "id", "") == "args"), (
                f"{path}:{node.lineno}"
            )
            call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "setattr",
                "delattr",
            )
            assert not (call and getattr(node.args[0], "id", "") == "args"), f"{path}:{node.lineno}"


def test_files_keep_their_caps():
    """The core is read in an hour, a script at a sitting."""
    assert sum(map(lines, CORE)) <= 1400
    assert {path.name: lines(path) for path in SCRIPTS if lines(path) > 170} == {}
    code = [*CORE, *SCRIPTS, ROOT / "evaluate.py", *PACKAGE.glob("*/*.py")]
    assert {path.name: lines(path) for path in code if lines(path) > 450} == {}


def test_a_plain_run_calls_dpo_loss_and_imports_little(tmp_path):
    record = {"prompt": "Hi", "response_0": "Hello!", "response_1": "No.", "better_response_id": 0}
    text = "".join(json.dumps(record | {"prompt": f"Say {n}"}) + "\n" for n in range(12))
    (tmp_path / "pairs.jsonl").write_text(text)
    code = PLAIN_RUN.format(root=str(ROOT))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    called, files = json.loads(run.stdout.splitlines()[-1])
    assert called
    own = [Path(file) for file in files if Path(file).is_relative_to(ROOT)]
    own = [path for path in own if path.name != "__init__.py"]
    assert len(own) <= 32, sorted(path.name for path in own)
    assert sum(map(lines, own)) <= 3200


@pytest.mark.parametrize("script", [train_rm, train_dpo], ids=lambda script: script.__name__)
def test_a_script_has_few_flags_of_its_own(script, capsys):
    """Those of the subpackages follow under headings of their own."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    sections = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.MULTILINE)
    flags = {
        heading: set(re.findall(r"^  (--\w+)", text, flags=re.MULTILINE))
        for heading, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    own = ("policy and loss", "reward model and loss", "data", "optimization", "machine", "run")
    assert 15 < sum(len(flags.get(heading, ())) for heading in own) <= 25
    assert flags["packing"] == {"--share_prefix"}
