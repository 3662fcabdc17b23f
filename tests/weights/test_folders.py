"""python -m pytest tests/weights/test_folders.py

Names of models: no path is asked of the Hub, and a line says what is asked. Other folders.
"""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from nanoalign.errors import RunError
from nanoalign.model import Policy, RewardModel
from nanoalign.weights.folders import load_tokenizer, local_folder, public_name


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


@pytest.mark.parametrize(
    "path", ["models/lama", "./lama", "~/lama", "/lama", "runs/dop", "lama", "a/b/c", ".hub/lama"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_not_asked_of_the_hub(asked, path, kind):
    """The last ones are none that exist here, but no OWNER/NAME either."""
    if path == "runs/dop":
        shutil.rmtree("runs")  # it is a path also where there is no folder runs
    with pytest.raises(
        RunError, match="does not exist; give a folder, 'tiny' or OWNER/N"
    ) as caught:
        local_folder(kind(path))
    assert asked == []
    assert f"'{kind(path)}'" in str(caught.value)


def test_owner_and_name_are_asked_of_the_hub_once_and_that_is_said(asked, capsys, llama_folder):
    """Its place is that of HF_ENDPOINT."""
    name = "Owner/Name2.5-0.5B_x"
    assert local_folder(name) == local_folder(name) == llama_folder
    # The index, and what it names of the same commit, after which the folder is called.
    assert asked == [(name, None), (name, llama_folder.name)]
    assert capsys.readouterr().out == f"model       {name}: asked of hub.example.org\n"


def test_nothing_is_said_where_nothing_is_asked(asked, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    local_folder("owner/offline")
    assert capsys.readouterr().out == ""


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


def test_the_public_name_of_a_model_has_no_revision():
    """It is what a model card and an adapter name as their base."""
    assert public_name("owner/name@v2") == public_name("owner/name") == "owner/name"
    for path in ("tiny", "runs/dpo", "/a/b", "./owner/name"):
        assert public_name(path) is None


# --- folders that are no model


def test_another_folder_may_be_no_model_at_all(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(RunError, match="is a file; give the folder that holds it"):
        local_folder(tmp_path / "args.json")
    with pytest.raises(RunError, match=r"has no config\.json; give .* a run that has finished"):
        local_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"model_max_length": [1]}),
        ("config.json", {"architectures": [3]}),
        ("config.json", {"num_attention_heads": "x"}),
    ],
)
def test_settings_of_other_types_are_errors_of_one_line(llama_folder, tmp_path, file, settings):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | settings))
    with pytest.raises(RunError, match="has no readable tokenizer|config.json: "):
        load_tokenizer(local_folder(folder))


class OfItsOwn(Exception):
    """As those of httpx, which are no OSError: a dropped connection, a loop of redirects."""


def test_any_error_of_the_library_of_the_hub_is_one_line(asked, monkeypatch):
    def fail(*args, **options):
        raise OfItsOwn("Exceeded maximum allowed redirects.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RunError, match="public model of the Hub.*OfItsOwn: Exceeded"):
        local_folder("dropped/model")


# --- links out of the folder, and files that take many gigabytes ----------------------------------


@pytest.fixture
def copied(llama_folder, tmp_path) -> Path:
    return shutil.copytree(llama_folder, tmp_path / "copied")


@pytest.mark.parametrize(
    "name",
    ["config.json", "chat_template.jinja", "generation_config.json", "tokenizer.model",
     "additional_chat_templates/rag.jinja"],
)  # fmt: skip
def test_what_is_read_whole_is_no_link_out_of_the_folder(copied, tmp_path, name):
    """Its content would be a part of the result: a clone of a repository may have such links."""
    secret, path = tmp_path / "secret", copied / name
    path.parent.mkdir(exist_ok=True)
    secret.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(RunError, match=f"{name} is a link out of its folder to {secret}"):
        local_folder(copied)


def test_links_within_the_folder_and_of_the_cache_of_the_hub_are_followed(copied, tmp_path):
    (copied / "config.json").rename(copied / "real")
    (copied / "config.json").symlink_to("real")
    assert local_folder(copied) == copied
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(copied, snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (snapshot / "real").rename(blobs / "abc")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert local_folder(snapshot) == snapshot


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**9), ("num_labels", 10**9), ("text_config", {"n_layer": 10_001})],
)
def test_counts_of_which_each_takes_memory_are_bounded(copied, name, value):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(RunError, match="no model has more than 10,000"):
        local_folder(copied)


def test_the_sizes_of_files_are_bounded(copied):
    with (copied / "tokenizer.json").open("r+b") as file:
        file.truncate(10**8 + 1)  # a file with a hole, which takes no room
    with pytest.raises(RunError, match="tokenizer.json has 100,000,001 bytes"):
        local_folder(copied)


def test_deep_json_is_one_line(copied):
    (copied / "config.json").write_text("[" * 10**5)
    with pytest.raises(RunError, match="config.json: not valid JSON: RecursionError"):
        local_folder(copied)
