"""python -m pytest tests/weights/test_lora.py"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_llama, write_pairs
from processes import run_ranks
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from trainings import losses, metrics_of, without_picture
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import train_dpo
from nanoalign.batch import Batch, collate
from nanoalign.distributed import full, setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.files.run_folder import complete_checkpoints
from nanoalign.losses import dpo_loss
from nanoalign.model import Policy
from nanoalign.weights import adapters, lora
from nanoalign.weights.slices import copy_rows, read_slices

peft = pytest.importorskip("peft", reason="LoRA is trained through peft, which is not installed")

FLAGS = "--lora_rank 4 --lora_alpha 12"  # a scale of 3, so that a forgotten one would show


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    return collate(encode_all(records(6), tokenizer))


def load(folder: Path, world=None, dtype=torch.float32, flags: str = FLAGS, **options) -> Policy:
    args = train_dpo.parse_args([*flags.split(), "--model", str(folder)])
    read = lora.reading(read_slices, args, dtype)
    return Policy.load(folder, world, dtype, read=read, **options)


def fill_adapters(policy: Policy, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Draws A and B, as if they had been trained; (A, B) by the plain name of their weight."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, layer in lora.adapted(policy.model).items():
        matrices = lora.matrices(layer)
        drawn[name] = tuple(0.1 * torch.randn(m.shape, generator=generator) for m in matrices)
        for matrix, values in zip(matrices, drawn[name], strict=True):
            copy_rows(matrix, values)
    return drawn


@torch.no_grad()
def logps(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return Policy(model.eval())(batch)


# --- the start


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_model_bit_for_bit(llama_folder, batch, dtype):
    policy = load(llama_folder, dtype=dtype)
    model = Policy.load(llama_folder, dtype=dtype)
    assert torch.equal(policy(batch), model(batch))
    assert torch.equal(lora.Base(policy)(batch), model(batch))


def test_the_reference_is_the_model_whatever_the_adapters(llama_folder, batch):
    """Sums and tokens, without gradient; the adapters are on again behind it."""
    policy, model = load(llama_folder), Policy.load(llama_folder)
    before = policy(batch)
    fill_adapters(policy)
    base = lora.Base(policy)
    assert torch.equal(base(batch), model(batch)) and not base(batch).requires_grad
    assert torch.equal(base.tokens(batch), model.tokens(batch))
    assert not base.tokens(batch).requires_grad
    assert not torch.allclose(policy(batch), before, atol=0.1)


def test_adapters_are_drawn_as_in_the_paper_and_alone_are_trained(llama_folder):
    """Two blocks of 7 linear layers; rank 4, so that 4 * (in + out) numbers are trained a layer."""
    policy = load(llama_folder)
    layers = lora.adapted(policy.model)
    assert len(layers) == 14 and "lm_head.weight" not in layers
    for a, b in map(lora.matrices, layers.values()):
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < a.abs().max() <= bound and not b.any()
        assert a.dtype == b.dtype == torch.float32
    trained = {p for p in policy.parameters() if p.requires_grad}
    assert trained == {m for layer in layers.values() for m in lora.matrices(layer)}
    assert policy.count_parameters(trainable=True) == sum(p.numel() for p in trained)
    groups = policy.parameter_groups(0.1)
    assert {p for group in groups for p in group["params"]} == trained
    other = load(llama_folder, flags=f"{FLAGS} --seed 1")
    first = [next(iter(lora.adapted(p.model).values())) for p in (policy, other)]
    assert not torch.equal(*(lora.matrices(layer)[0] for layer in first))


def test_targets_choose_the_layers(llama_folder):
    policy = load(llama_folder, flags=f"{FLAGS} --lora_targets q_proj v_proj")
    names = {name.split(".")[-2] for name in lora.adapted(policy.model)}
    assert names == {"q_proj", "v_proj"}


# --- the formula


def test_merged_by_hand():
    """r = 1, alpha = 2: [[1, 2], [3, 4]] + 2 * [[1], [0]] [[1, 10]] = [[3, 22], [3, 4]]."""
    toy = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    config = peft.LoraConfig(r=1, lora_alpha=2, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, toy)[0]
    a, b = lora.matrices(layer)
    copy_rows(layer.base_layer.weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    copy_rows(a, torch.tensor([[1.0, 10.0]]))
    copy_rows(b, torch.tensor([[1.0], [0.0]]))
    assert lora.merged(layer).tolist() == [[3.0, 22.0], [3.0, 4.0]]
    x = torch.tensor([[1.0, -1.0]])
    assert layer(x).tolist() == (x @ lora.merged(layer).T).tolist() == [[-19.0, -1.0]]
    with lora.off(toy):
        assert layer(x).tolist() == [[-1.0, -1.0]]
    assert layer(x).tolist() == [[-19.0, -1.0]] and b.requires_grad


def _gradients(folder: Path, batch: Batch) -> list[tuple]:
    """Losses, and the whole gradients of A and B by their weight's name, on any number of ranks.

    First as usual, then with activation checkpointing.
    """
    world, found = setup(), []
    for checkpointing in (False, True):
        policy = load(folder, world, checkpointing=checkpointing)
        fill_adapters(policy)
        losses, _ = train_dpo.loss_of_batch(policy, lora.Base(policy), 0.1, 0.0, batch)
        losses.sum().backward()
        gradients = {
            name: tuple(full(matrix.grad) for matrix in lora.matrices(layer))
            for name, layer in lora.adapted(policy.model).items()
        }
        found.append((losses.detach(), gradients))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_are_those_of_dense_weights(llama_folder, batch, ranks):
    """The oracle holds two whole models, and differentiates through W + 3 B A.

    A reference whose adapters were not off, or a policy whose were, when blocks are run again in
    the backward pass, would have other gradients.
    """
    outcome = run_ranks(ranks, _gradients, llama_folder, batch)
    assert outcome.codes == [0] * ranks, outcome.stderr
    drawn = fill_adapters(load(llama_folder))
    dense = Policy.load(llama_folder)
    plain = {name: p.detach() for name, p in dense.named_parameters()}
    matrices = {name: tuple(m.requires_grad_() for m in pair) for name, pair in drawn.items()}
    updated = {
        f"model.{name}": plain[f"model.{name}"] + 3 * b @ a for name, (a, b) in matrices.items()
    }

    scores, base = functional_call(dense, plain | updated, (batch,)), dense(batch).detach()
    w, r = batch.chosen, batch.rejected
    expected, _, _ = dpo_loss(scores[w], scores[r], base[w], base[r])
    expected.sum().backward()
    assert expected.std() > 0.05  # the adapters matter
    for found_losses, gradients in (found for result in outcome.results for found in result):
        assert torch.allclose(found_losses, expected, atol=1e-5)
        for name, pair in gradients.items():
            for found, matrix in zip(pair, matrices[name], strict=True):
                assert torch.allclose(found, matrix.grad, rtol=1e-4, atol=1e-5), name


# --- whole runs


@pytest.fixture(scope="module")
def train(llama_folder, tmp_path_factory):
    """Runs train_dpo.main: 4 steps of all pairs."""
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)

    def run(out: Path, *flags: object, ranks: int = 1, model: Path = llama_folder) -> list[dict]:
        argv = ["--model", model, "--data", pairs, "--out", out, "--batch_size", 25, "--lr", 3e-2,
                "--steps", 4, "--lora_rank", 4, "--micro_batch_tokens", 800, *flags]  # fmt: skip
        outcome = run_ranks(ranks, without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        assert "rank 4, alpha 8, on 14 layers (" in outcome.stdout
        return metrics_of(out)

    return run


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("runs") / "two"
    return train(out, ranks=2), out


def test_what_is_saved_is_the_model_with_its_adapter_merged(two_ranks, llama_folder, batch):
    """The root, the base with the adapter by peft, and what peft merges of them: one function."""
    metrics, out = two_ranks
    assert metrics[1]["rewards/chosen"] == metrics[1]["rewards/rejected"] == 0.0
    assert losses(metrics)[-1] < 0.6
    root = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(base, out / "adapter")
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "CAUSAL_LM")
    assert config.base_model_name_or_path == str(llama_folder)
    expected = logps(root, batch)
    assert not torch.allclose(expected, logps(tiny_llama(), batch), atol=1)  # it was trained
    assert torch.allclose(logps(wrapped.get_base_model(), batch), expected, rtol=1e-5, atol=1e-5)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(logps(merged, batch), expected, rtol=1e-5, atol=1e-5)
    changed = set()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(root.state_dict()[name], tensor, rtol=1e-5, atol=1e-6), name
        if not torch.equal(root.state_dict()[name], before[name]):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_resume_continues_on_any_number_of_ranks(train, two_ranks, tmp_path):
    """A checkpoint holds the adapters and their optimizer's state, and none of the frozen weights:
    A and B of 14 layers, and two moments of each.
    """
    train(tmp_path / "run", "--stop_after", 2, ranks=2)
    metadata = FileSystemReader(complete_checkpoints(tmp_path / "run")[-1]).read_metadata()
    stored = metadata.state_dict_metadata.items()
    matrices = {name for name, kept in stored if len(getattr(kept, "size", ())) == 2}
    assert len(matrices) == 2 * 14 * 3 and all(".lora_" in name for name in matrices)
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert train(tmp_path / "run", "--resume", ranks=2) == two_ranks[0]
    alone = train(tmp_path / "alone", "--resume")
    assert losses(alone) == pytest.approx(losses(two_ranks[0]), rel=1e-5)


def _dtypes(folder: Path) -> set[tuple[bool, torch.dtype]]:
    policy = load(folder, setup(), torch.bfloat16)
    return {(p.requires_grad, p.dtype) for p in policy.parameters()}


def test_a_base_that_is_stored_in_bfloat16_is_held_so(train, tokenizer, batch, tmp_path):
    """Frozen bfloat16 and trained float32 in one group of FSDP's; the root is still W + 2 B A."""
    folder = tmp_path / "bf16"
    tiny_llama().bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    outcome = run_ranks(2, _dtypes, folder)
    assert outcome.results == [{(True, torch.float32), (False, torch.bfloat16)}] * 2, outcome.stderr
    metrics = train(tmp_path / "run", "--precision", "bf16", ranks=2, model=folder)
    assert metrics[1]["rewards/chosen"] == metrics[1]["rewards/rejected"] == 0.0
    assert losses(metrics)[-1] < 0.6
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").merge_and_unload()
    root = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.allclose(logps(merged, batch), logps(root, batch), rtol=1e-5, atol=1e-5)


MIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "more"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, ""),  # weights are (in, out)
        ("mixtral", MIXTRAL, "--lora_targets q_proj o_proj"),
    ],
)
@torch.no_grad()
def test_other_layouts_merge(kind, options, more, batch, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=259, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = load(tmp_path / "base", flags=f"{FLAGS} {more}")
    fill_adapters(policy)
    lora.write_merged(policy, AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(policy(batch), logps(base, batch), atol=0.1)
    root = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logps(root, batch), policy(batch), rtol=1e-5, atol=1e-4)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    folder = adapters.model_folder(str(tmp_path / "out" / "adapter"))
    evaluated = Policy.load(folder, trainable=False, read=adapters.reading(read_slices))
    for found in (logps(wrapped.get_base_model(), batch), evaluated(batch)):
        assert torch.allclose(found, policy(batch), rtol=1e-5, atol=1e-4)
    assert evaluated.model.generation_config.eos_token_id == root.generation_config.eos_token_id


# --- errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lora_alpha 4", "--lora_alpha needs --lora_rank"),
        ("--lora_targets q_proj", "--lora_targets needs --lora_rank"),
        ("--lora_rank 4 --reference other", "the reference is --model with its adapters off"),
        ("--lora_rank 4 --sync_reference_every 2", "can't move"),
        ("--lora_rank 0", "at least 1"),
        ("--lora_rank 4 --lora_alpha 0", "at least 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(RunError, match=said):
        train_dpo.parse_args(flags.split())


def test_flags_that_go_together():
    """Alpha is twice the rank unless it is given."""
    for flags, alpha in (
        ("", None),
        ("--lora_rank 4", 8),
        ("--model m --lora_rank 4 --lora_alpha 3 --reference m", 3),
    ):
        assert train_dpo.parse_args(flags.split()).lora_alpha == alpha


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match="pip install peft"):
        train_dpo.parse_args(["--lora_rank", "4"])


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such", "no_such"),
        ("q_proj no_such", "no linear layer has the name 'no_such'"),
        ("lm_head", "'lm_head' is not a linear layer of a block"),
        ("embed_tokens", "'model.embed_tok.*' is not a linear layer of a block"),
    ],
)
def test_targets_that_can_have_no_adapter(llama_folder, target, said):
    with pytest.raises(RunError, match=said):
        load(llama_folder, flags=f"{FLAGS} --lora_targets {target}")
