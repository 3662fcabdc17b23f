"""python -m pytest tests/data/test_hub.py

Data sets and models of the Hub, asked of a server on this machine.
"""

import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from hub_server import COMMIT, serving
from huggingface_hub import constants
from stores import read

from nanoalign.data.sources import check_sources, open_source
from nanoalign.errors import RunError
from nanoalign.weights.folders import fetch, local_folder


def lines(*prompts: str) -> bytes:
    records = [{"prompt": prompt, "chosen": "c", "rejected": "r"} for prompt in prompts]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


CARD = b"""---
configs:
- config_name: easy
  data_files: [{split: train, path: one.jsonl}, {split: test, path: two.jsonl}]
- config_name: hard
  data_files: [{split: train, path: two.jsonl}]
---
"""
CALLS = [{"a": {"b": 1}}, {"a": {"c": "x"}}]  # two types of one column
VARIED = [
    {"prompt": "a", "chosen": [{"role": "assistant", "content": "c", "tool_calls": CALLS[:1]}],
     "rejected": "r"},
    {"prompt": [{"role": "user", "content": "b"}], "chosen": "c", "rejected": "r",
     "tools": CALLS},
]  # fmt: skip
DATA = {
    "datasets/o/splits": {
        "README.md": b"text", "data/train-0.jsonl": lines("a"), "data/train-1.jsonl": lines("b"),
        "data/test-0.jsonl": lines("c"),
    },
    "datasets/o/several": {
        "data/train_prefs-00000-of-00001.jsonl": lines("g"),
        "data/train_sft-00000-of-00001.jsonl": lines("h"),
    },
    "datasets/o/folders": {"a/train.jsonl": lines("i"), "b/train.jsonl": lines("j")},
    "datasets/o/subsets": {"README.md": CARD, "one.jsonl": lines("k"), "two.jsonl": lines("l")},
    "datasets/o/plain": {"first.jsonl": lines("d"), "second.jsonl": lines("e")},
    "datasets/o/varied": {"train.jsonl": "\n".join(map(json.dumps, VARIED)).encode()},
}  # fmt: skip


@contextmanager
def serving_data(cache: Path, **options):
    """`serving` of DATA to the datasets library, too."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    with serving(DATA, cache, **options) as fetched:
        changes = {"HF_ENDPOINT": constants.ENDPOINT, "HF_DATASETS_CACHE": cache / "datasets"}
        with patch.multiple(datasets.config, **changes):
            yield fetched


def prompts(source: str) -> list[str]:
    return [record.prompt for record in read(source)]


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
        ("folders", ["i", "j"]),
        ("folders/b", ["j"]),
        ("subsets/easy", ["k"]),
        ("subsets/easy:test", ["l"]),
        ("subsets/hard", ["l"]),
    ],
)
def test_a_file_or_a_split_of_a_data_set(tmp_path, place, expected):
    """By default the training split; of a subset, or of a folder, where one is named."""
    with serving_data(tmp_path):
        assert prompts(f"hf://datasets/o/{place}") == expected


def test_records_of_a_split_are_numbered(tmp_path):
    with serving_data(tmp_path):
        found = read("x=hf://datasets/o/folders")
        assert [(r.name, r.subset) for r in found] == [("x:1", "x"), ("x:2", "x")]


def test_records_are_as_in_their_file(tmp_path):
    """Also where a column has values of different types, and other keys in each row."""
    with serving_data(tmp_path):
        rows = [raw for *_, raw in open_source("hf://datasets/o/varied")]
        lines = [json.loads(raw) for *_, raw in open_source("hf://datasets/o/varied/train.jsonl")]
    assert rows == lines == VARIED


def test_the_revision_of_a_file_is_asked_for(tmp_path):
    with serving_data(tmp_path) as fetched:
        prompts("hf://datasets/o/plain/first.jsonl@v2")
    assert fetched == ["o/plain@v2/first.jsonl"]


@pytest.mark.parametrize("place", ["splits:test", "subsets/easy:test"])
def test_a_split_is_read_again_without_the_hub(tmp_path, place):
    """With HF_HUB_OFFLINE, from the files of the cache."""
    source = f"hf://datasets/o/{place}"
    with serving_data(tmp_path):
        (file,) = check_sources([source])
        before = prompts(source)
    assert file.suffix == ".arrow" and tmp_path in file.parents
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": True}
    config = sys.modules["datasets"].config
    with (
        patch.multiple(config, HF_DATASETS_CACHE=tmp_path / "datasets", **offline),
        patch.multiple(constants, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE=True),
    ):
        assert prompts(source) == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("several", r"can't be fetched: .* Should be one of \['train_prefs', 'train_sft'\]"),
        ("plain:test", r"can't be fetched: .* Should be one of \['train'\]"),
        ("subsets", r"can't be fetched: .* available configs: \['easy', 'hard'\]"),
        ("plain/third.jsonl", "can't be fetched: "),
        ("none", "can't be fetched: DatasetNotFoundError: .*; for a gated or private .* HF_TOKEN"),
        ("none/a.jsonl", "can't be fetched: RepositoryNotFoundError: .* HF_TOKEN"),
    ],
)
def test_what_is_not_there_is_one_error(tmp_path, place, message):
    source = f"hf://datasets/o/{place}"
    with serving_data(tmp_path), pytest.raises(RunError) as caught:
        prompts(source)
    assert re.match(f"data source '{source}' .*{message}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_one_error(tmp_path):
    private = "nor a public model of the Hub; .* set HF_TOKEN"
    with serving(DATA, tmp_path), pytest.raises(RunError, match=private):
        local_folder("o/none")


@pytest.fixture
def models(llama_folder) -> dict[str, dict[str, bytes]]:
    """A whole model, and one in two files with the same weights again for other programs."""
    own = {path.name: path.read_bytes() for path in llama_folder.iterdir() if path.is_file()}
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    others = ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors",
              "original/params.json", "additional_chat_templates/rag.jinja", "model.safetensors",
              "pytorch_model.bin")  # fmt: skip
    divided = {"config.json": own["config.json"], **{name: name.encode() for name in others}}
    divided["model.safetensors.index.json"] = json.dumps(index).encode()
    return {"models/o/whole": own, "models/o/divided": divided}


def test_only_the_weights_that_the_index_names_are_fetched(tmp_path, models):
    with serving(models, tmp_path) as fetched:
        folder = local_folder("o/divided@v3")
    assert {name.rpartition("/")[2] for name in fetched} == {
        "config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors",
        "rag.jinja",
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


@pytest.mark.parametrize("place", ["plain", "plain/first.jsonl"])
def test_a_gated_data_set_says_what_to_do(tmp_path, place):
    refused = pytest.raises(RunError, match=f"o/{place}' can't be fetched: .*gated.* HF_TOKEN$")
    with serving_data(tmp_path, gated="datasets/o/plain"), refused:
        prompts(f"hf://datasets/o/{place}")
