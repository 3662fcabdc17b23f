"""python -m pytest tests/test_reward.py

The reward model by itself: what its scores depend on, where they are read, how it comes and goes.
"""

import argparse
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, examples, tiny_llama
from ranks import run_ranks
from test_policy import ARCHITECTURES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

import train_rm
from nanoalign.checks import check_layout
from nanoalign.distributed import setup
from nanoalign.errors import RunError
from nanoalign.losses import pairwise_reward_loss
from nanoalign.models import RewardModel
from nanoalign.records import Example, Pair
from nanoalign.rows import EOS_RULE, collate, encode_all
from nanoalign.scoring import score_rows, scoring_rule

SETTINGS = SimpleNamespace(micro_batch_tokens=300, share_prefix=True)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(examples(8), tokenizer, "raw")[0]


@pytest.fixture(scope="module")
def reward_model(llama_folder):
    return RewardModel.load(llama_folder, head_seed=0)


@pytest.fixture(scope="module")
def saved(reward_model, tmp_path_factory, tokenizer) -> Path:
    """A reward model's folder."""
    folder = tmp_path_factory.mktemp("rm") / "model"
    folder.mkdir()
    reward_model.scoring = {"template": "raw", "max_length": 64, "eos": EOS_RULE}
    reward_model.save(folder, tokenizer)
    return folder


def transformers_scores(folder: Path, rows, pad: bool) -> torch.Tensor:
    """The oracle: transformers' own model on its own padding, or on one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    sequences = [
        torch.tensor([*row.prompt, *response]) for row in rows for response in row.responses
    ]
    with torch.no_grad():
        if not pad:
            return torch.cat([model(tokens[None]).logits for tokens in sequences]).squeeze(-1)
        tokens = torch.nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=model.config.pad_token_id
        )
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(tokens) for tokens in sequences], batch_first=True
        )
        return model(tokens, attention_mask=mask).logits.squeeze(-1)


# --- scores


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"granite", "cohere"}))
@torch.no_grad()
def test_shared_rows_equal_separate_rows_equal_transformers(architecture, rows):
    """To 1e-5, for architectures with windows and experts; two have no ...ForSequenceClassification."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])
    config.num_labels, config.pad_token_id = 1, 256
    model = AutoModelForSequenceClassification.from_config(config)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    reward_model = RewardModel(model.eval())
    separate = collate(rows, share_prefix=False)
    textbook = reward_model.textbook(separate)
    assert textbook.std() > 0.1  # the scores differ, so that a mix-up would show
    for batch in (collate(rows), separate):
        assert torch.allclose(reward_model(batch), textbook, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_batch_order_and_padding_change_no_score(reward_model, rows):
    together = reward_model(collate(rows)).view(-1, 2)
    alone = torch.stack([reward_model(collate([row])) for row in rows])
    backwards = reward_model(collate(rows[::-1])).view(-1, 2).flip(0)
    assert len({len(row) for row in rows}) > 4  # so that alone and together are padded differently
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.allclose(together, backwards, rtol=1e-5, atol=1e-5)


def _score(folder: Path, rows, share_prefix: bool) -> list[list[float]]:
    world = setup()
    model = RewardModel.load(folder, world, trainable=False)
    settings = SimpleNamespace(micro_batch_tokens=300, share_prefix=share_prefix)
    return score_rows(model, rows, settings, world)


@pytest.mark.parametrize(("ranks", "share"), [(1, False), (2, True), (3, True)])
def test_ranks_and_sharing_change_no_score(saved, rows, ranks, share):
    """7 rows do not divide by 2 or 3; every rank ends with every score, each computed once."""
    outcome = run_ranks(ranks, _score, saved, rows[:7], share)
    assert outcome.codes == [0] * ranks, outcome.stderr
    with torch.no_grad():
        expected = RewardModel.load(saved)(collate(rows[:7])).tolist()
    for scores in outcome.results:
        assert [len(row) for row in scores] == [2] * 7
        assert sum(scores, []) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_reward_is_read_at_the_last_token_whatever_the_ids(reward_model, rows, tokenizer):
    """An EOS within the prompt or the response, and padding with the id of EOS, move nothing."""
    inside = Example("x", "text", "a<eos>b", ("c<eos>d", "efg"))
    (row,) = encode_all([inside], tokenizer, "raw")[0]
    assert list(row.responses[0]).count(258) == 2
    batch = collate([row, max(rows, key=len)])
    with torch.no_grad():
        hidden = reward_model.hidden(batch)
        expected = reward_model.head(hidden[0, batch.ends]).squeeze(-1)
        assert torch.equal(reward_model(batch), expected)
        padded = collate([row, max(rows, key=len)], share_prefix=False)
        expected = reward_model(padded)
        padded.tokens[padded.segments < 0] = 258
        assert torch.equal(reward_model(padded), expected)
    assert batch.ends[:2].tolist() == [len(row.prompt) + len(row.responses[0]) - 1, len(row) - 1]


def test_gradient_reaches_the_tokens_of_a_response_and_its_own_prompt_alone(reward_model, rows):
    """From the chosen response's reward: not the rejected response's tokens, nor other rows."""
    batch = collate(rows[:2])
    embedded = []
    handle = reward_model.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(output) or output.retain_grad()
    )
    reward_model(batch)[0].backward()
    handle.remove()
    reached = embedded[0].grad.abs().sum(-1) > 0  # (N, T)
    expected = torch.zeros_like(reached)
    expected[0, : len(rows[0].prompt) + len(rows[0].responses[0])] = True
    assert torch.equal(reached, expected)


