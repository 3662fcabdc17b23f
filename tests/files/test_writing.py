"""python -m pytest tests/files/test_writing.py

Files are whole or not there, and nothing is written through a link. A disk that keeps only what was
synced, as one does in a power cut, still has what a run said it had written.
"""

import errno
import json
import os
import shutil
from unittest.mock import patch

import pytest
import torch
from conftest import write_pairs
from interruptions import Disk
from safetensors.torch import load_file

import train_dpo
from nanoalign.errors import RunError
from nanoalign.files import writing
from nanoalign.runs import result


def test_a_file_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.json"
    writing.write_text(path, "before")
    with pytest.raises(OSError), writing.replacing(path) as hidden:
        hidden.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    """The kernel's error of a write has no path."""
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=f"File too large: '{path}'"), writing.replacing(path):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    with patch("locale.getpreferredencoding", return_value="ascii"):
        writing.write_text(tmp_path / "a", "Größe 数")
        writing.append(tmp_path / "a", "é")
    assert (tmp_path / "a").read_bytes().decode() == "Größe 数é"


def test_the_target_of_a_link_is_never_written(tmp_path):
    secret, link = tmp_path / "secret", tmp_path / "a.json"
    secret.write_text("theirs")
    link.symlink_to(secret)
    (tmp_path / ".a.partial.json").symlink_to(secret)
    with pytest.raises(RunError, match=f"{link} is a link to {secret}"):
        writing.append(link, "ours")
    writing.write_text(link, "ours")
    assert secret.read_text() == "theirs" and link.read_text() == "ours" and not link.is_symlink()


def test_a_power_cut_leaves_what_was_said_to_be_written(llama_folder, tmp_path, monkeypatch):
    """After step 4 of 6 the power is cut: the run continues, and ends as one without a cut."""
    monkeypatch.setattr(result, "finish", lambda *_: None)
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 12), tmp_path / "run"
    flags = ["--model", str(llama_folder), "--data", str(pairs), "--template", "raw",
             "--lr", "1e-3", "--steps", "6", "--batch_size", "4", "--eval_share", "0"]  # fmt: skip
    train_dpo.main([*flags, "--out", str(tmp_path / "whole")])
    disk = Disk(out)
    with patch.object(os, "fsync", disk.fsync):
        train_dpo.main([*flags, "--stop_after", "2", "--out", str(out)])
        train_dpo.main([*flags, "--stop_after", "4", "--resume", "--out", str(out)])
    left = disk.after_a_cut(tmp_path / "left")
    shutil.rmtree(out)
    left.rename(out)
    assert json.loads((out / "args.json").read_text())["steps"] == 6
    with patch.object(os, "fsync", (disk := Disk(out)).fsync):
        train_dpo.main([*flags, "--resume", "--out", str(out)])
    final = load_file(disk.after_a_cut(tmp_path / "left") / "model.safetensors")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, final[name]), name
