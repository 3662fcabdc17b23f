"""python -m pytest tests/files/test_network.py

A Hub, or another server in its place, that is slow or damaged or lies.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from hub_server import COMMIT, serving

from nanoalign.data.hub import fetch_file
from nanoalign.errors import RunError
from nanoalign.files import checksums, network
from nanoalign.weights.folders import fetch, leads_out, local_folder
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


def test_a_blob_is_read_once_after_its_download(tmp_path, model):
    """Its content is read again if it was written to, or if the cache was copied."""
    reads = []

    def start(cache: Path = tmp_path) -> Path:
        fetch.cache_clear()
        checksums._digest.cache_clear()
        reads.clear()
        with serving(model, cache):
            return fetch("o/m") / "model.safetensors"

    def read(file, kind: str, real=hashlib.file_digest):
        reads.append(file.name)
        return real(file, kind)

    with patch.object(hashlib, "file_digest", read):
        weights = start()
        assert reads == [str(weights)]
        start()
        assert checksums.digest_of_file(weights).hex() == weights.resolve().name and reads == []
        os.utime(weights)
        start()
        assert len(reads) == 1 and start() and reads == []
        shutil.copytree(tmp_path, tmp_path / "copy", symlinks=True)  # with the times of files
        start(tmp_path / "copy")
        assert len(reads) == 1
        size, before = weights.stat().st_size, weights.stat()
        weights.resolve().write_bytes(bytes(size))
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(RunError, match="its SHA-256 differs"):
            start()
        with pytest.raises(RunError, match="its SHA-256 differs"):
            start()


def test_a_blob_may_be_in_the_store_that_repositories_share(tmp_path, model):
    """As huggingface_hub 2 keeps what hf_xet has fetched: by a hash that is not a SHA-256."""
    with serving(model, tmp_path):
        folder = local_folder("o/m")
        blob = (folder / "model.safetensors").resolve()
        shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
        shared.parent.mkdir(parents=True)
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
        tokenizer = folder / "tokenizer.json"  # a large one comes the same way
        content = tokenizer.read_bytes()
        tokenizer.unlink()
        other = shared.with_name("ac" * 32)
        other.write_bytes(content)
        tokenizer.symlink_to(os.path.relpath(other, folder))
        fetch.cache_clear()
        assert weight_files(local_folder("o/m"))[0].resolve() == shared
        shared.write_bytes(bytes(shared.stat().st_size))
        fetch.cache_clear()
        with pytest.raises(RunError, match=f"{shared} is not the file that the Hub has"):
            local_folder("o/m")
    moved = tmp_path.rename(tmp_path.with_name("moved")) / folder.relative_to(tmp_path)
    assert not leads_out(moved / "tokenizer.json", moved)  # a cache that HF_HUB_CACHE does not name
    (moved / "notes.txt").symlink_to(Path(__file__))
    assert leads_out(moved / "notes.txt", moved)


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
