"""python -m pytest tests/files/test_network.py

A Hub, or another server in its place, that is slow or damaged or lies.
"""

import json
import time

import pytest
from hub_server import COMMIT, serving

from nanoalign.data.hub import fetch_file
from nanoalign.errors import RunError
from nanoalign.files import network
from nanoalign.weights.folders import fetch, local_folder
from nanoalign.weights.tensor_files import weight_files

RECORD = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r" * 2000}).encode() + b"\n"
DATA = {"datasets/o/n": {"large.jsonl": RECORD, "small.jsonl": RECORD}}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Seconds instead of a minute, and no waits between the library's retries."""
    monkeypatch.setattr(network, "SECONDS", 1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
    fetch.cache_clear()


@pytest.fixture
def model(llama_folder) -> dict:
    files = {path.name: path.read_bytes() for path in llama_folder.iterdir() if path.is_file()}
    return {"models/o/m": files}


def model_error(model: dict, cache, **options) -> str:
    with serving(model, cache, **options), pytest.raises(RunError) as caught:
        local_folder("o/m")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_silent_hub_is_one_error(tmp_path, model):
    start = time.monotonic()
    assert "neither a folder here nor a public model" in model_error(
        model, tmp_path, mishap="silent"
    )
    assert "neither a folder" in model_error(model, tmp_path / "b", mishap="silent files")
    with serving(DATA, tmp_path, mishap="silent"), pytest.raises(RunError, match="can't be fetch"):
        fetch_file("hf://datasets/o/n/large.jsonl", "o/n", "large.jsonl", None)
    assert time.monotonic() - start < 30


def test_a_file_that_arrives_byte_by_byte_is_one_error(tmp_path, model):
    """Each byte is there within the time of an answer; a thousand a second would be enough."""
    assert ": the Hub sent " in model_error(model, tmp_path, mishap="drip")
    with serving(DATA, tmp_path, mishap="drip"), pytest.raises(RunError) as caught:
        fetch_file("hf://datasets/o/n/large.jsonl", "o/n", "large.jsonl", None)
    start = "/datasets/o/n/resolve/main/large.jsonl: the Hub sent "
    assert str(caught.value).startswith(start)


def test_a_file_that_is_long_but_not_slow_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "BYTES_PER_SECOND", 5)
    monkeypatch.setattr(network, "SECONDS", 0.2)
    body = {"datasets/o/n": {"small.jsonl": RECORD[:1050]}}
    with serving(body, tmp_path, mishap="drip"):
        path = fetch_file("hf://datasets/o/n/small.jsonl", "o/n", "small.jsonl", None)
    assert path.read_bytes() == RECORD[:1050]


def test_zeros_in_place_of_weights_are_one_error(tmp_path, model):
    error = model_error(model, tmp_path, mishap="zeros")
    assert "/blobs/" in error and "is not the file that the Hub has (its SHA-256 differs)" in error
    path = error.partition(" is not")[0]
    with serving(model, tmp_path), pytest.raises(RunError, match=path):  # it is in the cache now
        fetch.cache_clear()
        local_folder("o/m")
    fetch.cache_clear()
    (tmp_path / path).unlink()
    with serving(model, tmp_path):
        assert (
            weight_files(local_folder("o/m"))[0].read_bytes()
            == (model["models/o/m"]["model.safetensors"])
        )


def test_zeros_in_place_of_data_are_one_error(tmp_path):
    with serving(DATA, tmp_path, mishap="zeros"):
        with pytest.raises(RunError, match="its SHA-256 differs"):
            fetch_file("hf://datasets/o/n/large.jsonl", "o/n", "large.jsonl", None)
        small = fetch_file("hf://datasets/o/n/small.jsonl", "o/n", "small.jsonl", None)
    assert small.read_bytes() == RECORD


@pytest.mark.parametrize("options", [{"mishap": "etag"}, {"commit": "../../../escaped"}])
def test_names_that_are_paths_write_nothing(tmp_path, model, options):
    cache = tmp_path / "a" / "b" / "c" / "cache"
    assert "names a commit or a file '../../../escaped', which is a path" in model_error(
        model, cache, **options
    )
    with serving(DATA, cache, **options), pytest.raises(RunError, match="which is a path"):
        fetch_file("hf://datasets/o/n/large.jsonl", "o/n", "large.jsonl", None)
    assert not [path for path in tmp_path.rglob("*escaped*")]


def test_a_hub_with_its_names_is_none_of_these(tmp_path, model):
    with serving(model, tmp_path):
        assert local_folder("o/m").name == COMMIT


@pytest.mark.parametrize("name", ["../other/a.safetensors", "/etc/passwd", "a/../../b"])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(RunError, match=f"names the file {name}, outside its folder"):
        weight_files(tmp_path)
