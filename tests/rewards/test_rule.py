"""python -m pytest tests/rewards/test_rule.py

A reward model to disk and back: the same scores, also by transformers; and by which rule.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, records, tiny_llama
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, Gemma3Config, Gemma3TextConfig

import train_rm
from nanoalign.batch import collate
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.loop import Batcher
from nanoalign.model import RewardModel
from nanoalign.packing.self_check import check_layout
from nanoalign.rewards.rule import EOS_RULE, check_pad_token, rule_of, scoring_rule, set_rule
from nanoalign.weights.slices import read_slices
from nanoalign.weights.write import write_model


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(records(8), tokenizer)


@pytest.fixture(scope="module")
def reward_model(llama_folder):
    return RewardModel.load(llama_folder, head_seed=0)


@pytest.fixture(scope="module")
def saved(reward_model, tmp_path_factory, tokenizer) -> Path:
    """The folder of a reward model."""
    folder = tmp_path_factory.mktemp("rm") / "model"
    folder.mkdir()
    set_rule(reward_model, flags("--max_length", 64), "raw")
    write_model(reward_model, tokenizer, folder)
    return folder


def flags(*given: object):
    return train_rm.parse_args([str(flag) for flag in given])


def transformers_scores(folder: Path, rows, pad: bool) -> torch.Tensor:
    """The oracle: transformers' own model on its own padding, or on one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [torch.tensor([*row.prompt, *response]) for row in rows for response in row.responses]
    with torch.no_grad():
        if not pad:
            return torch.cat([model(tokens[None]).logits for tokens in texts]).squeeze(-1)
        tokens = pad_sequence(texts, True, padding_value=model.config.pad_token_id)
        mask = pad_sequence([torch.ones_like(text) for text in texts], True)
        return model(tokens, attention_mask=mask).logits.squeeze(-1)


def test_what_was_saved_scores_the_same(saved, reward_model, rows):
    with torch.no_grad():
        expected = reward_model(collate(rows))
        for options in ({}, {"read": read_slices}, {"head_seed": 5}):
            again = RewardModel.load(saved, **options)
            assert torch.equal(again(collate(rows)), expected)
    rule = {"template": "raw", "max_length": 64, "eos": EOS_RULE}
    assert rule_of(again) == rule | {"preferences": ["better"], "condition": False}
    for pad in (False, True):
        scores = transformers_scores(saved, rows, pad)
        assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 256


