"""python -m pytest tests/data/test_cache.py where data are kept, and who can read them"""

import os
import stat
from pathlib import Path

import pytest
from stores import PAIR, opened, write

from nanoalign.data.cache import cache_folder
from nanoalign.data.precomputed import check_writable


def modes(folder: Path) -> dict[str, str]:
    """The permissions of all folders below one, by their relative paths."""
    found = sorted(path for path in folder.rglob("*") if path.is_dir())
    return {str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode)) for path in found}


@pytest.fixture
def usual(tmp_path):
    """The usual umask, 022, and a folder that was there before."""
    before = os.umask(0o022)
    (tmp_path / "there").mkdir()
    yield tmp_path / "there"
    os.umask(before)


def test_encoded_data_are_their_owner_s_alone(usual, llama_folder, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [PAIR | {"prompt": f"{n}?"} for n in range(4)])
    opened(llama_folder, [path], usual / "a" / "cache")
    (store,) = (usual / "a" / "cache").iterdir()
    assert modes(usual) == {
        "a": "0o700", "a/cache": "0o700", f"a/cache/{store.name}": "0o700",
    }  # fmt: skip
    assert modes(tmp_path)["there"] == "0o755"  # as it was


def test_kept_log_probabilities_are_their_owner_s_alone(usual):
    check_writable(usual / "cache" / "reference")
    assert modes(usual) == {"cache": "0o700", "cache/reference": "0o700"}


def test_a_store_in_a_folder_that_others_read_is_not_read_by_them(usual, llama_folder, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [PAIR])
    opened(llama_folder, [path], usual)
    assert set(modes(usual).values()) == {"0o700"}


def test_the_cache_is_where_flag_or_environment_put_it(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("NANOALIGN_CACHE", "/own")
    assert cache_folder("flag") == Path("flag")
    assert cache_folder(None) == Path("/own")
    monkeypatch.delenv("NANOALIGN_CACHE")
    assert cache_folder(None) == Path("/xdg/nanoalign")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "nanoalign"
