"""python -m pytest tests/runs/test_folder.py"""

import json
from argparse import Namespace

import pytest
from conftest import tiny_llama
from filelock import FileLock, Timeout
from transformers import AutoTokenizer

from nanoalign.errors import RunError
from nanoalign.files import lock
from nanoalign.files.run_folder import files_of_result
from nanoalign.model import Policy
from nanoalign.runs.folder import check_folder, remove_run
from nanoalign.weights.write import write_model


def test_an_out_that_can_not_be_written_is_an_error_before_data_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in (
        ("file", "is a file; give a folder"),
        ("file/b/c", "can't be written: NotADirectoryError: .*; give another --out"),
        ("loop", "can't be written: FileExistsError: .*; give another --out"),
    ):
        args = Namespace(out=str(tmp_path / name), audit=None, resume=False, overwrite=False)
        with pytest.raises(RunError, match=f"--out {tmp_path / name} {problem}"):
            check_folder(args, [])


@pytest.fixture
def out(tmp_path):
    """An --out with some files; another test's lock on it is given up at the end."""
    (tmp_path / "out").mkdir()
    yield tmp_path / "out"
    lock.release(tmp_path / "out" / lock.NAME)


def test_a_run_writes_where_nothing_is_or_a_run_was(out):
    """A model card, which someone may have written before, is no hindrance."""

    def check(models: tuple = (), **flags: bool) -> None:
        default = {"out": str(out), "audit": None, "resume": False, "overwrite": False}
        check_folder(Namespace(**default | flags), list(models))

    (out / "README.md").write_text("mine")
    (out / ".args.partial.json").write_text("{")  # of a run that was killed
    check()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="/out contains files that are not those of a run; give an"):
        check(overwrite=True)
    check(audit=3)
    (out / "args.json").write_text("{}")
    with pytest.raises(RunError, match="/out contains another run; continue it with --resume, rep"):
        check()
    with pytest.raises(RunError, match="/out is the folder of a model that this run reads; give"):
        check([out.resolve()], overwrite=True)
    check(overwrite=True)
    check(resume=True)
    with pytest.raises(Timeout):  # another lock on the file of the run
        FileLock(out / lock.NAME).acquire(timeout=0)


def test_what_a_run_has_written_is_removed_and_nothing_else(out):
    for name in ("args.json", "model.safetensors", "curves.png", "README.md", "notes.txt"):
        (out / name).write_text("")
    for name in ("checkpoints/step_000001", "adapter"):
        (out / name).mkdir(parents=True)
    remove_run(out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "notes.txt"]


def test_what_went_along_with_a_result_is_removed_with_it(out, tmp_path, tokenizer):
    """Also of a result before that one, and no file elsewhere that its args.json names."""
    start = tmp_path / "start"
    tiny_llama().save_pretrained(start)
    tokenizer.save_pretrained(start)
    (start / "LICENSE").write_text("theirs")
    (out / "args.json").write_text('{"model": "start"}')
    write_model(Policy.load(start), AutoTokenizer.from_pretrained(start), out)
    (start / "LICENSE").unlink()
    write_model(Policy.load(start), AutoTokenizer.from_pretrained(start), out)
    settings = json.loads((out / "args.json").read_text())
    assert settings["model"] == "start" and (out / "LICENSE").read_text() == "theirs"
    assert {"LICENSE", "model.safetensors", "tokenizer.json"} <= {*settings["files"]}
    settings["files"] += ["../outside", "..", "."]
    (out / "args.json").write_text(json.dumps(settings))
    for path in (out / "notes.txt", tmp_path / "outside"):
        path.write_text("mine")
    assert set(files_of_result(out)) == {*settings["files"]}
    remove_run(out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert (tmp_path / "outside").exists() and files_of_result(out) == []
