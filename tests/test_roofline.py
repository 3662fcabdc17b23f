"""python -m pytest tests/test_roofline.py

benchmarks/roofline.py: its counts by hand and by torch's own counter, its times by known profiles.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from nanoalign.logps import Head, chunked_token_logps

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import roofline
import step_counts
from shapes import SHAPES
from step_counts import Run, Shape, Traffic, kernels, micro_batches

QWEN = Shape(SHAPES["qwen2.5-0.5b"])


def of_name(shape: Shape, run: Run) -> dict[tuple[str, str], step_counts.Kernels]:
    return {(each.kind, each.name): each for each in kernels(shape, run)}


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizes_of_a_shape_are_those_of_the_model(name):
    shape = Shape(SHAPES[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name])
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2}
    assert sum(matrices.values()) == shape.parameters
    assert sum(size for n, size in matrices.items() if ".layers." in n) == shape.blocks
    assert model.model.layers[0].self_attn.q_proj.out_features == shape.widths[1]


def test_the_counts_of_a_small_step_by_hand():
    """Two pairs on one GPU, one micro-batch. D 4, 2 heads and 1 key head of width 2, inner 6, V 10.

    A block has 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 = 120 elements, the head 40.
    """
    config = transformers.LlamaConfig(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6,
        num_hidden_layers=3, vocab_size=10, tie_word_embeddings=True, head_dim=2,
    )  # fmt: skip
    shape, run = Shape(config), Run(pairs=2)
    assert (shape.blocks, shape.head, shape.parameters) == (360, 40, 400)
    ((tokens, scored, pairs, blocks),) = micro_batches(shape, run).tolist()
    assert scored < tokens and blocks >= -(-tokens // 128)
    assert tokens**2 / 8 < pairs < tokens**2 / 2
    found = of_name(shape, run)
    assert found["products", "blocks, forward"].operations == 2 * 2 * 360 * tokens
    assert found["products", "blocks, backward"].operations == 2 * 2 * 360 * tokens
    assert found["products", "head"].operations == 5 * 2 * 40 * scored
    # Two products of 128 x 2 and 2 x 128 for each head, layer and block; five in the backward pass.
    assert found["attention", "forward"].operations == 2 * 2 * (2 * 128 * 128 * 2) * 2 * 3 * blocks
    assert found["attention", "backward"].operations == 5 * (2 * 128 * 128 * 2) * 2 * 3 * blocks
    # Of two bytes. Norms, rotations, gate and sums, as listed in `fused`.
    assert step_counts.fused(shape) == (2 * (36 + 12 + 18), 2 * (76 + 8 + 12 + 30))
    assert found["element-wise", "blocks, forward"].bytes == 2 * 132 * 3 * tokens
    assert found["element-wise", "head"].bytes == (2 + 2 + 4) * 10 * scored
    assert found["optimizer", "AdamW"].bytes == 28 * 400
    again = of_name(shape, replace(run, checkpointing=True))
    assert again["products", "blocks, forward"].operations == 3 * 2 * 360 * tokens
    halves = of_name(shape, replace(run, gpus=2, shards=2))
    assert halves["optimizer", "AdamW"].bytes == 28 * 400 / 2


def test_operations_are_those_that_torch_counts():
    """Of a small Llama without attention, and of the head that runs, forward and backward."""
    step_counts.plain(shape := Shape(tiny_llama().config), tokens=1)  # registers "none"
    model = tiny_llama()
    model.config._attn_implementation = "none"
    hidden = torch.randn(1, 7, shape.widths[0], requires_grad=True)
    rotations = model.model.rotary_emb(hidden, torch.arange(7)[None])
    out, counted = hidden, []
    with FlopCounterMode(display=False) as counter:
        for block in model.model.layers:
            out = block(out, position_embeddings=rotations, attention_mask=None)
    counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    counted.append(counter.get_total_flops())

    head = Head(torch.randn(shape.config.vocab_size, shape.widths[0], requires_grad=True))
    states, targets = torch.randn(5, shape.widths[0], requires_grad=True), torch.arange(5)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            chunked_token_logps(states, head, targets, 16)  # of the reference
        chunked_token_logps(states, head, targets, 16).sum().backward()
    counted.append(counter.get_total_flops())

    run = Run(pairs=3)
    ((tokens, scored, *_),) = micro_batches(shape, run).tolist()
    found = of_name(shape, run)
    assert found["products", "blocks, forward"].operations == 2 * counted[0] / 7 * tokens
    assert found["products", "blocks, backward"].operations == counted[1] / 7 * tokens
    assert found["products", "head"].operations == counted[2] / 5 * scored


def test_bytes_of_operations_by_hand():
    """Views and products move none; what is expanded is read once."""
    x, one = torch.zeros(10), torch.zeros(1)
    with Traffic() as traffic:
        x * 2
    assert traffic.bytes == 40 + 40
    with Traffic() as traffic:
        x.view(2, 5).t(), torch.zeros(2, 3).new_empty(4)
    assert traffic.bytes == 2 * 3 * 4  # of zeros, written
    with Traffic() as traffic:
        one.expand(10) + x
    assert traffic.bytes == 4 + 40 + 40
    with Traffic() as traffic:
        x[:, None] @ x[None]
    assert traffic.bytes == 0


def test_bytes_of_a_logit_are_those_of_the_head_that_runs():
    """Many logits for a width of 2, so that nothing else counts.

    Traffic sees logsumexp as one read (4 bytes) in place of largest, minus, exp and sum (24), and
    all logits where gather reads some of them (4) and scatter_add_ changes some (8).
    """
    weight, hidden = torch.randn(8192, 2).bfloat16(), torch.randn(256, 2).bfloat16()
    head = Head(weight.requires_grad_())
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        with Traffic() as traffic:
            logps = chunked_token_logps(hidden.requires_grad_(), head, torch.arange(256), 8192)
        found.append(traffic.bytes / (256 * 8192))
        with Traffic() as traffic:
            logps.sum().backward()
        found.append(traffic.bytes / (256 * 8192))
    forward, backward = step_counts.OF_LOGIT[False]
    assert found == pytest.approx([forward - 24 + 4 + 4, backward + 8], rel=0.01)


def test_times_are_those_of_known_profiles(monkeypatch):
    """To 15 %: kernels of a plain step on an H100, and what is known of a compiled one on an H200.

    The figures are those of benchmarks/RESULTS.md. Element-wise: products by element, copies, exp,
    and others. The compiled step had torch's own four warps.
    """
    found = roofline.estimate(QWEN, Run("h100", compiled=False))
    ms = {"products": 59, "attention": 24 + 12, "element-wise": 36 + 29 + 6.6 + 57,
          "optimizer": 5.2, "GPU": 229}  # fmt: skip
    assert {kind: 1e3 * found[kind] for kind in ms} == pytest.approx(ms, rel=0.15)
    monkeypatch.setattr(roofline, "EIGHT_WARPS", roofline.ATTENTION["forward"])
    found = roofline.estimate(QWEN, Run("h200"))
    assert found["products"] / found["GPU"] == pytest.approx(0.23 / 0.51, rel=0.15)
    assert found["step"] < 0.1511


@pytest.mark.parametrize("compiled, gigabytes", [(True, 25.9), (False, 33.6)])
def test_memory_is_that_of_known_steps(compiled, gigabytes):
    fixed, of_token = roofline.memory(QWEN, run := Run(compiled=compiled))
    tokens = micro_batches(QWEN, run)[0, 0]
    assert (fixed + of_token * tokens) / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_the_network_by_hand():
    """8 GPUs of a host at 360 GB/s: copies send 2 * 7/8 of the gradients once, shards everything.

    A micro-batch gathers the blocks three times and the rest twice in bfloat16, and reduces all in
    float32; each byte comes from 7 of 8 GPUs, each of 4 * 24 + 3 times in 7 hops.
    """
    copies = roofline.network(QWEN, Run(gpus=8, shards=1), batches=3)
    assert copies == pytest.approx(2 * 7 / 8 * 4 * QWEN.parameters / 360e9)
    sent = 2 * (3 * QWEN.blocks + 2 * QWEN.head) + 4 * QWEN.parameters
    shards = roofline.network(QWEN, Run(gpus=8, shards=8), batches=1)
    assert shards == pytest.approx(7 / 8 * sent / 360e9 + 99 * 7 * 2e-6)
    assert roofline.network(QWEN, Run(), batches=1) == 0


def test_a_profile_stands_beside(tmp_path):
    names = "nvjet_tst_128x256", "triton_tem_fused_flex_attention_1", "FusedAdamMathFunctor", "x"
    assert [*map(roofline.kind_of, names)] == [*("products", "attention"), "optimizer",
                                               "element-wise"]  # fmt: skip
    measured = {"products": 61.25, "attention": 30.5, "element-wise": 20.0, "optimizer": 4.0}
    steps = [{"name": "rm", "error": "x"}, {"name": "p", "figures": {"ms of kinds": measured}}]
    (path := tmp_path / "gpu_check.json").write_text(json.dumps({"steps": steps}))
    assert roofline.measured(path) == measured
    lines = roofline.waterfall(QWEN, Run(), measured)
    assert any(line.startswith("| **products** |") and line.endswith("| 61.25 |") for line in lines)
    assert any(line.startswith("| **GPU** |") and line.endswith("| 115.8 |") for line in lines)
    path.write_text(json.dumps({"steps": steps[:1]}))
    with pytest.raises(SystemExit, match="has no profile"):
        roofline.measured(path)


def test_what_fits_and_what_is_advised():
    """8B on one GPU does not fit: 18 bytes a parameter. Few pairs on 8 GPUs wait for the host."""
    large = Shape(SHAPES["llama-3.1-8b"])
    assert roofline.most_tokens(large, Run()) < 0 < roofline.most_tokens(large, Run(shards=8))
    assert roofline.advised(large, 1, 64)[-1] == "`--lora_rank 16`"
    assert roofline.advised(QWEN, 8, 64)[3].startswith("host")
    assert roofline.advised(QWEN, 1, 64)[3].startswith("products")
