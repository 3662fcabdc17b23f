"""python -m pytest tests/rewards/test_published_heads.py

Reward models of other programs: each head against plain lines written from its description.
"""

import json

import families
import numpy as np
import pytest
import torch
from conftest import records, write_pairs
from processes import run_ranks
from published_models import (
    CASES,
    Case,
    D,
    body,
    by_hand,
    close,
    linear,
    llama3_tokenizer,
    of_layers,
    root_of,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import train_rm
from nanoalign.batch import Row, collate
from nanoalign.data.templates import encode_records
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import load_reward_model, score_rows
from nanoalign.model import RewardModel
from nanoalign.packing.packed import PackedBatcher, PaddedBatcher
from nanoalign.packing.self_check import check_layout
from nanoalign.rewards.published_heads import head_class, last_places, reader
from nanoalign.rewards.several import preferences_of
from nanoalign.weights.write import change_json, write_model


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return encode_records(records(5), llama3_tokenizer(), 256, "chat")


# --- scores ---------------------------------------------------------------------------------------


def check_scores(model, case: Case, rows: list[Row], batcher) -> None:
    """Every output for every response is that of the plain lines."""
    expected = torch.stack([outputs for row in by_hand(case, rows) for outputs in row])  # (S, K)
    assert expected.std(0).min() > 0.03
    for n, outputs in enumerate(expected.T):
        scores = score_rows(lambda batch, n=n: model(batch)[:, n], rows, batcher, "it")
        assert close(torch.tensor(sum(scores, [])), outputs)


@pytest.mark.parametrize("layout", [PackedBatcher, PaddedBatcher])
@pytest.mark.parametrize("name", CASES)
def test_a_head_computes_what_its_description_says(name, layout, rows, world, tmp_path):
    case, batcher = CASES[name], layout(world, 300)
    folder = write(tmp_path / "model", case)
    model, _ = load_reward_model(str(folder), "fp32", batcher, case.token)
    assert len(preferences_of(model)) == len(by_hand(case, rows[:1])[0][0])
    check_layout(model, rows, batcher, "it")
    check_scores(model, case, rows, batcher)


@pytest.mark.parametrize("family", ["mistral", "gemma", "mixtral"])
def test_the_body_may_be_of_another_family(family, rows, world, tmp_path):
    """Eurus is a Mistral, GRM a Gemma; transformers converts the tensors of a Mixtral."""
    folder = families.write_model_of(family, tmp_path / "model", tied=False)
    body_alone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    case = CASES["ultrarm"]
    weight = {"regression_head.weight": torch.randn(1, body_alone.config.hidden_size)}
    path = folder / "model.safetensors"
    language_model = load_file(path)
    save_file({n: t for n, t in language_model.items() if n != "lm_head.weight"} | weight, path)
    change_json(folder / "config.json", {"architectures": ["OwnRewardModel"]})
    llama3_tokenizer().save_pretrained(folder)
    batcher = PackedBatcher(world, 300)
    model, _ = load_reward_model(str(folder), "fp32", batcher)
    scores = score_rows(lambda batch: model(batch)[:, 0], rows, batcher, "it")
    for row, of_row in zip(rows, scores, strict=True):
        for response, score in zip(row.responses, of_row, strict=True):
            ids = [*row.prompt.tolist(), *response.tolist()]
            with torch.no_grad():
                hidden = body_alone(torch.tensor([ids])).last_hidden_state[0]
            assert close(torch.tensor([score]), case.plain(weight, hidden, ids))


@pytest.mark.parametrize("name", ["beaver", "grm", "armorm"])
def test_tensors_that_the_model_does_not_use_are_left_out(name, rows, world, tmp_path):
    """Files of older programs have rotary tables, and the head of the language model."""
    case, batcher = CASES[name], PackedBatcher(world, 300)
    folder = write(tmp_path / "model", case)
    unused = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1)}
    unused |= {"lm_head.weight": torch.ones(264, D)}
    path = folder / "model.safetensors"
    save_file(load_file(path) | unused, path)
    model, _ = load_reward_model(str(folder), "fp32", batcher)
    check_scores(model, case, rows, batcher)


@pytest.mark.parametrize("name", ["inf-orm", "beaver-normalised", "armorm", "nemotron"])
def test_a_head_is_float32_in_bfloat16(name, rows, world, tmp_path):
    """Given the hidden states of a bfloat16 body, the scores are those of float32 weights."""
    case, batcher = CASES[name], PackedBatcher(world, 3000)
    folder = write(tmp_path / "model", case)
    if case.token is not None:  # its head is that of a language model, bfloat16 as in the files
        bf16 = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
        save_file(bf16, folder / "model.safetensors")
    model, _ = load_reward_model(str(folder), "bf16", batcher, case.token)
    assert model.dtype == torch.bfloat16
    batch, states = batcher.collate(rows), []
    hook = model.model.base_model.register_forward_hook(
        lambda *results: states.append(results[-1].last_hidden_state[0])
    )
    with torch.no_grad():
        scores = model(batch)
    hook.remove()
    assert scores.dtype == torch.float32 and states[0].dtype == torch.bfloat16
    tensors = case.tensors()
    if case.token is not None:
        tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    start, at = 0, 0
    for row in rows:
        width = len(row.prompt)
        begin = start + width
        for response in row.responses:
            own = [*range(start, start + width), *range(begin, begin + len(response))]
            ids = [*row.prompt.tolist(), *response.tolist()]
            assert close(scores[at], case.plain(tensors, states[0][own].float(), ids))
            begin, at = begin + len(response), at + 1
        start = begin


