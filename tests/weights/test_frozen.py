"""python -m pytest tests/weights/test_frozen.py"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import records, tiny_llama, write_pairs
from processes import run_ranks
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from trainings import losses, metrics_of, rm_without_picture, without_picture
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import train_dpo
from nanoalign.batch import Batch, collate
from nanoalign.distributed import full, setup
from nanoalign.encode import encode_all
from nanoalign.errors import RunError
from nanoalign.model import Policy
from nanoalign.weights import frozen, lora, nf4
from nanoalign.weights.slices import copy_rows, read_slices

peft = pytest.importorskip("peft", reason="LoRA is trained through peft, which is not installed")


SHARDS_BYTES = torch.__version__ >= (2, 12)
many_ranks = pytest.mark.skipif(not SHARDS_BYTES, reason="FSDP2 of torch 2.11 can't shard bytes")


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    return nf4.unpack(nf4.pack(weight), nf4.PAIRS)


# --- a model


FLAGS = "--lora_rank 4 --lora_alpha 12 --base_dtype nf4"
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A tiny Llama whose layers have rows of 64 and 128 weights."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_llama(**WIDE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rounded_folder(folder, tokenizer, tmp_path_factory) -> Path:
    """The same model in float32, with weights that went through nf4 in its linear layers."""
    rounded = tmp_path_factory.mktemp("rounded")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for part in model.model.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight.copy_(round_trip(part.weight))
    model.save_pretrained(rounded)
    tokenizer.save_pretrained(rounded)
    return rounded


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    return collate(encode_all(records(6), tokenizer))


def load(folder: Path, world=None, dtype=torch.float32, flags: str = FLAGS, **options) -> Policy:
    args = train_dpo.parse_args(flags.split())
    read = lora.reading(frozen.reading(read_slices, args, dtype), args, dtype)
    return Policy.load(folder, world, dtype, read=read, **options)


def fill_adapters(policy: Policy) -> None:
    """Draws A and B, as if they had been trained."""
    generator = torch.Generator().manual_seed(0)
    for layer in lora.adapted(policy.model).values():
        for matrix in lora.matrices(layer):
            copy_rows(matrix, 0.1 * torch.randn(matrix.shape, generator=generator))


def _step(folder: Path, batch: Batch, flags: str, world=None) -> list[list[torch.Tensor]]:
    """Losses of a batch, and all gradients: in float32, in bfloat16, and there checkpointed."""
    found = []
    for dtype, checkpointing in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        policy = load(folder, world, dtype, flags, checkpointing=checkpointing)
        fill_adapters(policy)
        losses, _ = train_dpo.loss_of_batch(policy, lora.Base(policy), 0.1, 0.0, batch)
        losses.sum().backward()
        gradients = [full(p.grad) for p in policy.parameters() if p.requires_grad]
        found.append([losses.detach(), *gradients])
    return found


def _steps(folders: list[tuple[Path, str]], batch: Batch) -> list:
    world = setup()
    return [_step(folder, batch, flags, world) for folder, flags in folders]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=many_ranks)])
def test_a_step_is_that_of_the_dequantized_model(folder, rounded_folder, batch, ranks):
    """Losses and gradients are equal to those of LoRA on a model of the rounded weights."""
    both = [(folder, FLAGS), (rounded_folder, FLAGS.replace("--base_dtype nf4", ""))]
    if ranks == 1:
        packed, dense = (_step(folder, batch, flags) for folder, flags in both)
    else:
        outcome = run_ranks(ranks, _steps, both, batch)
        assert outcome.codes == [0] * ranks, outcome.stderr
        packed, dense = outcome.results[0]
    for found, expected in zip(packed, dense, strict=True):
        assert len(found) == len(expected) == 1 + 2 * 14
        assert found[0].std() > 0.01  # the adapters matter
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def _bytes(folder: Path) -> list[tuple[torch.dtype, int, bool, torch.Tensor]]:
    policy = load(folder, setup())
    weights = [layer.base_layer.weight for layer in lora.adapted(policy.model).values()]
    return [
        (w.dtype, w.to_local().numel(), isinstance(w, DTensor), w.full_tensor()) for w in weights
    ]


@many_ranks
def test_ranks_share_the_packed_bytes(folder):
    """Each rank packs its own rows; together they are those of one process."""
    outcome = run_ranks(2, _bytes, folder)
    assert outcome.codes == [0, 0], outcome.stderr
    policy = load(folder)
    alone = [layer.base_layer.weight for layer in lora.adapted(policy.model).values()]
    for mine, other, whole in zip(*outcome.results, alone, strict=True):
        assert mine[0] == torch.uint8 and mine[2]
        assert mine[1] == other[1] == whole.numel() / 2
        assert torch.equal(mine[3], whole)


def test_sizes_are_those_of_the_weights(folder):
    policy, dense = load(folder), Policy.load(folder)
    trained = policy.count_parameters(trainable=True)
    assert policy.count_parameters() == dense.count_parameters() + trained
    packed = [p for p in policy.parameters() if nf4.is_packed(p)]
    assert len(packed) == 14
    assert all(p.nbytes == len(p) * (33 * nf4.shape_of(p)[1] // 64 + 4) for p in packed)


# --- whole runs


@pytest.fixture(scope="module")
def train(tmp_path_factory, folder):
    """Runs train_dpo.main: 4 steps of all pairs. Returns (metrics, standard output)."""
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 25)

    def run(out: Path, *flags: object, ranks: int = 1) -> tuple[list[dict], str]:
        argv = ["--model", folder, "--data", pairs, "--out", out, "--batch_size", 25, "--lr", 3e-2,
                "--steps", 4, *FLAGS.split(), "--micro_batch_tokens", 800, *flags]  # fmt: skip
        outcome = run_ranks(ranks, without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0] * ranks, outcome.stderr
        return metrics_of(out), outcome.stdout

    return run


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory) -> tuple[list[dict], str, Path]:
    out = tmp_path_factory.mktemp("runs") / "two"
    return *train(out, ranks=2), out


@torch.no_grad()
@many_ranks
def test_what_is_saved_is_the_rounded_model_with_its_adapter(two_ranks, rounded_folder, batch):
    """The root is the function that was trained; peft makes it of the rounded base and adapter/."""
    metrics, _, out = two_ranks
    assert metrics[1]["rewards/chosen"] == metrics[1]["rewards/rejected"] == 0.0
    assert losses(metrics)[-1] < 0.6
    root = Policy.load(out)
    base = AutoModelForCausalLM.from_pretrained(rounded_folder)
    merged = peft.PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    assert torch.allclose(root(batch), Policy(merged.eval())(batch), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_loss_by_rounding_is_printed(train, folder, rounded_folder, tmp_path, tokenizer):
    """On held-out pairs: the mean of log p / tokens over responses, of both models, by hand."""
    pairs = write_pairs(tmp_path / "held.jsonl", 5, seed=1)
    flags = ("--steps", 1, "--eval_data", pairs, "--template", "raw")
    _, printed = train(tmp_path / "run", *flags)
    found = re.search(
        r"nf4 .* (-[\d.]+) -> (-[\d.]+); that of a response changes by ([\d.]+) .* of 10\)", printed
    )
    held = collate(encode_all(records(5, seed=1), tokenizer))
    before, after = (Policy.load(f)(held) / held.lengths for f in (folder, rounded_folder))
    expected = before.mean(), after.mean(), (after - before).square().mean().sqrt()
    assert [float(number) for number in found.groups()] == pytest.approx(
        [value.item() for value in expected], abs=1e-4
    )
    assert abs(before.mean() - after.mean()) > 1e-3  # there is something to see


@many_ranks
def test_resume_continues_on_any_number_of_ranks(train, two_ranks, tmp_path):
    """Both say the same about rounding, on as many responses."""
    _, printed = train(tmp_path / "run", "--stop_after", 2)
    metrics, _ = train(tmp_path / "run", "--resume")
    assert losses(metrics) == pytest.approx(losses(two_ranks[0]), rel=1e-5)
    (line,) = re.findall("nf4 .* by rounding, .*", printed)
    assert line in two_ranks[1]


def test_layers_without_adapters_are_rounded_too(train, rounded_folder, tmp_path):
    """They are written as the run computed with them."""
    train(tmp_path / "run", "--lora_targets", "q_proj", "--steps", 1)
    root = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(rounded_folder).state_dict().items():
        assert torch.equal(root[name], weight) == ("q_proj" not in name), name


def test_a_reward_model_is_that_of_the_rounded_body(folder, rounded_folder, tmp_path):
    """Its head is not packed. Metrics are those of LoRA on a model of the rounded weights."""
    pairs, found = write_pairs(tmp_path / "pairs.jsonl", 25), []
    for model, flags in ((folder, FLAGS), (rounded_folder, FLAGS.replace("--base_dtype nf4", ""))):
        argv = ["--model", model, "--data", pairs, "--out", tmp_path / model.name, "--steps", 2,
                "--batch_size", 25, *flags.split()]  # fmt: skip
        outcome = run_ranks(1, rm_without_picture, [str(arg) for arg in argv])
        assert outcome.codes == [0], outcome.stderr
        found.append(metrics_of(tmp_path / model.name))
        assert ("by rounding, mean reward" in outcome.stdout) == (model is folder)
    assert found[0] == found[1]


def test_a_reward_of_each_preference_is_reported(folder, tmp_path):
    """Rounding is measured over both rewards of 4 responses."""
    record = {"prompt": "p", "response_0": "a", "response_1": "bc", "better_response_id": 0,
              "safer_response_id": 1}  # fmt: skip
    lines = [json.dumps(record | {"prompt": f"p {n}"}) + "\n" for n in range(2)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    flags = f"{FLAGS} --eval_share 0 --steps 1 --preference better safer".split()
    argv = ["--model", folder, "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "run"]
    outcome = run_ranks(1, rm_without_picture, [*map(str, argv), *flags])
    assert outcome.codes == [0], outcome.stderr
    assert re.search(r"by rounding, mean reward .* \(root mean square of 8\)", outcome.stdout)


MIXTRAL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
           "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@torch.no_grad()
def test_a_mixture_of_experts_is_read_by_rank_0(batch, tokenizer, tmp_path):
    """Fused experts are no linear layers, and stay as they are."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mixtral"](vocab_size=259, **MIXTRAL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load(tmp_path, flags=f"{FLAGS} --lora_targets q_proj o_proj")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for part in model.model.layers.modules():
        if type(part) is torch.nn.Linear:
            part.weight.copy_(round_trip(part.weight))
    assert torch.equal(policy(batch), Policy(model.eval())(batch))
    assert sum(map(nf4.is_packed, policy.parameters())) == 4


# --- errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--base_dtype nf4", "--base_dtype needs --lora_rank"),
        ("--lora_rank 4 --base_dtype int8", "choose from"),
        ("--lora_rank 4 --base_dtype nf4 --precompute_reference", "is the rounded model"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(RunError, match=said):
        train_dpo.parse_args(flags.split())


def test_several_ranks_need_a_torch_that_shards_bytes(monkeypatch):
    flags = ["--lora_rank", "4", "--base_dtype", "nf4"]
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    train_dpo.parse_args(flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RunError, match=r"needs torch 2.12, because FSDP2 of 2.11.0\+cu130 can't"):
        train_dpo.parse_args(flags)


def test_models_that_can_not_be_packed(llama_folder, tokenizer, tmp_path):
    with pytest.raises(RunError, match="rows of 32 weights, no multiple of 64"):
        load(llama_folder)
    config = CONFIG_MAPPING["gpt2"](vocab_size=259, n_embd=64, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="GPT2LMHeadModel has no linear layers in its blocks"):
        load(tmp_path)
