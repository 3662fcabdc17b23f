"""python -m pytest tests/files/test_checksums.py

--resume where the files of a model have changed since the checkpoint was written.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_pairs
from safetensors.torch import load_file, save_file

import train_dpo
from nanoalign.errors import RunError
from nanoalign.files.checksums import digest_of_weights


def change_a_weight(folder: Path) -> None:
    """One weight of one tensor, in place: names and sizes of the files stay."""
    path = folder / "model.safetensors"
    size, tensors = path.stat().st_size, load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


@pytest.fixture
def train(llama_folder, tmp_path, monkeypatch):
    """Trains with the models "policy" and "reference" of tmp_path, which are equal, in `out`."""
    monkeypatch.setattr(train_dpo.result, "finish", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "reference"):
        shutil.copytree(llama_folder, name)
    write_pairs(Path("pairs.jsonl"), 9)

    def train(*flags: str) -> None:
        train_dpo.main(["--model", "policy", "--data", "pairs.jsonl", "--template", "raw", "--out",
                        "out", "--steps", "2", "--batch_size", "4", *flags])  # fmt: skip

    return train


def assert_refused(train, flags: str, named: str) -> None:
    with pytest.raises(RunError) as refused:
        train(*flags.split(), "--resume")
    folder = Path(named.split()[1]).resolve()
    assert str(refused.value) == (
        f"--resume: the files of {named} ({folder}) are not those with which "
        "out/checkpoints/step_000001 was written; restore them, or start a new run with another "
        "--out"
    )
    assert not Path("out/model.safetensors").exists()


def test_a_resume_with_changed_weights_is_refused(train, llama_folder):
    flags = "--reference reference"
    train(*flags.split(), "--stop_after", "1")
    for folder in ("reference", "policy"):
        change_a_weight(Path(folder))
        assert_refused(train, flags, f"--{folder.replace('policy', 'model')} {folder}")
        shutil.copy(llama_folder / "model.safetensors", folder)
    Path("policy").rename("moved")  # the same content in another folder is the same model
    Path("policy").symlink_to("moved")
    train(*flags.split(), "--resume")
    assert Path("out/model.safetensors").exists()


def test_frozen_weights_under_adapters_are_compared_too(train):
    """No checkpoint has them."""
    train("--lora_rank", "2", "--stop_after", "1")
    change_a_weight(Path("policy"))
    assert_refused(train, "--lora_rank 2", "--model policy")


def test_a_run_without_checkpoints_reads_no_weights_for_it(train, monkeypatch):
    """Weights may be many gigabytes."""
    monkeypatch.delattr("nanoalign.files.checksums.digest_of_weights")
    train()


# --- the digest


def test_the_digest_is_of_config_and_weights(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    first = digest_of_weights(folder)
    (folder / "tokenizer_config.json").write_text("{}")  # the rows have a fingerprint of their own
    assert digest_of_weights(folder) == first == digest_of_weights(llama_folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert digest_of_weights(folder) != first


def test_files_of_several_weights_are_told_apart(tmp_path):
    """By their order too: two files that swap their contents are another model."""
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for contents in ((b"a", b"bc"), (b"bc", b"a"), (b"ab", b"c"), (b"a", b"bd")):
        for n, content in enumerate(contents):
            (tmp_path / f"model-0000{n + 1}-of-00002.safetensors").write_bytes(content)
        found.add(digest_of_weights(tmp_path))
    assert len(found) == 4
