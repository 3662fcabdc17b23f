"""python -m pytest tests/data/test_hub.py

Data sets and models of the Hub, asked of a server on this machine.
"""

import json

import pytest
from hub_server import COMMIT, serving

from nanoalign import records
from nanoalign.data.formats import formats
from nanoalign.data.sources import open_source
from nanoalign.errors import RunError
from nanoalign.weights.folders import fetch, local_folder


def lines(*prompts: str) -> bytes:
    records = [{"prompt": prompt, "chosen": "c", "rejected": "r"} for prompt in prompts]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


DATA = {
    "datasets/o/splits": {
        "README.md": b"text", "data/train-0.jsonl": lines("a"), "data/train-1.jsonl": lines("b"),
        "data/test-0.jsonl": lines("c"),
    },
    "datasets/o/several": {
        "data/train_prefs-0-of-1.jsonl": lines("g"), "data/train_sft-0-of-1.jsonl": lines("h"),
    },
    "datasets/o/folders": {"a/train.jsonl": lines("i"), "b/train.jsonl": lines("j")},
    "datasets/o/plain": {"first.jsonl": lines("d"), "second.jsonl": lines("e"),
                         "more/validation.jsonl": lines("f")},
}  # fmt: skip


def prompts(source: str) -> list[str]:
    return [record.prompt for record in records.read([source], formats(), open_source)]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("splits", ["a", "b"]),
        ("splits:test", ["c"]),
        ("splits@v2:train", ["a", "b"]),
        ("splits/data:test", ["c"]),
        ("splits/data/test-0.jsonl", ["c"]),
        ("plain", ["d", "e"]),
        ("several:train_prefs", ["g"]),
        ("plain:validation", ["f"]),
    ],
)
def test_a_data_set_is_its_training_split_or_one_that_is_named(tmp_path, place, expected):
    with serving(DATA, tmp_path):
        assert prompts(f"hf://datasets/o/{place}") == expected


def test_files_of_one_name_have_records_of_different_names(tmp_path):
    with serving(DATA, tmp_path):
        found = records.read(["x=hf://datasets/o/folders"], formats(), open_source)
        assert [r.name for r in found] == ["x/a/train.jsonl:1", "x/b/train.jsonl:1"]


def test_the_revision_is_asked_for(tmp_path):
    with serving(DATA, tmp_path) as fetched:
        prompts("hf://datasets/o/plain/first.jsonl@v2")
    assert fetched == ["o/plain@v2/first.jsonl"]


def test_several_training_splits_are_not_mixed(tmp_path):
    several = "^data source 'hf://.*' has the training splits train_prefs, train_sft; give one: hf://datasets/o/several:train_prefs"
    with serving(DATA, tmp_path), pytest.raises(RunError, match=several):
        prompts("hf://datasets/o/several")


def test_what_is_not_there_is_one_error(tmp_path):
    with serving(DATA, tmp_path):
        for place in ("plain/third.jsonl", "plain:train"):
            with pytest.raises(RunError, match=f"data source 'hf://datasets/o/{place}'"):
                prompts(f"hf://datasets/o/{place}")
        private = "the Hub has no public data set o/none; for a private one set HF_TOKEN"
        with pytest.raises(RunError, match=private):
            prompts("hf://datasets/o/none")
        with pytest.raises(RunError, match="nor a public model of the Hub; .* set HF_TOKEN"):
            local_folder("o/none")


def test_all_files_are_of_one_commit(tmp_path):
    with serving(DATA, tmp_path) as fetched:
        prompts("hf://datasets/o/splits")
    assert {name.split("@")[1].split("/")[0] for name in fetched} == {COMMIT}


@pytest.fixture
def models(llama_folder) -> dict[str, dict[str, bytes]]:
    """A whole model, and one in two files with the same weights again for other programs."""
    own = {path.name: path.read_bytes() for path in llama_folder.iterdir() if path.is_file()}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    others = ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors",
              "original/params.json", "model.safetensors", "pytorch_model.bin")  # fmt: skip
    divided = {"config.json": own["config.json"], **{name: name.encode() for name in others}}
    divided["model.safetensors.index.json"] = json.dumps(index).encode()
    return {"models/o/whole": own, "models/o/divided": divided}


def test_only_the_weights_that_the_index_names_are_fetched(tmp_path, models):
    with serving(models, tmp_path) as fetched:
        folder = local_folder("o/divided@v3")
    assert {name.rpartition("/")[2] for name in fetched} == {
        "config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"
    }  # fmt: skip
    assert folder.name == COMMIT and not (folder / "original").exists()


def test_a_model_in_one_file(tmp_path, models, llama_folder):
    with serving(models, tmp_path):
        folder = local_folder("o/whole")
    assert {path.name for path in folder.iterdir()} == {*models["models/o/whole"]}
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (llama_folder / "model.safetensors").read_bytes()


def test_a_gated_model_says_what_to_do(tmp_path, models):
    fetch.cache_clear()
    refused = pytest.raises(RunError, match="'.*' is gated: accept its terms .* o/.*HF_TOKEN")
    with serving(models, tmp_path, gated="models/o/whole"), refused:
        local_folder("o/whole")
    with serving(DATA, tmp_path, gated="datasets/o/plain"), refused:
        prompts("hf://datasets/o/plain/first.jsonl")
