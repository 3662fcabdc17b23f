"""python -m pytest tests/weights/test_folders.py

Names of models: paths are never asked of the Hub, and what is asked is said.
"""

import errno
import os
import shutil
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from nanoalign.errors import RunError
from nanoalign.model import Policy, RewardModel
from nanoalign.runs.folder import check_folder
from nanoalign.weights.folders import local_folder, public_name


@pytest.fixture
def asked(monkeypatch, tmp_path, llama_folder) -> list[str]:
    """What is asked of the Hub, which answers with a tiny Llama. The current folder is tmp_path."""
    names = []

    def snapshot_download(name: str, **options) -> str:
        names.append((name, options["revision"]))
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:secret@hub.example.org")
    monkeypatch.chdir(tmp_path)
    for folder in ("models/llama", "runs/dpo", "runs/rm"):
        Path(folder).mkdir(parents=True)
    return names


PATHS = ["models/lama", "./lama", "../lama", "~/lama", "/lama", "runs/dop", "lama", "a/b/c",
         "hub/lama/", ".hub/lama", "own er/lama", "owner/"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_not_asked_of_the_hub(asked, path, kind):
    """The last ones are none that exist here, but no OWNER/NAME either."""
    if kind is Path and Path(path) == Path("hub/lama"):
        return  # a Path has no slash at its end
    with pytest.raises(RunError, match="does not exist|has no config.json") as caught:
        local_folder(kind(path))
    assert asked == []
    assert f"'{kind(path)}'" in str(caught.value)


def test_runs_is_a_folder_also_where_there_is_none(asked):
    shutil.rmtree("runs")
    with pytest.raises(RunError, match="^model folder 'runs/dpo' does not exist; give a folder"):
        local_folder("runs/dpo")
    assert asked == []


def test_a_mistyped_path_names_the_folder_that_is_like_it(asked):
    with pytest.raises(RunError, match="'runs/dop' does not exist; is it runs/dpo?"):
        local_folder("runs/dop")
    with pytest.raises(RunError, match="'runs/model' does not exist; give a folder, 'tiny' or OW"):
        local_folder("runs/model")


@pytest.mark.parametrize("name", ["owner/name", "Qwen/Qwen2.5-0.5B_x"])
def test_owner_and_name_are_asked_of_the_hub_once_and_that_is_said(
    asked, name, capsys, llama_folder
):
    """Its place is that of HF_ENDPOINT."""
    assert local_folder(name) == local_folder(name) == llama_folder
    # The index, and what it names of the same commit, after which the folder is called.
    assert asked == [(name, None), (name, llama_folder.name)]
    assert capsys.readouterr().out == f"model       {name}: asked of hub.example.org\n"


def test_nothing_is_said_where_nothing_is_asked(asked, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local_folder("owner/offline")
    assert capsys.readouterr().out == ""


def test_a_model_of_the_hub_is_checked_as_one_here(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: tmp_path)
    with pytest.raises(RunError, match="has no config.json"):
        local_folder("owner/empty")


def test_the_home_folder_is_expanded(asked, monkeypatch, tmp_path, llama_folder):
    monkeypatch.setenv("HOME", str(llama_folder.parent))
    assert local_folder(f"~/{llama_folder.name}") == llama_folder
    assert asked == []


@pytest.mark.parametrize("kind", [Policy, RewardModel])
def test_the_core_asks_the_hub_for_nothing(kind, monkeypatch):
    """No host is looked up for a folder that does not exist."""
    hosts = []

    def getaddrinfo(host, *args, **options):
        hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*runs"):
        kind.load("runs/dop")
    assert hosts == []


def test_the_public_name_of_a_model_has_no_revision(tmp_path):
    """It is what a model card and an adapter name as their base, also for a folder in the cache."""
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123"
    assert public_name("owner/name@v2") == public_name("owner/name") == "owner/name"
    assert public_name(str(cached)) == "owner/name"
    assert public_name("/c/hub/models--Owner--a-b--c/snapshots/0a1b") == "Owner/a-b--c"
    for path in ("tiny", "runs/dpo", "/a/b", "./owner/name"):
        assert public_name(path) is None


def test_an_out_that_can_not_be_written_is_an_error_before_data_are_read(tmp_path, monkeypatch):
    def check(name: str) -> None:
        out = str(tmp_path / name)
        check_folder(Namespace(out=out, audit=None, resume=False, overwrite=False), [])

    def refused(path: object, *rest: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    check("a/b")  # which makes it
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(RunError, match=r"--out .*/c: no permission to write .*/c/\.lock; give"):
            check("c")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(RunError, match=f"file/b/c: {tmp_path / 'file'} is a file; give a folder"):
        check("file/b/c")
    for name in ("loop", "gone"):
        with pytest.raises(RunError, match=f"/{name} is a symbolic link that leads nowhere; give"):
            check(name)
