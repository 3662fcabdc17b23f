"""Attention of packed rows, which stand one behind the other in one sequence, without padding.

    row           0  0  0  0  0  0  0  0 | 1  1  1
    tokens       p0 p1 p2 c0 c1 c2 r0 r1 | p0 c0 r0
    position      0  1  2  3  4  5  3  4 | 0  1  1
    segment       0  0  0  1  1  1  2  2 | 0  1  2

    attends(q, k) = k <= q and row[q] == row[k] and (segment[k] == 0 or segment[k] == segment[q])

So a prompt is computed once for all of its responses, which do not see each other. A dense mask of
all tokens would be quadratic in their number, and mostly empty. On a CPU each prompt and each
response is a small attention of its own; on CUDA flex_attention skips empty blocks: see flex.py.

Shapes: T tokens of all rows, H heads of queries, G heads of keys and values, d their width.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

PREFIX = "nanoalign_"  # of the names by which transformers finds these attention functions
# Queries times keys of a mask, at most: else blocks.py. By hand (True) each head has scores too.
PLACES = {False: 2**22, True: 2**20}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Tree:
    """Which token of a packed sequence sees which, and the masks for it, each made once."""

    def __init__(self, rows: list[tuple[int, ...]]):
        self.rows = rows  # of each: tokens of the prompt, and of every response
        self.parts = [length for row in rows for length in row]
        self._masks: dict[tuple, Tensor] = {}
        self.block_masks: dict[int | None, object] = {}  # BlockMasks of flex.py, by window

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(queries, keys), added to scores: the last `queries` of `keys` tokens see what precedes.

        A sliding window is measured in positions, so a response sees as much of the prompt as it
        would alone.
        """
        key = (queries, keys, window, dtype)
        if key not in self._masks:
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            if window is not None:
                seen = seen.triu(keys - queries - window + 1)
            hidden = torch.zeros(queries, keys, dtype=dtype)
            self._masks[key] = hidden.masked_fill_(~seen, float("-inf"))
        return self._masks[key]


def use_tree_attention(model: "transformers.PreTrainedModel") -> None:
    """Lets a model read packed rows: its attention follows a Tree where it is given one.

    Without a Tree it stays the attention that the model had. Raises RunError for a model in which
    something else than attention joins tokens, or whose attention transformers cannot exchange.
    """
    own = model.config._attn_implementation
    if own.startswith(PREFIX):
        return
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others or not model._supports_attention_backend:
        from nanoalign.packing.refusals import unpackable

        raise unpackable(model, others)
    mask = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[own]
    transformers.AttentionInterface.register(PREFIX + own, partial(tree_attention, own=own))
    transformers.AttentionMaskInterface.register(PREFIX + own, mask)
    model.config._attn_implementation = PREFIX + own


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, d)
    attention_mask: Tensor | None,  # of the model's own attention
    own: str,  # name of that
    tree: Tree | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,  # Gemma 2
    s_aux: Tensor | None = None,  # (H,) attention sinks: scores without a value (gpt-oss)
    **others: object,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: (1, T, H, d), and no weights."""
    if tree is None:
        others |= {"scaling": scaling, "sliding_window": sliding_window}
        others |= {} if softcap is None else {"softcap": softcap}
        others |= {} if s_aux is None else {"s_aux": s_aux}
        return _own_attention(module, own)(module, query, key, value, attention_mask, **others)
    if query.is_cuda:
        from nanoalign.packing.flex import by_blocks

        out = by_blocks(query, key, value, tree, scaling, sliding_window, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    attend, by_hand = partial(_attend, scaling=scaling), softcap is not None or s_aux is not None
    if by_hand:
        from nanoalign.packing.by_hand import attend_by_hand

        attend = partial(attend_by_hand, scaling=scaling, softcap=softcap, sinks=s_aux)
    return _by_parts(query, key, value, tree, sliding_window, attend, by_hand), None


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # a function of the file that defines the model
        return sys.modules[type(module).__module__].eager_attention_forward
    return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[name]


# --- CPU: prompt by prompt and response by response -----------------------------------------------


def _by_parts(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, attend: Attend,
    by_hand: bool,
) -> Tensor:  # fmt: skip
    def attend_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        causal = queries == keys and (window is None or keys <= window)
        if queries * keys > PLACES[by_hand] and (by_hand or not causal):
            from nanoalign.packing.blocks import by_queries

            return by_queries(q, k, v, window, attend, PLACES[by_hand])
        return attend(q, k, v, None if causal else tree.mask(queries, keys, window, q.dtype))

    parts = zip(*(x.split(tree.parts, dim=2) for x in (query, key, value)), strict=True)
    out = []
    for row in tree.rows:
        _, prompt_keys, prompt_values = prompt = next(parts)
        out.append(attend_part(*prompt))
        for _ in row[1:]:
            q, k, v = next(parts)
            k, v = torch.cat([prompt_keys, k], dim=2), torch.cat([prompt_values, v], dim=2)
            out.append(attend_part(q, k, v))
    return torch.cat([part.transpose(1, 2) for part in out], dim=1)  # (1, T, H, d)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """No mask: each query sees what precedes it; torch then makes no scores of all places."""
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