def test_the_gate_is_read_where_the_header_before_the_response_begins(world):
    """By hand, in both layouts: the last `8 9` of prompt and response, also across both."""
    prompt = np.array([8, 9, 1, 8, 9, 2], np.int32)
    first, second = np.array([3, 4], np.int32), np.array([8, 9, 5], np.int32)
    batch_rows = [Row("a", prompt, (first, second)), Row("b", prompt[:4], (second[1:], second))]
    packed = PackedBatcher(world, 99).collate(batch_rows)
    # a: prompt 0 to 5, responses 6, 7 and 8, 9, 10; b: prompt 11 to 14, responses 15, 16 and 17 ...
    assert last_places(packed, [8, 9]).tolist() == [3, 8, 14, 17]
    padded = collate(batch_rows)  # lines of 9 places
    assert last_places(padded, [8, 9]).tolist() == [3, 9 + 6, 18 + 3, 27 + 4]
    empty = [batch_rows[0], Row("c", prompt[:0], (second, prompt))]
    assert last_places(PackedBatcher(world, 99).collate(empty), [8, 9]).tolist() == [3, 8, 11, 17]
    assert last_places(collate(empty), [8, 9]).tolist() == [3, 9 + 6, 18, 27 + 3]
    with pytest.raises(RunError, match=r"<\|eot_id\|>.*which a dialogue does not have"):
        last_places(packed, [2, 4])


# --- heads that are not known ---------------------------------------------------------------------

QRM = {"regression_layer.weight": (19, D), "gating.layers.2.running_mean": (24,)}


@pytest.mark.parametrize(
    ("architecture", "shapes", "found"),
    [
        ("LlamaForRewardModelWithGating31", QRM, "gating.layers.2.running_mean [24], regression_"),
        ("OwnRewardModel", {"value.weight": (1, D)}, "value.weight [1, 32]"),
        ("OwnRewardModel", {"score.weight": (1, D), "scale": (1,)}, "scale [1], score.weight"),
        ("OwnRewardModel", {"score.1.weight": (1, D)}, "score.1.weight [1, 32]"),
    ],
)
def test_another_head_is_refused_with_its_tensors(architecture, shapes, found, tmp_path):
    folder = write(tmp_path / "model", Case(architecture, shapes, linear("value")))
    with pytest.raises(RunError) as error:
        head_class(folder)
    message = str(error.value)
    assert f"is {architecture}, whose head is not known" in message
    assert f"its files have {found}" in message


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("v_head.summary", {"v_head.summary.weight": (D,)}),
        ("regression_head", {"regression_head.weight": (1, D // 2)}),
        ("score.2", of_layers(D, 24, 1, name="score") | {"score.2.weight": (1, 16)}),
        ("gating.layers.1", CASES["armorm"].shapes | {"gating.layers.1.weight": (24, 20)}),
    ],
)
def test_a_head_of_another_width_is_refused_when_it_is_loaded(name, shapes, world, tmp_path):
    folder = write(tmp_path / "model", Case("OwnRewardModel", shapes, linear(name)))
    with pytest.raises(RunError, match=rf"can't be built: .*{name}.weight has the shape \[.*, not"):
        load_reward_model(str(folder), "fp32", PackedBatcher(world, 300))


def test_models_of_transformers_and_of_nanoalign_are_none_of_these(tmp_path):
    for name in ("score", "nemotron"):
        assert head_class(write(tmp_path / name, CASES[name])) is None
    assert head_class(write(tmp_path / "own", Case("OwnForCausalLM", {}, linear("score")))) is None


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bias", "grm-linear", "ultrarm", "cost"])
def test_training_begins_with_a_linear_head(name, rows, tmp_path):
    """transformers reads what is saved; its rewards are those of the head without its bias."""
    case = CASES[name]
    folder = write(tmp_path / "model", case, do_normalize=False)
    model = RewardModel.load(folder, read=reader(folder), head_seed=0)
    write_model(model, llama3_tokenizer(), tmp_path / "out")
    result = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    sign = -1 if name == "cost" else 1
    tensors = case.tensors() | {f"{root_of(case)}.bias": torch.zeros(1)}
    for row in rows:
        for response in row.responses:
            ids = [*row.prompt.tolist(), *response.tolist()]
            with torch.no_grad():
                hidden = body()(torch.tensor([ids])).last_hidden_state[0]
                found = result(torch.tensor([ids])).logits[0]
            assert close(found, sign * linear(root_of(case))(tensors, hidden, ids))


def test_a_run_on_two_ranks_begins_and_ends_with_the_head(tmp_path):
    """A step of nearly nothing changes it by nearly nothing; the result is one of transformers."""
    folder, out = write(tmp_path / "model", CASES["cost"], do_normalize=False), tmp_path / "out"
    argv = ["--model", folder, "--data", write_pairs(tmp_path / "pairs.jsonl", 8), "--out", out]
    argv += ["--template", "chat", "--batch_size", "4", "--steps", "1", "--lr", "1e-9"]
    run = run_ranks(2, train_rm.main, list(map(str, argv)))
    assert run.codes == [0, 0], run.stderr
    assert "head        minus score_head; the result has it as score" in run.stdout
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == {*(f"model.{name}" for name in body().state_dict()), "score.weight"}
    assert close(tensors["score.weight"], -CASES["cost"].tensors()["score_head.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("name", ["inf-orm", "grm", "armorm", "beaver-normalised"])
def test_training_does_not_begin_with_other_heads(name, tmp_path):
    folder = write(tmp_path / "model", CASES[name])
    with pytest.raises(RunError, match="not one linear layer or normalises its scores"):
        RewardModel.load(folder, read=reader(folder), head_seed=0)
