"""Attention functions of transformers that follow a Tree (tree.py), where a batch has one.

A dense mask of all tokens would be quadratic in their number, and mostly empty. On a CPU each
prompt and each response is an attention of its own; on CUDA flex_attention skips empty blocks
(flex.py).

Shapes: T tokens of all rows, H heads of queries, G heads of keys and values, d their width. Of one
attention on a CPU: Q queries, K keys.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoalign.errors import RunError
from nanoalign.model import RERUN
from nanoalign.packing.flex import by_blocks
from nanoalign.packing.tree import Tree

PREFIX = "nanoalign_"  # of the names by which transformers finds these attention functions
# Queries times keys of a mask, at most; more are attended to in blocks of queries. By hand (True)
# each head has scores, too.
PLACES = {False: 2**22, True: 2**20}

QUERIES = (64, 1024)  # of a block: with fewer there are more calls, with more a window is sparse

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


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
        what = f"{type(model).__name__} has an attention of its own, which"
        if others:
            what = f"layers of the type '{others[0]}'"
        raise RunError(f"{what} can't keep the responses of a prompt apart; use --no-share_prefix")
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
    own: str,  # the name of the model's own attention
    tree: Tree | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,  # Gemma 2
    s_aux: Tensor | None = None,  # (H,) attention sinks: scores without a value (gpt-oss)
    **others: object,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: returns (1, T, H, d), and None for the weights.

    Without a tree it calls the model's own attention, which may return weights.
    """
    if tree is None:
        others |= {"scaling": scaling, "sliding_window": sliding_window}
        others |= {} if softcap is None else {"softcap": softcap}
        others |= {} if s_aux is None else {"s_aux": s_aux}
        return _own_attention(module, own)(module, query, key, value, attention_mask, **others)
    if query.is_cuda:
        out = by_blocks(query, key, value, tree, scaling, sliding_window, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    attend, by_hand = partial(_attend, scaling=scaling), softcap is not None or s_aux is not None
    if by_hand:
        attend = partial(attend_by_hand, scaling=scaling, softcap=softcap, sinks=s_aux)
    return _by_parts(query, key, value, tree, sliding_window, attend, by_hand), None


def _own_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # a function of the file that defines the model
        return sys.modules[type(module).__module__].eager_attention_forward
    return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[name]


# --- CPU: prompt by prompt and response by response -----------------------------------------------


def _by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    window: int | None,
    attend: Attend,
    by_hand: bool,
) -> Tensor:
    def attend_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        causal = queries == keys and (window is None or keys <= window)
        if queries * keys > PLACES[by_hand] and (by_hand or not causal):
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
    """One attention by torch: (1, H, Q, d).

    mask: (Q, K), added to scores; None: each query sees what precedes it, and torch makes no scores
        of all places.
    """
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def attend_by_hand(
    q: Tensor,  # (1, H, Q, d)
    k: Tensor,  # (1, G, K, d)
    v: Tensor,  # (1, G, K, d)
    mask: Tensor | None,  # (Q, K), added to scores; None: each query sees what precedes it
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:
    """One attention with capped scores (Gemma 2) or sinks (gpt-oss), which torch's own lacks.

    Returns (1, H, Q, d).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    scores = (scores + mask).float()
    if sinks is not None:
        sinks = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def by_queries(
    q: Tensor,  # (1, H, Q, d), those of the last Q of K tokens
    k: Tensor,  # (1, G, K, d)
    v: Tensor,  # (1, G, K, d)
    window: int | None,
    attend: Attend,  # takes queries, keys, values of a block, and its mask
    places: int,  # of a mask, about
) -> Tensor:
    """One attention, in blocks of its queries: (1, H, Q, d). Memory grows linearly with K.

    A mask of 16,000 queries and as many keys has 1 GB, and torch keeps it for the backward pass. A
    block has a mask of its own, which is dropped, and computed again in the backward pass. It sees
    the keys up to its own end, and with a sliding window none that all of its queries have left.
    """

    def attend_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = Tree([]).mask(q.shape[2], k.shape[2], window, q.dtype)  # of a Tree that is dropped
        return attend(q, k, v, mask)

    least, most = QUERIES
    before = k.shape[2] - q.shape[2]  # keys before the first query
    seen = k.shape[2] if window is None else min(k.shape[2], most + window)
    size = min(max(places // seen, least), most)
    out = []
    for start in range(0, q.shape[2], size):
        block = q[:, :, start : start + size]
        end = before + start + block.shape[2]
        keys = slice(0 if window is None else max(0, before + start - window + 1), end)
        out.append(checkpoint(attend_block, block, k[:, :, keys], v[:, :, keys], **RERUN))
    return torch.cat(out, dim=2)
