"""python -m pytest tests/core/test_policy.py"""

import math

import numpy as np
import pytest
import torch
from conftest import records, tiny_llama
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nanoalign.batch import Row, collate
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.evaluation.generation import CACHE
from nanoalign.losses import dpo_loss
from nanoalign.model import Policy, RewardModel
from nanoalign.packing.attention import use_tree_attention
from nanoalign.packing.packed import collate as pack


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_all(records(8), tokenizer)


@pytest.fixture(scope="module")
def policy():
    """A policy that reads padded and packed rows."""
    policy = Policy(tiny_llama())
    use_tree_attention(policy.model)
    return policy


SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WITH_KV = SMALL | {
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "pad_token_id": 256,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
ARCHITECTURES = {
    "llama": WITH_KV,
    "qwen2": WITH_KV,
    "qwen3": WITH_KV,
    "mistral": WITH_KV | {"sliding_window": 8},
    "gemma2": WITH_KV | WINDOWS,  # soft-capped logits, two kinds of mask
    "gemma3_text": WITH_KV | WINDOWS,
    "phi3": WITH_KV,
    "olmo2": WITH_KV,
    "granite": WITH_KV | {"logits_scaling": 3.0},
    "cohere": WITH_KV | {"logit_scale": 0.3},
    "mixtral": WITH_KV | {"num_local_experts": 4},
    "gpt_oss": WITH_KV | WINDOWS | {"num_local_experts": 4},  # sinks
    "gpt2": {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": 258},
    "gpt_neox": SMALL | {"intermediate_size": 48},
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_shared_rows_equal_separate_rows_equal_the_models_own_forward(architecture, rows):
    """To 1e-5 of the largest, for architectures with windows, caps, scales and experts."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.2)
    policy = Policy(model.eval())
    separate = collate(rows)
    textbook = policy.textbook(separate)
    assert textbook.std() > 1  # the scores differ, so a mix-up would show
    assert torch.allclose(policy(separate), textbook, rtol=1e-5, atol=1e-4)
    for _ in range(2):  # a model may be prepared again
        use_tree_attention(policy.model)
        assert model.config._attn_implementation.count("nanoalign") == 1
    assert torch.allclose(policy(pack(rows)), textbook, rtol=1e-5, atol=1e-4)
    # Without packed rows the model's own attention is unchanged.
    assert torch.equal(policy.textbook(separate), textbook)


@torch.no_grad()
def test_logps_equal_a_loop_over_tokens(policy, rows, tokenizer):
    """The slow oracle: one forward a token, softmax by hand, product of probabilities."""
    row = rows[0]
    for response, logp in zip(row.responses, policy(pack([row])), strict=True):
        ids, total = row.prompt.tolist(), 0.0
        for token in response.tolist():
            logits = policy.model(torch.tensor([ids])).logits[0, -1].double()
            total += math.log(logits.exp()[token] / logits.exp().sum())
            ids.append(token)
        assert logp.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_gradient_reaches_what_predicts_a_response_and_nothing_else(policy, rows, share):
    """The last hidden state of the prompt, and those of each response but its last one."""
    batch = (pack if share else collate)(rows[:3])
    hidden = []

    def keep(module, inputs, output):
        output.retain_grad()
        hidden.append(output)

    handle = policy.model.model.norm.register_forward_hook(keep)
    policy(batch).sum().backward()
    handle.remove()
    reached = (hidden[0].grad.abs().sum(-1) > 0).flatten().tolist()
    expected, width = [], batch.inputs["input_ids"].shape[1]
    for row in rows[:3]:
        prompt = [False] * (len(row.prompt) - 1) + [True]
        responses = [[True] * (len(response) - 1) + [False] for response in row.responses]
        lines = [sum(responses, prompt)] if share else [prompt + response for response in responses]
        for line in lines:
            expected += line if share else line + [False] * (width - len(line))
    assert reached == expected


def test_dropout_is_off_in_training(rows, tmp_path):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gpt2"](
        **ARCHITECTURES["gpt2"], resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    assert torch.equal(policy(collate(rows)), policy(collate(rows)))


def test_activation_checkpointing_changes_no_gradient(llama_folder, rows):
    """Also of packed rows, whose attention must be the same when a block is run again."""
    for layout in (collate, pack):
        gradients = []
        for checkpointing in (False, True):
            policy = Policy.load(llama_folder, checkpointing=checkpointing)
            use_tree_attention(policy.model)
            policy(layout(rows)).sum().backward()
            gradients.append([p.grad for p in policy.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_keeps_less(llama_folder, rows):
    """Fewer elements are saved for the backward pass when blocks are run again."""

    def saved_elements(checkpointing: bool) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        policy = Policy.load(llama_folder, checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            policy(collate(rows))
        return sum(sizes.values())

    assert saved_elements(True) < 0.7 * saved_elements(False)


def test_activation_checkpointing_keeps_no_state_of_random_numbers(llama_folder, rows, monkeypatch):
    """None are drawn; on a GPU each block would copy a state."""
    policy = Policy.load(llama_folder, checkpointing=True)
    monkeypatch.setattr(torch, "get_rng_state", None)
    policy(collate(rows)).sum().backward()


@torch.no_grad()
def test_keys_and_values_are_not_kept(llama_folder, rows):
    """A cache, which only sampling needs, would take the memory of all blocks."""
    for model in (Policy.load(llama_folder), RewardModel.load(llama_folder, head_seed=0)):
        caches = []
        for part in (model.model, model.model.base_model):
            part.register_forward_hook(
                lambda part, given, output, caches=caches: caches.append(getattr(output, CACHE))
            )
        model(collate(rows[:2])), model.textbook(collate(rows[:2]))
        assert len(caches) > 2 and not any(cache is not None for cache in caches)


def test_overfits_four_pairs(llama_folder, rows):
    """40 steps of AdamW on four pairs: accuracy 1, loss below 0.1."""
    policy, reference = Policy.load(llama_folder), Policy.load(llama_folder, trainable=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    batch = collate(rows[:4])
    with torch.no_grad():
        ref = reference(batch)
    for _ in range(40):
        logps = policy(batch)
        losses, chosen, rejected = dpo_loss(logps[0::2], logps[1::2], ref[0::2], ref[1::2])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert losses.max() < 0.1 and (chosen > rejected).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


@torch.no_grad()
def test_logits_are_made_of_16_mib_at_a_time():
    """On a CPU, of 40 tokens and 120,000 ids: 4.8 million in all."""
    policy = Policy(tiny_llama(vocab_size=120_000, num_hidden_layers=1))
    row = Row("row", np.arange(3), (np.arange(20), np.arange(20)))
    with Largest() as largest:
        policy(collate([row]))
    assert 2**21 < largest.elements <= 2**22


def test_parameters_are_counted_by_hand():
    """Of a block: 32 x (32 + 16 + 16 + 32), 3 x 32 x 48, two norms; then embedding and norm."""
    policy, blocks = Policy(tiny_llama()), 2 * (32 * 96 + 3 * 32 * 48 + 2 * 32)
    assert policy.count_parameters() == blocks + 259 * 32 + 32
    policy.model.get_input_embeddings().requires_grad_(False)
    assert policy.count_parameters(trainable=True) == blocks + 32
    assert policy.count_parameters() == blocks + 259 * 32 + 32


def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub():
    for kind in (Policy, RewardModel):
        with pytest.raises(FileNotFoundError, match=r"\[Errno 2\] No such file or directory"):
            kind.load("owner/name")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_an_error(tmp_path, tokenizer, name):
    """transformers would draw it at random."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=f"has no weights for {name}"):
        Policy.load(tmp_path)