@pytest.mark.parametrize(
    ("special", "pad"),
    [({"pad_token": "<eos>"}, 257), ({"pad_token": None, "bos_token": None}, None)],
)
def test_the_pad_id_is_never_that_of_eos(reward_model, tmp_path, rows, special, pad):
    """transformers skips pad ids at the end of a text: with EOS for padding it would read
    elsewhere."""
    write_model(reward_model, byte_tokenizer(**special), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("pad_token_id") == pad
    with torch.no_grad():
        expected = reward_model(collate(rows))
    scores = transformers_scores(tmp_path, rows, pad=pad is not None)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_a_source_that_pads_with_eos_is_trained_and_scored_at_its_eos(tmp_path, tokenizer, rows):
    """The embedding of padding gets no gradient, and transformers reads no reward there."""
    tiny_llama(pad_token_id=258).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.load(tmp_path, head_seed=0)
    check_layout(model, rows, Batcher(setup(), 300), "it")
    model(collate(rows)).sum().backward()
    assert model.model.get_input_embeddings().weight.grad[258].any()


@pytest.mark.parametrize(("pad", "eos"), [(258, 258), (7, [258, 7])])
def test_a_config_with_parts_is_read_where_its_text_is(tmp_path, pad, eos):
    for its_pad in (pad, None):
        text = Gemma3TextConfig(pad_token_id=its_pad, eos_token_id=eos)
        Gemma3Config(text_config=text, pad_token_id=None, eos_token_id=3).save_pretrained(tmp_path)
        if its_pad is None:
            check_pad_token(tmp_path)
        else:
            with pytest.raises(RunError, match="pads with EOS"):
                check_pad_token(tmp_path)


def test_a_pad_token_that_the_model_lacks_is_not_stored(reward_model, tmp_path):
    """As of a tokenizer that was given a token more than the embedding has."""
    longer = byte_tokenizer()
    longer.add_special_tokens({"pad_token": "[PAD]"})
    assert longer.pad_token_id == 259
    write_model(reward_model, longer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 257


def test_scoring_with_other_settings_is_an_error_that_names_both(saved):
    model = RewardModel.load(saved)
    assert scoring_rule(model, "rm", None, None) == ("raw", 64)
    assert scoring_rule(model, "rm", "raw", 64) == ("raw", 64)
    with pytest.raises(RunError, match="trained with template 'raw', not 'pku', .* --template raw"):
        scoring_rule(model, "rm", "pku", None)
    assert scoring_rule(model, "rm", "auto", None) == ("raw", 64)
    with pytest.raises(RunError, match="max_length 64, not 512.*give --judge_max_length 64"):
        scoring_rule(model, "rm", None, 512, flags="judge_")
    model.model.config.nanoalign = {"eos": "never"}
    with pytest.raises(RunError, match=f"trained with eos 'never', not '{EOS_RULE}'"):
        scoring_rule(model, "rm", None, None)
    del model.model.config.nanoalign  # of another program: as the flags say
    assert scoring_rule(model, "rm", None, None) == ("auto", 1024)
    assert scoring_rule(model, "rm", "pku", 7) == ("pku", 7)


def test_training_on_by_another_rule_is_an_error(saved):
    model = RewardModel.load(saved)
    set_rule(model, flags("--max_length", 64), "raw")
    both = ["--preference", "better", "safer"]
    for given, template, message in (
        ([], "pku", "trained with template 'raw', not 'pku'"),
        (["--max_length", 99], "raw", "trained with max_length 64, not 99"),
        (["--preference", "safer"], "raw", r"with preferences \['better'\], not \['safer'\]"),
        (both, "raw", "a head of 1 outputs, but --preference better safer needs 2"),
    ):
        with pytest.raises(RunError, match=message):
            set_rule(model, flags("--model", saved, "--max_length", 64, *given), template)
    model.model.config.nanoalign |= {"preferences": ["better", "safer"]}
    with pytest.raises(RunError, match="with condition False, not True"):
        set_rule(model, flags("--max_length", 64, *both, "--condition"), "raw")


def edited(saved: Path, folder: Path, **settings: object) -> Path:
    """A copy of a model with other settings in config.json."""
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_models_that_are_no_reward_models_are_errors(llama_folder, saved, tmp_path):
    with pytest.raises(RunError, match="LlamaForCausalLM.* without a reward head"):
        RewardModel.load(llama_folder)
    headless = shutil.copytree(saved, tmp_path / "headless")
    tensors = AutoModelForSequenceClassification.from_pretrained(saved).state_dict()
    del tensors["score.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    for seed in (None, 0):  # a head that should be there is never drawn
        with pytest.raises(RunError, match="missing keys: score.weight"):
            RewardModel.load(headless, read=read_slices, head_seed=seed)
    early = edited(saved, tmp_path / "early", pad_token_id=258)
    model = RewardModel.load(early)
    with pytest.raises(RunError, match="pads with EOS, so transformers reads its rewards at"):
        check_pad_token(early)
    with pytest.raises(RunError, match="pads with EOS, so transformers reads its rewards at"):
        set_rule(model, flags("--model", early, "--max_length", 64), "raw")
    two = edited(saved, tmp_path / "two", id2label={"0": "a", "1": "b"})
    with pytest.raises(RunError, match="has 2 outputs; expected 1"):
        RewardModel.load(two, outputs=1)
