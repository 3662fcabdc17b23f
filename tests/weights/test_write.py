"""python -m pytest tests/weights/test_write.py

What other programs find in a result: names of transformers 4, tokenizer files, a chat template, the
ends of a response, weights in bfloat16.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama, write_pairs
from safetensors.torch import load_file, save_file
from tokenizers import processors
from trainings import metrics_of
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
)

import train_rm
from nanoalign.data.templates import encode_records
from nanoalign.model import Policy, RewardModel
from nanoalign.records import Record
from nanoalign.weights.folders import load_tokenizer
from nanoalign.weights.write import add_older_names, rounded, write_model


def json_of(path: Path) -> dict:
    return json.loads(path.read_text())


# --- config.json and generation_config.json


def test_the_base_of_rotary_positions_is_where_older_programs_read_it(tmp_path, tokenizer):
    model = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    write_model(Policy(model), tokenizer, tmp_path)
    settings = json_of(tmp_path / "config.json")
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 1e6
    assert settings["torch_dtype"] == settings["dtype"] == "float32"
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == model.config.rope_parameters


def test_scaled_and_layered_rotary_positions_by_their_older_names():
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    layers = {"full_attention": scaled, "sliding_attention": {"rope_theta": 2e4}}
    for rope, more in ((scaled, {}), (layers, {"rope_local_base_freq": 2e4})):
        settings = {"text_config": {"rope_parameters": rope}}
        add_older_names(settings)
        expected = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5}
        assert settings["text_config"] == {"rope_parameters": rope} | expected | more


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(),
        Gemma4TextConfig(),  # its full attention has rotary positions that transformers 4 lacks
        GPTNeoXConfig(),  # partial_rotary_factor
        LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}),
    ],
    ids=lambda config: config.model_type,
)
def test_the_older_names_change_nothing_for_this_transformers(config):
    settings = config.to_dict()
    add_older_names(settings)
    assert type(config).from_dict(settings).rope_parameters == config.rope_parameters


@pytest.mark.parametrize(("ends", "expected"), [(None, 258), (7, [258, 7]), ([7, 258], [7, 258])])
def test_generation_ends_where_responses_of_the_training_did(tmp_path, tokenizer, ends, expected):
    model = tiny_llama()
    model.generation_config.eos_token_id = ends
    write_model(Policy(model), tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected
    assert model.generation_config.eos_token_id == ends


# --- tokenizer


@pytest.fixture
def old_tokenizer(tmp_path, tokenizer) -> Path:
    """A folder whose tokenizer files transformers 5 would write in another way."""
    folder = tmp_path / "old"
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json_of(path) | {"tokenizer_class": "PreTrainedTokenizerFast", "mine": [1]}
    path.write_text(json.dumps(settings))
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def test_files_of_an_unchanged_tokenizer_are_copied(old_tokenizer, tmp_path):
    write_model(Policy(tiny_llama()), load_tokenizer(old_tokenizer), tmp_path / "out")
    for path in old_tokenizer.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_files_of_a_changed_tokenizer_are_written(old_tokenizer, tmp_path):
    tokenizer = load_tokenizer(old_tokenizer)
    tokenizer.add_tokens(["<new>"])
    write_model(Policy(tiny_llama()), tokenizer, tmp_path / "out")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written("<new>")["input_ids"] == [259]
    assert "TokenizersBackend" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_what_is_not_weights_goes_along_with_a_result(old_tokenizer, tmp_path):
    """Also chat templates of other uses; but no weights, card, code, or link out of the folder."""
    source = tmp_path / "model"
    shutil.copytree(old_tokenizer, source)
    (source / "additional_chat_templates").mkdir()
    along = ["additional_chat_templates/rag.jinja", "preprocessor_config.json", "LICENSE"]
    left = ["pytorch_model.bin", "README.md", "modeling.py", "model.safetensors.index.json"]
    left += ["consolidated.pth", "optimizer.pt", "last.ckpt", "flax_model.msgpack", "tf_model.h5"]
    left += ["weights.npz", "model.onnx", "model.onnx_data", "model.gguf", "rust_model.ot"]
    left += ["model.tflite", "coreml.zip", "adapter_config.json", ".gitattributes", "loss.png"]
    left += ["args.json", "metrics.jsonl", "train.jsonl", "train.parquet", "train.log"]
    for name in [*along, *left]:
        (source / name).write_text(f"mine: {name}")
    (tmp_path / "secret").write_text("secret")
    (source / "special.model").symlink_to(tmp_path / "secret")
    write_model(Policy(tiny_llama()), load_tokenizer(source), tmp_path / "out")
    assert all((tmp_path / "out" / n).read_text() == f"mine: {n}" for n in along)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {*left, "special.model"}
    (source / along[0]).write_text("other")  # a second result replaces the files of the first
    write_model(Policy(tiny_llama()), load_tokenizer(source), tmp_path / "out")
    assert (tmp_path / "out" / along[0]).read_text() == "other"


def test_the_pad_token_of_a_reward_model_is_in_its_files(old_tokenizer, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = old_tokenizer / name
        path.write_text(json.dumps(json_of(path) | {"pad_token": "<eos>"}))
    tiny_llama().save_pretrained(old_tokenizer)
    model = RewardModel.load(old_tokenizer, head_seed=0)
    write_model(model, load_tokenizer(old_tokenizer), tmp_path / "out")
    settings = json_of(tmp_path / "out" / "tokenizer_config.json")
    assert (settings["pad_token"], settings["mine"]) == ("<bos>", [1])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<bos>"
    assert json_of(tmp_path / "out" / "config.json")["pad_token_id"] == 257


# --- the chat template of the template pku

TURNS = ("user", "Hi"), ("assistant", "Hello!"), ("user", "What is 3 plus 4?")
DIALOGUE = [{"role": role, "content": text} for role, text in TURNS]


@pytest.fixture
def asked_by_pku(tmp_path, llama_folder) -> Path:
    tokenizer = load_tokenizer(llama_folder)
    write_model(Policy(tiny_llama()), tokenizer, tmp_path / "pku", template="pku")
    return tmp_path / "pku"


def test_a_chat_template_asks_in_the_trained_form(asked_by_pku):
    tokenizer = AutoTokenizer.from_pretrained(asked_by_pku)
    (row,) = encode_records([Record(DIALOGUE, ["7.", "9."])], tokenizer, 1024, "pku")
    asked = tokenizer.apply_chat_template(
        DIALOGUE, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert asked == row.prompt.tolist()
    whole = [*DIALOGUE, {"role": "assistant", "content": "7."}]
    whole = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert whole == [*row.prompt, *row.responses[0]]


def test_a_chat_template_begins_as_the_tokenizer_does(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 257)]
    )
    write_model(Policy(tiny_llama()), tokenizer, tmp_path, template="pku")
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(DIALOGUE[:1], tokenize=False)
    assert text == "<bos>BEGINNING OF CONVERSATION: USER: Hi"


def test_auto_means_for_a_result_what_it_meant_for_its_model(asked_by_pku, llama_folder, tmp_path):
    """Also for HH-RLHF dialogues. A training by raw does not keep the template; one of the model's
    own stays.
    """
    texts = [Record(p, ["7.<eos>", "9."]) for p in ("Hi", "\n\nHuman: Hi\n\nAssistant:", DIALOGUE)]
    for record in texts:
        rows = [
            encode_records([record], load_tokenizer(folder), 1024, "auto")[0]
            for folder in (llama_folder, asked_by_pku)
        ]
        assert rows[0].prompt.tolist() == rows[1].prompt.tolist()
        assert rows[0].responses[0].tolist() == rows[1].responses[0].tolist()
    policy, own = Policy(tiny_llama()), byte_tokenizer(chat_template="{{ messages[0].content }}")
    write_model(policy, load_tokenizer(asked_by_pku), tmp_path / "raw", template="raw")
    assert AutoTokenizer.from_pretrained(tmp_path / "raw").chat_template is None
    write_model(policy, own, tmp_path / "own", template="pku")
    assert AutoTokenizer.from_pretrained(tmp_path / "own").chat_template == own.chat_template


# --- bfloat16


def test_the_share_of_changes_that_survive_by_hand(tmp_path, capsys):
    """Near 1 the grid of bfloat16 has a spacing of 2^-7: a change by 2^-9 is lost, 2^-6 is not."""
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    trained = {
        "w": torch.tensor([1.0, 1 + 2**-9, 1 + 2**-6, 1 - 2**-6]),
        "head": torch.ones(2),  # not in the start
        "count": torch.tensor([3]),
    }
    written = dict(rounded(iter(trained.items()), tmp_path))
    assert "66.7% of 3 changed weights" in capsys.readouterr().out
    assert written["w"].tolist() == [1, 1, 1 + 2**-6, 1 - 2**-6]
    assert written["w"].dtype == written["head"].dtype == torch.bfloat16
    assert written["count"].dtype == torch.int64


def test_a_reward_model_in_bfloat16_prints_its_held_out_loss(
    llama_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_rm.result, "finish", lambda *args: None)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 24)
    train_rm.main(
        f"--model {llama_folder} --data {pairs} --out {tmp_path}/rm --steps 2 --lr 1e-2 "
        "--batch_size 8 --save_dtype bf16".split()
    )
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    config = json_of(tmp_path / "rm" / "config.json")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bfloat16")]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["dtype"] == "bfloat16"
    assert len(lines) == 2 and "held out, by rounding: loss 0." in lines[1]
    logged = metrics_of(tmp_path / "rm")
    before = lines[1].split("loss ")[1].split(" ->")[0]
    assert before == f"{logged[-1]['eval/loss']:.4f}"
