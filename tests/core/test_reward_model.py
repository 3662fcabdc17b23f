"""python -m pytest tests/core/test_reward_model.py

The reward model: what its scores depend on, where they are read, its loss and its head.
"""

import argparse
import math
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_llama
from processes import run_ranks
from test_policy import ARCHITECTURES
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

import train_rm
from nanoalign.batch import collate
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.model import RewardModel
from nanoalign.packing.attention import use_tree_attention
from nanoalign.packing.packed import collate as pack
from nanoalign.records import Record
from nanoalign.weights.slices import read_slices


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(records(8), tokenizer)


@pytest.fixture(scope="module")
def reward_model(llama_folder):
    """A reward model that reads padded and packed rows."""
    model = RewardModel.load(llama_folder, head_seed=0)
    use_tree_attention(model.model)
    return model


# --- scores


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"granite", "cohere"}))
@torch.no_grad()
def test_shared_rows_equal_separate_rows_equal_transformers(architecture, rows):
    """To 1e-5, for architectures with windows and experts; two have no
    ...ForSequenceClassification."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])
    config.num_labels, config.pad_token_id = 1, 256
    model = AutoModelForSequenceClassification.from_config(config)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    reward_model = RewardModel(model.eval())
    textbook = reward_model.textbook(collate(rows))
    assert textbook.std() > 0.1  # the scores differ, so that a mix-up would show
    use_tree_attention(model)
    for batch in (pack(rows), collate(rows)):
        assert torch.allclose(reward_model(batch), textbook, rtol=1e-5, atol=1e-5)


def test_a_reward_is_read_at_the_last_token_whatever_the_ids(reward_model, rows, tokenizer):
    """An EOS within the prompt or the response, and padding with the id of EOS, move nothing."""
    inside = Record("a<eos>b", ("c<eos>d", "efg"), name="x")
    (row,) = encode_all([inside], tokenizer)
    assert list(row.responses[0]).count(258) == 2
    batch, padded = pack([row, max(rows, key=len)]), collate([row, max(rows, key=len)])
    with torch.no_grad():
        expected = reward_model.head(reward_model.hidden(batch)[batch.ends_at]).squeeze(-1)
        assert torch.equal(reward_model(batch), expected)
        expected = reward_model(padded)
        tokens = padded.inputs["input_ids"]  # (N, T)
        behind = torch.arange(tokens.shape[1]) > (padded.ends_at % tokens.shape[1])[:, None]
        assert behind.any()
        tokens[behind] = 258
        assert torch.equal(reward_model(padded), expected)
    assert batch.ends_at[:2].tolist() == [len(row.prompt) + len(row.responses[0]) - 1, len(row) - 1]


def test_gradient_reaches_the_tokens_of_a_response_and_its_own_prompt_alone(reward_model, rows):
    """From the reward of the chosen response: not tokens of the rejected one, nor other rows."""
    batch = pack(rows[:2])
    embedded = []
    handle = reward_model.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output) or output.retain_grad()
    )
    reward_model(batch)[0].backward()
    handle.remove()
    reached = embedded[0].grad.abs().sum(-1) > 0  # (1, T)
    expected = torch.zeros_like(reached)
    expected[0, : len(rows[0].prompt) + len(rows[0].responses[0])] = True
    assert torch.equal(reached, expected)


def test_rewards_have_float32_resolution_in_bfloat16(llama_folder, rows):
    coarse = RewardModel.load(llama_folder, dtype=torch.bfloat16, head_seed=0)
    exact = RewardModel.load(llama_folder, head_seed=0)
    with torch.no_grad():
        rewards, expected = coarse(collate(rows)), exact(collate(rows))
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())
    assert torch.allclose(rewards, expected, atol=0.05 * expected.abs().max().item())


# --- the loss of a batch


def _fake(*rewards: float):
    return lambda batch: torch.tensor(rewards)


def flags(*given: object) -> argparse.Namespace:
    return train_rm.parse_args([str(flag) for flag in given])


def test_a_ranked_record_is_the_mean_of_its_pairs(tokenizer):
    """Rewards 3, 1, 0 of ranks 1, 2, 3: differences 2, 3, 1; beside a pair of difference -1."""
    ranked = Record("p", ("a", "b", "c"), pairs=((0, 1), (0, 2), (1, 2)))
    batch = collate(encode_all([ranked, Record("q", ("a", "b"))], tokenizer))
    losses, values = train_rm.loss_of_batch(_fake(3.0, 1.0, 0.0, 0.0, 1.0), flags(), batch)
    by_hand = [math.log1p(math.exp(-d)) for d in (2, 3, 1, -1)]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)
    mean = sum(by_hand[:3]) / 3 + by_hand[3]
    assert (losses * batch.weights).sum().item() == pytest.approx(mean, rel=1e-6)
    assert values["accuracy"].tolist() == [1, 1, 1, 0]
    assert values["rewards/margins"].tolist() == [2, 3, 1, -1]


def test_the_flags_of_the_loss_reach_it(tokenizer):
    """margin times the data's margin, smoothing, and coefficient * (3 + 1)^2 of centring."""
    given = ["--margin", 0.25, "--label_smoothing", 0.1, "--center_rewards_coefficient", 0.01]
    for extra, margin in (({"margins": [2.0]}, 0.5), ({}, 0.25)):
        record = Record("q", ("a", "b"), extra=extra)
        batch = collate(encode_all([record], tokenizer))
        losses, _ = train_rm.loss_of_batch(_fake(3.0, 1.0), flags(*given), batch)
        right, wrong = math.log1p(math.exp(margin - 2)), math.log1p(math.exp(margin + 2))
        assert losses.item() == pytest.approx(0.9 * right + 0.1 * wrong + 0.16, rel=1e-6)


