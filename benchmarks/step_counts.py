"""What the kernels of an optimizer step of DPO compute and move, counted: operations and bytes.

Products and attention are counted from the model's config and the lengths of the rows; element-wise
work of a plain block by running the block of transformers on tensors without data, of a compiled
one by the table in `fused`.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from plan import HH, draw

from nanoalign.batch import Row
from nanoalign.distributed import World
from nanoalign.packing.flex import BLOCK, seen_pairs
from nanoalign.packing.packed import PackedBatcher, operations
from nanoalign.packing.tree import spans

LONGEST = 1024  # --max_length
# Bytes of a logit in element-wise kernels, forward and backward. Compiled: a read; a read and a
# write. Plain: to float32 (6), the largest (4), minus it and exp (8 each), sum (4); to float32 (6),
# minus, exp, two factors (8 each), to bfloat16 twice (6 each).
OF_LOGIT = {True: (2, 4), False: (30, 50)}


class Shape:
    """Sizes of a model with gated linear units, such as Llama and Qwen, by its config.

    widths: of the residual stream, of all heads, of all key heads, inside of the linear unit.
    blocks: elements of the matrices of all blocks; head: of the head; parameters: of all matrices.
    """

    def __init__(self, config: transformers.PreTrainedConfig):
        self.config, self.layers, width = config, config.num_hidden_layers, config.hidden_size
        self.head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        inner = config.intermediate_size
        self.widths = width, heads * self.head_dim, keys * self.head_dim, inner
        self.blocks = self.layers * width * (2 * sum(self.widths[1:3]) + 3 * inner)
        self.head = config.vocab_size * width
        self.parameters = self.blocks + self.head * (1 if config.tie_word_embeddings else 2)
        # As packing.packed.operations takes them.
        self.costs = self.blocks, self.head, 2 * self.widths[1] * self.layers


@dataclass(frozen=True)
class Run:
    """What a run is given."""

    gpu: str = "h200"
    gpus: int = 1
    shards: int = 1  # GPUs that share one copy: --shard_size
    pairs: int = 64  # --batch_size
    tokens: int = 16384  # --micro_batch_tokens
    compiled: bool = True
    checkpointing: bool = False


@dataclass(frozen=True)
class Kernels:
    """All kernels of a step that do the same, on one GPU."""

    kind: str
    name: str
    operations: float = 0.0
    bytes: float = 0.0


def micro_batches(shape: Shape, run: Run) -> np.ndarray:
    """Of each round, of the rank with the most work: tokens, scored tokens, pairs, blocks: (n, 4).

    pairs: of a query and a key that it sees. blocks: of 128 queries and 128 keys, of which at least
    a pair is seen. Rows have the lengths of HH-RLHF.
    """
    lengths, found = draw((*HH, LONGEST), run.pairs, seed=0), []
    rows = [
        Row("", np.zeros(p, np.int32), (np.zeros(c, np.int32), np.zeros(r, np.int32)))
        for p, c, r in lengths.T
    ]
    batcher = PackedBatcher(World(0, run.gpus, torch.device("cpu"), None), run.tokens)
    batcher.costs, work = shape.costs, operations(lengths, shape.costs)
    for groups in batcher.plan(rows):
        own = lengths[:, max(groups, key=lambda group: work[group].sum())]
        blocks = (seen_pairs(spans([tuple(row) for row in own.T], None)) > 0).sum()
        found.append((own.sum(), own[1:].sum(), operations(own, (0, 0, 1)).sum(), blocks))
    return np.array(found)


def kernels(shape: Shape, run: Run) -> list[Kernels]:
    """All kernels of a step on one GPU: the slowest rank's."""
    counts = micro_batches(shape, run)
    batches, (tokens, scored, _, visited) = len(counts), counts.sum(0).tolist()
    (d, q, k, i), forwards = shape.widths, 3 if run.checkpointing else 2
    moved = 2 * shape.layers * (4 * d + 2 * q + 2 * k + 3 * i)  # bytes a token, in and out
    logits = scored * shape.config.vocab_size
    forward, backward = fused(shape) if run.compiled else plain(shape)
    of_forward, of_backward = OF_LOGIT[run.compiled]
    # One rank: to bfloat16 and the gradient to float32, added to that of earlier micro-batches.
    # Several: copies out of what is gathered, three times, and of the gradient into what is sent.
    of_parameter = 18 * batches if run.gpus > 1 else 12 * batches + 12 * (batches - 1)
    of_attention = 4 * BLOCK**2 * q * shape.layers * visited  # operations of a forward
    weights = shape.blocks * batches
    product, element_wise = "products", "element-wise"
    return [
        Kernels(product, "blocks, forward", 2 * forwards * shape.blocks * tokens,
                forwards * (2 * weights + moved * tokens)),
        Kernels(product, "blocks, backward", 4 * shape.blocks * tokens,
                4 * weights + 2 * moved * tokens),
        # Logits of the reference, of the policy, again in its backward pass, and two gradients.
        Kernels(product, "head", 10 * shape.head * scored, 10 * (shape.head * batches + logits)),
        Kernels("attention", "forward", forwards * of_attention),
        Kernels("attention", "backward", 2.5 * of_attention),
        Kernels(element_wise, "blocks, forward", 0, forwards * forward * shape.layers * tokens),
        Kernels(element_wise, "blocks, backward", 0, backward * shape.layers * tokens),
        Kernels(element_wise, "head", 0, (2 * of_forward + of_backward) * logits),
        Kernels(element_wise, "casts, copies of shards", 0, of_parameter * shape.parameters),
        Kernels(element_wise, "clipping", 0, 12 * shape.parameters / run.shards),
        # Reads a parameter, its gradient and two moments, writes three of them.
        Kernels("optimizer", "AdamW", 0, 28 * shape.parameters / run.shards),
    ]  # fmt: skip