def test_rewards_have_float32_resolution_in_bfloat16(llama_folder, rows):
    coarse = RewardModel.load(llama_folder, compute_dtype=torch.bfloat16, head_seed=0)
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
    ranked = Example("r", "text", "p", ("a", "b", "c"),
                     pairs=(Pair(0, 1, 1.0), Pair(0, 2, 4.0), Pair(1, 2, 3.0)))  # fmt: skip
    pair = Example("p", "text", "q", ("a", "b"))
    batch = collate(encode_all([ranked, pair], tokenizer, "raw")[0])
    losses, values = train_rm.loss_of_batch(_fake(3.0, 1.0, 0.0, 0.0, 1.0), flags(), batch)
    by_hand = [math.log1p(math.exp(-d)) for d in (2, 3, 1, -1)]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)
    mean = sum(by_hand[:3]) / 3 + by_hand[3]
    assert (losses * batch.weights).sum().item() == pytest.approx(mean, rel=1e-6)
    assert values["accuracy"].tolist() == [1, 1, 1, 0]
    assert values["rewards/margins"].tolist() == [2, 3, 1, -1]


def test_the_flags_of_the_loss_reach_it(tokenizer):
    """margin times the data's margin, smoothing, and coefficient * (3 + 1)^2 of centring."""
    pair = Example("p", "text", "q", ("a", "b"), pairs=(Pair(0, 1, 2.0),))
    batch = collate(encode_all([pair], tokenizer, "raw")[0])
    losses, _ = train_rm.loss_of_batch(
        _fake(3.0, 1.0),
        flags("--margin", 0.25, "--label_smoothing", 0.1, "--center_rewards_coefficient", 0.01),
        batch,
    )
    expected = pairwise_reward_loss(torch.tensor(3.0), torch.tensor(1.0), 0.25 * 2.0, 0.1) + 0.16
    assert losses.item() == pytest.approx(expected.item(), rel=1e-6)


def test_overfits_four_pairs(llama_folder, rows):
    model = RewardModel.load(llama_folder, head_seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(rows[:4])
    for _ in range(40):
        losses, values = train_rm.loss_of_batch(model, flags(), batch)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert losses.max() < 0.1 and values["accuracy"].tolist() == [1.0] * 4


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


def _head(folder: Path) -> list[float]:
    model = RewardModel.load(folder, setup(), head_seed=0)
    return model.head.weight.full_tensor().tolist()


def test_ranks_draw_one_head(llama_folder, reward_model):
    outcome = run_ranks(2, _head, llama_folder)
    assert outcome.results == [reward_model.head.weight.tolist()] * 2, outcome.stderr


def test_the_body_is_the_language_models(llama_folder, reward_model):
    body = AutoModelForCausalLM.from_pretrained(llama_folder).base_model.state_dict()
    ours = reward_model.model.base_model.state_dict()
    assert body.keys() == ours.keys() and all(torch.equal(body[name], ours[name]) for name in body)


def test_an_untied_language_models_head_is_left_behind(tmp_path):
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    model = RewardModel.load(tmp_path, head_seed=0)
    assert "lm_head" not in " ".join(name for name, _ in model.named_parameters())
    assert not any(p.is_meta for p in model.parameters())


def test_experts_and_prefixed_names_are_read_too(tmp_path, rows):
    """Mixtral's files name each expert; GPT-2's put the head's body under another name than Llama's."""
    for kind in ("mixtral", "gpt2"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**ARCHITECTURES[kind])).eval()
        model.save_pretrained(tmp_path / kind)
        ours = RewardModel.load(tmp_path / kind, head_seed=0)
        separate = collate(rows[:2], share_prefix=False)
        with torch.no_grad():
            expected = model.base_model(separate.tokens).last_hidden_state
            assert torch.allclose(ours.hidden(separate), expected, rtol=1e-5, atol=1e-5)


