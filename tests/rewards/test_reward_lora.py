"""python -m pytest tests/rewards/test_reward_lora.py

Reward models that are trained with --lora_rank: their runs, and what peft and evaluations read.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_llama, write_both_labels
from processes import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from trainings import assert_same_curve, losses, metrics_of, rm_without_picture
from transformers import AutoModelForSequenceClassification

import train_rm
from nanoalign import loop
from nanoalign.batch import Batch, collate
from nanoalign.distributed import setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.evaluation.scoring import load_reward_model
from nanoalign.files.run_folder import RECORDS, complete_checkpoints
from nanoalign.losses import pairwise_reward_loss
from nanoalign.model import RewardModel
from nanoalign.rewards.several import preferences_of
from nanoalign.weights import adapters, lora
from nanoalign.weights.slices import copy_rows, read_slices

peft = pytest.importorskip("peft", reason="LoRA is trained through peft, which is not installed")

SUFFIXES = (".lora_A.default.weight", ".lora_B.default.weight", "score.weight")


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    return collate(encode_all(records(6), tokenizer))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_both_labels(tmp_path_factory.mktemp("data") / "both.jsonl", 25)


@pytest.fixture(scope="module")
def train(llama_folder, pairs):
    """Runs train_rm.main: 4 steps of all pairs."""

    def run(out: Path, *flags: object, ranks: int = 1, model: Path = llama_folder) -> list[dict]:
        argv = ["--model", model, "--data", pairs, "--eval_data", pairs, "--out", out,
                "--batch_size", 25, "--lr", 2e-2, "--steps", 4, "--lora_rank", 4, "--template",
                "raw", "--micro_batch_tokens", 800, *flags]  # fmt: skip
        outcome = run_ranks(ranks, rm_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        assert "rank 4, alpha 8, on 14 layers (" in outcome.stdout
        return metrics_of(out)

    return run


@pytest.fixture(scope="module")
def one_rank(train, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("runs") / "one"
    return train(out), out


@torch.no_grad()
def rewards(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The rewards by the forward of transformers or peft, one response at a time: (S, K)."""
    lines = batch.inputs["input_ids"]  # (S, T)
    ends = (batch.ends_at % lines.shape[1] + 1).tolist()
    model = model.eval()
    outputs = [model(input_ids=line[None, :n]) for line, n in zip(lines, ends, strict=True)]
    return torch.cat([output.logits for output in outputs])


@torch.no_grad()
def evaluated(name: Path, batch: Batch) -> Tensor:
    """The rewards of what evaluate.py loads: (S, K)."""
    model, _ = load_reward_model(str(name), "fp32", loop.Batcher(setup(), 1000))
    return model(batch)


def by_peft(base: Path, adapter: Path, outputs: int = 1) -> torch.nn.Module:
    torch.manual_seed(1)  # transformers draws a head, which the adapter replaces
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=outputs, dtype=torch.float32
    )
    return peft.PeftModel.from_pretrained(model, adapter)


