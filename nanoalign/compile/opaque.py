"""Attention of packed rows inside of compiled blocks.

On CUDA the compiler takes flex_attention into its graph. On a CPU the attention of packed rows is a
loop over prompts and responses, of which the compiler would make a graph a batch. So there it is an
operator that the compiler does not look into, and that reads the rows from a tensor.

Shapes: T tokens of all rows, H heads of queries, G heads of keys and values, d their width.
"""

from functools import cache, lru_cache, partial

import torch
import transformers
from torch import Tensor, nn

from nanoalign.packing import flex
from nanoalign.packing.attention import PREFIX, tree_attention
from nanoalign.packing.tree import Tree

MARK = f"{PREFIX}compiled_"  # of the names of attention functions that compiled blocks call
BACKWARD = (
    "(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor rows, "
    "float? scaling, int? sliding_window, float? softcap) -> Tensor[]"
)
KEPT = 4  # rows of the last batches whose tensor, or whose masks, are kept


def use_compiled_attention(model: "transformers.PreTrainedModel") -> None:
    """Lets the blocks of a model that reads packed rows be compiled, in place.

    A model that reads padded rows has attention of transformers, which stays as it is.
    """
    name = model.config._attn_implementation
    if name.startswith(MARK) or not name.startswith(PREFIX):
        return
    define_operator()
    mask = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
    own = name.removeprefix(PREFIX)
    transformers.AttentionInterface.register(MARK + own, partial(attention, own=own))
    transformers.AttentionMaskInterface.register(MARK + own, mask)
    model.config._attn_implementation = MARK + own


def windows(model: "transformers.PreTrainedModel") -> set[int | None]:
    """The sliding windows of the layers of a model; None: a layer without one."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ("full_attention", "sliding_attention")
    window = getattr(config, "sliding_window", None)
    return {window if kind == "sliding_attention" else None for kind in kinds}


def seen(tree: Tree, windows: set[int | None], device: torch.device) -> Tree | Tensor:
    """What compiled blocks get in place of a Tree.

    On CUDA that is the Tree with its block masks, which are made here, outside of the graph; on a
    CPU a tensor of the rows.
    """
    if device.type == "cpu":
        return encode(tree)
    for window in windows - {*tree.block_masks}:
        tree.block_masks[window] = flex.block_mask(tree.rows, window, device)
    return tree


@lru_cache(KEPT)
def encode(tree: Tree) -> Tensor:
    """The rows of a tree as int64: of each row the number of its parts, and their tokens."""
    return torch.tensor([number for row in tree.rows for number in (len(row), *row)])


@lru_cache(KEPT)
def decode(numbers: bytes) -> Tree:
    """The Tree of the numbers that `encode` returns, as bytes."""
    left, rows = torch.frombuffer(bytearray(numbers), dtype=torch.int64).tolist(), []
    while left:
        count, *left = left
        rows.append(tuple(left[:count]))
        left = left[count:]
    return Tree(rows)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    own: str,
    tree: Tree | Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """packing.attention.tree_attention, whose arguments it has, for plain and compiled blocks."""
    if isinstance(tree, Tensor):
        op = torch.ops.nanoalign.tree_attention
        given = {name: options.get(name) for name in ("scaling", "sliding_window", "softcap")}
        return op(query, key, value, options.get("s_aux"), tree, **given), None
    return tree_attention(module, query, key, value, attention_mask, own, tree, **options)


@cache
def define_operator() -> None:
    """Defines the operator nanoalign::tree_attention, once in a process: (1, T, H, d).

    Its backward pass computes the attention again.
    """

    def attend(query, key, value, sinks, rows, scaling, sliding_window, softcap) -> Tensor:
        tree = decode(rows.numpy().tobytes())
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return tree_attention(None, query, key, value, None, "", tree, s_aux=sinks, **options)[0]

    @torch.library.custom_op("nanoalign::tree_attention", mutates_args=())
    def forward(
        query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rows: Tensor,
        scaling: float | None, sliding_window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        return attend(query, key, value, sinks, rows, scaling, sliding_window, softcap)

    @forward.register_fake
    def _(query, key, value, *rest) -> Tensor:
        heads, tokens = query.shape[1:3]
        return query.new_empty(1, tokens, heads, value.shape[3])

    # Not a custom_op, inside of which nothing has gradients.
    backward = "nanoalign::tree_attention_backward"
    torch.library.define(backward, BACKWARD)

    @torch.library.impl(backward, "cpu")
    def _(upstream, query, key, value, sinks, *options) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
        with torch.enable_grad():
            *states, sinks = given if sinks is not None else (*given, None)
            out = attend(*states, sinks, *options)
        return [x.contiguous() for x in torch.autograd.grad(out, given, upstream)]

    @torch.library.register_fake(backward)
    def _(upstream, query, key, value, sinks, *rest) -> list[Tensor]:
        given = (query, key, value, sinks)
        return [x.new_empty(x.shape) for x in given if x is not None]

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    def differentiate(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.nanoalign.tree_attention_backward(
            upstream, *ctx.saved_tensors, *ctx.options
        )
        return *found, *[None] * (8 - len(found))

    forward.register_autograd(differentiate, setup_context=keep)