# --- to disk and back


def test_what_was_saved_scores_the_same(saved, reward_model, rows):
    with torch.no_grad():
        expected = reward_model(collate(rows))
        again = RewardModel.load(saved)
        assert torch.equal(again(collate(rows)), expected)
    assert again.head_origin == "loaded" and again.scoring["max_length"] == 64
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
    """transformers skips pad ids at the end of a text: with EOS for padding it would read elsewhere."""
    reward_model.save(tmp_path, byte_tokenizer(**special))
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
    check_layout(model, rows, True, setup(), "it")
    model(collate(rows)).sum().backward()
    assert model.model.get_input_embeddings().weight.grad[258].any()


def test_a_pad_token_that_the_model_lacks_is_not_stored(reward_model, tmp_path):
    """As of a tokenizer that was given a token more than the embedding has."""
    longer = byte_tokenizer()
    longer.add_special_tokens({"pad_token": "[PAD]"})
    assert longer.pad_token_id == 259
    reward_model.save(tmp_path, longer)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 257
    assert RewardModel.load(tmp_path).head_origin == "loaded"


@pytest.mark.parametrize("share", [True, False])
def test_equal_responses_have_one_score(reward_model, tokenizer, share):
    """Also where they stand at different places of one row, where rounding differs."""
    long = [example.responses[0] * 3 for example in examples(20)]
    twins = [Example(str(i), "text", "prompt", (text, text)) for i, text in enumerate(long)]
    settings = SimpleNamespace(micro_batch_tokens=2000, share_prefix=share)
    scores = score_rows(reward_model, encode_all(twins, tokenizer, "raw")[0], settings, setup())
    assert all(first == second for first, second in scores) and len(set(map(tuple, scores))) == 20


def test_scoring_with_other_settings_is_an_error_that_names_both(saved):
    model = RewardModel.load(saved)
    assert scoring_rule(model, "rm", None, None) == ("raw", 64)
    assert scoring_rule(model, "rm", "raw", 64) == ("raw", 64)
    with pytest.raises(RunError, match="trained with template 'raw', and is to score with 'pku'"):
        scoring_rule(model, "rm", "pku", None)
    assert scoring_rule(model, "rm", "auto", None) == ("raw", 64)
    with pytest.raises(
        RunError, match="max_length 64, and is to score with 512.*give --max_length 64"
    ):
        scoring_rule(model, "rm", None, 512)
    model.scoring = {"eos": "never"}
    with pytest.raises(RunError, match=f"trained with eos 'never', .* '{EOS_RULE}'"):
        scoring_rule(model, "rm", None, None)


def test_models_that_are_no_reward_models_are_errors(llama_folder, saved, tmp_path):
    with pytest.raises(RunError, match="has no reward head: .* names LlamaForCausalLM"):
        RewardModel.load(llama_folder)
    headless = shutil.copytree(saved, tmp_path / "headless")
    tensors = AutoModelForSequenceClassification.from_pretrained(saved).state_dict()
    del tensors["score.weight"]
    from safetensors.torch import save_file

    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    for seed in (None, 0):  # a head that should be there is never drawn
        with pytest.raises(RunError, match="missing keys: score.weight"):
            RewardModel.load(headless, head_seed=seed)
    early = shutil.copytree(saved, tmp_path / "early")
    config = json.loads((early / "config.json").read_text())
    (early / "config.json").write_text(json.dumps(config | {"pad_token_id": 258}))
    with pytest.raises(
        RunError, match="pads with its EOS, so its rewards were read before the EOS"
    ):
        RewardModel.load(early)
    two = shutil.copytree(saved, tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    (two / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="has a head of 2 outputs, and 1 are wanted"):
        RewardModel.load(two, outputs=1)
    torch.manual_seed(0)
    granite = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["granite"](**ARCHITECTURES["granite"])
    )
    granite.save_pretrained(tmp_path / "granite")
    with pytest.raises(RunError, match="can't be built: ValueError"):
        RewardModel.load(tmp_path / "granite", head_seed=0)