def assert_equal_rewards(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- the start and a step


def load(folder: Path, flags: str = "") -> RewardModel:
    args = train_rm.parse_args(f"--lora_rank 4 --lora_alpha 12 {flags}".split())
    read = lora.reading(read_slices, args, torch.float32)
    return RewardModel.load(folder, read=read, head_seed=0)


@torch.no_grad()
def test_the_start_is_the_model_without_adapters_bit_for_bit(llama_folder, batch):
    """With the head of the same seed. The adapters of 14 layers and the head alone are trained."""
    model, plain = load(llama_folder), RewardModel.load(llama_folder, head_seed=0)
    assert torch.equal(model(batch), plain(batch))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14 + 1 and all(name.endswith(SUFFIXES) for name in trained)
    assert isinstance(model.head, torch.nn.Linear) and model.head.weight.dtype == torch.float32


def fill_adapters(model: RewardModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Draws A and B, as if they had been trained; (A, B) by the plain name of their weight."""
    generator, drawn = torch.Generator().manual_seed(0), {}
    for name, layer in lora.adapted(model.model).items():
        matrices = lora.matrices(layer)
        drawn[name] = tuple(0.1 * torch.randn(m.shape, generator=generator) for m in matrices)
        for matrix, values in zip(matrices, drawn[name], strict=True):
            copy_rows(matrix, values)
    return drawn


def test_losses_and_gradients_are_those_of_dense_weights(llama_folder, batch):
    """The oracle differentiates through W + 3 B A, and through the head."""
    model, dense = load(llama_folder), RewardModel.load(llama_folder, head_seed=0)
    drawn = fill_adapters(model)
    plain = {name: p.detach() for name, p in dense.named_parameters()}
    head = plain["model.score.weight"].requires_grad_()
    matrices = {name: tuple(m.requires_grad_() for m in pair) for name, pair in drawn.items()}
    updated = {
        f"model.{name}": plain[f"model.{name}"] + 3 * b @ a for name, (a, b) in matrices.items()
    }
    both = model(batch), functional_call(dense, plain | updated, (batch,))
    losses = [pairwise_reward_loss(r[batch.chosen], r[batch.rejected]) for r in both]
    assert torch.allclose(*losses, atol=1e-5)
    sum(each.sum() for each in losses).backward()
    pairs = [(model.head.weight, head)]
    for name, layer in lora.adapted(model.model).items():
        pairs += zip(lora.matrices(layer), matrices[name], strict=True)
    for found, expected in pairs:
        assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


# --- whole runs


def test_training_learns_on_one_rank_as_on_two(train, one_rank, tmp_path, batch):
    metrics, out = one_rank
    assert losses(metrics)[-1] < losses(metrics)[0] - 0.1
    assert_same_curve(metrics, train(tmp_path / "two", ranks=2))
    roots = [AutoModelForSequenceClassification.from_pretrained(f) for f in (out, tmp_path / "two")]
    assert torch.allclose(*(rewards(root, batch) for root in roots), rtol=1e-3, atol=1e-3)
    alone = [load_file(f / "adapter" / adapters.WEIGHTS) for f in (out, tmp_path / "two")]
    assert alone[0].keys() == alone[1].keys() and len(alone[0]) == 2 * 14 + 1


def test_the_root_the_adapter_and_peft_are_one_function(one_rank, llama_folder, batch):
    """So are transformers' and peft's own loading of the adapter, and what peft merges."""
    out = one_rank[1]
    adapter, root = out / "adapter", AutoModelForSequenceClassification.from_pretrained(out)
    expected, wrapped = rewards(root, batch), by_peft(llama_folder, out / "adapter")
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "SEQ_CLS")
    assert "score" in config.modules_to_save
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    plain = RewardModel.load(llama_folder, head_seed=0)
    assert not torch.allclose(rewards(plain.model, batch), expected, atol=0.5)  # it was trained
    assert not torch.equal(root.score.weight, plain.head.weight)  # and so was its head
    assert_equal_rewards(rewards(wrapped, batch), expected)
    for auto in (peft.AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(adapter, num_labels=1)
        assert_equal_rewards(rewards(loaded, batch), expected)
    assert_equal_rewards(rewards(wrapped.merge_and_unload(), batch), expected)
    assert_equal_rewards(evaluated(out, batch), expected)
    assert_equal_rewards(evaluated(adapter, batch), expected)
    changed = {
        name.split(".")[-2]
        for name, tensor in root.state_dict().items()
        if not torch.equal(plain.model.state_dict()[name], tensor)
    }
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == linear | {"score"}


def test_a_resumed_run_is_the_same_bit_for_bit(train, one_rank, tmp_path):
    """A checkpoint holds A and B of 14 layers and the head, and two moments of each."""
    metrics, folder = one_rank
    train(tmp_path / "run", "--stop_after", 2)
    metadata = FileSystemReader(complete_checkpoints(tmp_path / "run")[-1]).read_metadata()
    stored = metadata.state_dict_metadata.items()
    matrices = {name for name, kept in stored if len(getattr(kept, "size", ())) == 2}
    assert len(matrices) == 3 * (2 * 14 + 1)
    assert train(tmp_path / "run", "--resume") == metrics
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/settings/config.json",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_several_preferences(train, llama_folder, batch, tmp_path):
    """A head of two outputs, saved with the adapter; on two ranks, with a root in bfloat16."""
    out = tmp_path / "both"
    train(out, "--preference", "better", "safer", "--save_dtype", "bf16", ranks=2)
    found = evaluated(out / "adapter", batch)
    assert found.shape == (12, 2)
    wrapped = by_peft(llama_folder, out / "adapter", outputs=2)
    assert_equal_rewards(found, rewards(wrapped, batch))
    tensors = load_file(out / "adapter" / adapters.WEIGHTS).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    root, _ = load_reward_model(str(out), "fp32", loop.Batcher(setup(), 1000))
    assert preferences_of(root) == ["better", "safer"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.allclose(rewards(root.model, batch), found, rtol=0.03, atol=0.1)


def test_length_debias_trains_its_coefficient_too(train, llama_folder, batch, tmp_path):
    metrics = train(tmp_path / "run", "--length_debias", "--lr", 2e-3)
    assert losses(metrics)[-1] < losses(metrics)[0]
    wrapped = by_peft(llama_folder, tmp_path / "run" / "adapter")
    expected = rewards(wrapped, batch)
    assert_equal_rewards(evaluated(tmp_path / "run" / "adapter", batch), expected)


def test_a_reward_model_is_trained_on_with_its_head(train, one_rank, batch, tmp_path):
    """The base of the second adapter is a reward model, with a head that the adapter replaces."""
    metrics, base = one_rank
    again = train(tmp_path / "run", model=base)
    assert again[0]["eval/loss"] == pytest.approx(metrics[-1]["eval/loss"], rel=1e-5)
    expected = rewards(by_peft(base, tmp_path / "run" / "adapter"), batch)
    assert_equal_rewards(evaluated(tmp_path / "run" / "adapter", batch), expected)
    assert_equal_rewards(evaluated(tmp_path / "run", batch), expected)


# --- folders of adapters


def _sharded(name: Path, batch: Batch) -> Tensor:
    model, _ = load_reward_model(str(name), "fp32", loop.Batcher(setup(), 1000))
    with torch.no_grad():
        return model(batch)


def test_an_adapter_is_merged_on_every_rank(one_rank, batch):
    """Each adds its own rows to its shard."""
    outcome = run_ranks(2, _sharded, one_rank[1] / "adapter", batch)
    assert outcome.codes == [0, 0], outcome.stderr
    for found in outcome.results:
        assert_equal_rewards(found, evaluated(one_rank[1], batch))


def test_an_adapter_of_a_base_with_a_published_head(train, tokenizer, batch, tmp_path):
    """GRM's linear head, v_head.summary, is trained on; the adapter has it as `score`."""
    folder = tmp_path / "published"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    drawn = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_file(
        tensors | {"v_head.summary.weight": drawn}, folder / "model.safetensors", {"format": "pt"}
    )
    train(tmp_path / "run", model=folder)
    expected = evaluated(tmp_path / "run", batch)
    assert_equal_rewards(evaluated(tmp_path / "run" / "adapter", batch), expected)
    wrapped = by_peft(folder, tmp_path / "run" / "adapter")
    assert_equal_rewards(rewards(wrapped, batch), expected)


def test_what_a_run_was_trained_on_is_known_of_its_adapter(one_rank):
    folder = adapters.model_folder(str(one_rank[1] / "adapter"))
    assert adapters.run_of(folder) == one_rank[1] and (adapters.run_of(folder) / RECORDS).is_file()
    assert adapters.run_of(adapters.model_folder(str(one_rank[1]))) == one_rank[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": True, "use_dora": True}, "has use_rslora, use_dora; give the model that"),
        ({"lora_alpha": None}, "adapter_config.json is not of LoRA: .*; restore the file"),
        (
            {"base_model_name_or_path": "gone/there/x"},
            "the base of the adapter '.*' does not exist",
        ),
        ({"base_model_name_or_path": "tiny"}, "does not fit the base tiny; give its own"),
    ],
)
def test_an_adapter_that_cant_be_evaluated(one_rank, batch, tmp_path, changes, said):
    shutil.copytree(one_rank[1] / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunError, match=said):
        evaluated(tmp_path / "adapter", batch)


def test_flags_and_targets(llama_folder):
    """The head gets no adapter, because it is trained whole."""
    for flags, said in (("--lora_alpha 4", "needs --lora_rank"), ("--lora_rank 0", "at least 1")):
        with pytest.raises(RunError, match=said):
            train_rm.parse_args(flags.split())
    assert train_rm.parse_args(["--lora_rank", "4"]).lora_alpha == 8
    with pytest.raises(RunError, match="'score' is not a linear layer of a block"):
        load(llama_folder, flags="--lora_targets q_proj score")