def fused(shape: Shape) -> tuple[int, int]:
    """Bytes a token that the element-wise kernels of a compiled block move: (forward, backward).

    The kernels are those that inductor (torch 2.13) makes of a block of Qwen2. What it recomputes
    in the backward pass, and so does not write, are the norms and the sum after attention.
    """
    d, q, k, i = (2 * width for width in shape.widths)  # bytes of a value in bfloat16
    forward = {
        "first norm: reads its input, writes": 2 * d,
        "rotation of queries and keys": 2 * (q + k),
        "sum after attention, second norm: reads both terms, writes": 3 * d,
        "gate": 3 * i,
        "sum at the end: reads three terms, writes": 4 * d,
    }
    backward = {
        "gate: reads three, writes two gradients": 5 * i,
        "second norm": 6 * d,
        "sums of attention's output times its gradient, by flex_attention": 2 * q,
        "rotation of queries and keys": 2 * (q + k),
        "first norm": 6 * d,
        "gradients of the weights of both norms": 7 * d,
    }
    return sum(forward.values()), sum(backward.values())


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations other than products read and write; views move none."""

    bytes = 0
    FREE = ("aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::empty_like")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out, returned = operation(*args, **(kwargs or {})), operation._schema.returns
        is_view = returned and returned[0].alias_info and not returned[0].alias_info.is_write
        is_product = operation.overloadpacket in flop_registry
        if not (is_view or is_product or operation._schema.name in self.FREE):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            # What is expanded has fewer elements in memory, what is sliced more.
            sizes = ((x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)
            self.bytes += sum(map(min, sizes))
        return out


class NoAttention(torch.autograd.Function):
    """Has the shapes of attention."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.shapes = query.shape, key.shape, value.shape
        return query.new_empty(query.shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(upstream.new_empty(shape) for shape in ctx.shapes)


def plain(shape: Shape, tokens: int = 1000) -> tuple[float, float]:
    """As `fused`, for a block of transformers that is not compiled."""

    def attend(block, query, key, value, mask, **options) -> tuple[Tensor, None]:
        return NoAttention.apply(query, key, value), None

    transformers.AttentionInterface.register("none", attend)
    config = copy.deepcopy(shape.config)
    config._attn_implementation = "none"
    with torch.device("meta"):
        body = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16).requires_grad_()
        rotations = body.rotary_emb(hidden, torch.zeros(1, tokens, dtype=torch.long))
        with Traffic() as forward:
            out = body.layers[0](hidden, position_embeddings=rotations, attention_mask=None)
        with Traffic() as backward:
            out.backward(torch.empty_like(out))
    return forward.bytes / tokens, backward.bytes / tokens