# --- the head


def test_the_head_is_drawn_from_the_seed_with_its_deviation(tmp_path, tokenizer):
    """Of 1,024 hidden units: 1 / sqrt(1025), within what 1,024 draws allow (5 standard errors)."""
    tiny_llama(hidden_size=1024, num_hidden_layers=1).save_pretrained(tmp_path)
    torch.manual_seed(7)
    first = RewardModel.load(tmp_path, head_seed=3).head.weight
    torch.manual_seed(8)  # the seed decides, not what was drawn before
    again = RewardModel.load(tmp_path, head_seed=3).head.weight
    other = RewardModel.load(tmp_path, head_seed=4).head.weight
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(1 / math.sqrt(1025), rel=5 / math.sqrt(2 * 1024))
    assert first.mean().abs().item() < 5 / 1024


@pytest.mark.parametrize(
    "heads",
    [
        {"score": nn.Linear(32, 1)},
        {"score": nn.Sequential(nn.Linear(32, 1, bias=False))},
        {"score": None},
        {"more": nn.Linear(32, 1, bias=False)},
    ],
    ids=["with a bias", "in a container", "none", "two"],
)
def test_a_model_without_a_single_linear_head_is_refused(llama_folder, heads):
    model = RewardModel.load(llama_folder, head_seed=0)
    assert model.head is model.model.score
    for name, head in heads.items():
        setattr(model.model, name, head)
    with pytest.raises(RunError, match="LlamaForSequenceClassification has no single linear head"):
        model.head  # noqa: B018


def _head(folder: Path) -> list[float]:
    model = RewardModel.load(folder, setup(), read=read_slices, head_seed=0)
    return model.head.weight.full_tensor().tolist()


def test_ranks_draw_one_head(llama_folder, reward_model):
    outcome = run_ranks(2, _head, llama_folder)
    assert outcome.results == [reward_model.head.weight.tolist()] * 2, outcome.stderr


def test_an_untied_language_models_head_is_left_behind(tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    for options in ({}, {"read": read_slices}):
        model = RewardModel.load(tmp_path, head_seed=0, **options)
        assert "lm_head" not in " ".join(name for name, _ in model.named_parameters())
        assert not any(p.is_meta for p in model.parameters())


def test_experts_and_prefixed_names_are_read_too(tmp_path, rows):
    """Mixtral's files name each expert; GPT-2's put the head's body under another name than
    Llama's."""
    for kind in ("mixtral", "gpt2"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**ARCHITECTURES[kind])).eval()
        model.save_pretrained(tmp_path / kind)
        ours = RewardModel.load(tmp_path / kind, read=read_slices, head_seed=0)
        batch = collate(rows[:2])
        with torch.no_grad():
            expected = model.base_model(**batch.inputs).last_hidden_state.flatten(0, 1)
            assert torch.allclose(ours.hidden(batch), expected, rtol=1e-5, atol=1e-5)
