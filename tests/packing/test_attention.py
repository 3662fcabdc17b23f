"""python -m pytest tests/packing/test_attention.py"""

from functools import partial

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from nanoalign.packing import attention
from nanoalign.packing.attention import tree_attention
from nanoalign.packing.flex import by_blocks
from nanoalign.packing.tree import Tree, coordinates

ROWS = [
    (3, 3, 2),
    (1, 1, 1),
    (5,),
    (2, 4, 1, 3),
    (0, 2, 3),
]  # two pairs, a prompt alone, three ranked responses, two without a common prompt
TOKENS = sum(map(sum, ROWS))
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def dense_mask(tree: Tree, window: int | None) -> torch.Tensor:
    """The oracle: the definition, of all tokens at once."""
    row, segment, position = map(torch.tensor, coordinates(tree.rows))
    index = torch.arange(len(row))
    seen = (index[:, None] >= index[None, :]) & (row[:, None] == row[None, :])
    seen &= (segment[None, :] == 0) | (segment[:, None] == segment[None, :])
    if window is not None:
        seen &= position[:, None] - position[None, :] < window
    return seen


def dense_attention(query, key, value, seen, scaling, softcap=None, sinks=None):
    """The oracle: one softmax over all tokens, in float64."""
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    return (weights / total @ value).transpose(1, 2)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def test_coordinates_by_hand():
    row, segment, position = coordinates([(3, 3, 2), (1, 1, 1)])
    assert row == [0] * 8 + [1] * 3
    assert segment == [0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 2]
    assert position == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 1]


def test_the_oracle_by_hand():
    """p0 p1 | c0 | r0, and a prompt. With a window of 2, r0 at position 2 sees p1 but not p0."""
    tree = Tree([(2, 1, 1), (1,)])
    assert dense_mask(tree, None).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert dense_mask(tree, 2)[3].int().tolist() == [0, 1, 0, 1, 0]


def test_a_response_sees_its_prompt_and_what_precedes_it():
    """The last 2 of 5 tokens, to be added to scores; then with a window of 3."""
    hidden = float("-inf")
    tree = Tree(ROWS)
    assert tree.mask(2, 5, None, torch.float32).tolist() == [[0, 0, 0, 0, hidden], [0] * 5]
    windowed = [[hidden, 0, 0, 0, hidden], [hidden, hidden, 0, 0, 0]]
    assert tree.mask(2, 5, 3, torch.float32).tolist() == windowed


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_by_parts_and_by_blocks_equal_the_dense_one(states, window, softcap, with_sinks):
    """By parts (CPU): values and gradients. By blocks (CUDA): values; no gradient on a CPU."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if with_sinks else None
    tree, scaling = Tree(ROWS), 0.7
    options = (window, softcap, sinks)
    cotangent = torch.linspace(-1, 1, TOKENS * HEADS * WIDTH, dtype=torch.float64)
    results = []
    for way in ("dense", "parts"):
        inputs = [x.clone().requires_grad_() for x in states]
        if way == "dense":
            out = dense_attention(*inputs, dense_mask(tree, window), scaling, softcap, sinks)
        else:
            out, _ = tree_attention(None, *inputs, None, "sdpa", tree, scaling, *options)
        out.flatten().dot(cotangent).backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    # With soft caps or sinks the softmax is computed in float32, as in transformers.
    tolerance = 1e-10 if softcap is None and sinks is None else 1e-5
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        found = by_blocks(*states, tree, scaling, *options).transpose(1, 2)
    assert torch.allclose(found, results[0][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_are_scaled_by_the_width_of_a_head_where_a_model_names_no_scale(states, softcap):
    found, expected = (
        tree_attention(None, *states, None, "sdpa", Tree(ROWS), scaling, softcap=softcap)[0]
        for scaling in (None, WIDTH**-0.5)
    )
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("more", [{}, {"softcap": 1.5}, {"s_aux": torch.zeros(HEADS)}])
def test_without_a_tree_the_models_own_attention_gets_what_it_was_given(states, more):
    calls = []

    def own(module, *given, **options):
        calls.append((module, given, options))
        return "output", "weights"

    transformers.AttentionInterface.register("own_of_a_test", own)
    given = (*states, "mask")
    options = {"scaling": 0.7, "sliding_window": 4, "dropout": 0.0} | more
    found = tree_attention("module", *given, own="own_of_a_test", **options)
    assert found == ("output", "weights") and calls == [("module", given, options)]


def test_masks_are_made_once():
    tree = Tree(ROWS)
    assert tree.mask(2, 5, None, torch.float32) is tree.mask(2, 5, None, torch.float32)


def test_parts_are_attended_to_alone(states):
    """No score of two different rows is computed: nan in one row changes no bit of another."""
    query, key, value = states
    tree = Tree(ROWS)
    before, _ = tree_attention(None, query, key, value, None, "sdpa", tree)
    first = sum(ROWS[0])
    key[:, :, :first], value[:, :, :first] = float("nan"), float("nan")
    after, _ = tree_attention(None, query, key, value, None, "sdpa", tree)
    assert torch.equal(before[:, first:], after[:, first:]) and after[:, :first].isnan().all()


# --- long parts -----------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Every part is long, and blocks have 1 to 3 queries."""
    monkeypatch.setattr(attention, "PLACES", {False: 5, True: 5})
    monkeypatch.setattr(attention, "QUERIES", (1, 3))


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (1.5, False), (None, True)])
def test_long_parts_equal_the_dense_attention(states, small_blocks, window, softcap, with_sinks):
    """In values and in gradients, of the sinks too, and without a gradient."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if with_sinks else None
    tree, scaling = Tree(ROWS), 0.7
    cotangent = torch.linspace(-1, 1, TOKENS * HEADS * WIDTH, dtype=torch.float64)
    seen = dense_mask(tree, window)
    results = []
    for attend in (
        lambda *inputs, sinks=None: dense_attention(*inputs, seen, scaling, softcap, sinks),
        lambda *inputs, sinks=None: tree_attention(
            None, *inputs, None, "sdpa", tree, scaling, window, softcap, sinks
        )[0],
    ):
        inputs = [x.clone().requires_grad_() for x in states]
        options = {} if sinks is None else {"sinks": sinks.clone().requires_grad_()}
        out = attend(*inputs, **options)
        out.flatten().dot(cotangent).backward()
        with torch.no_grad():
            assert torch.equal(attend(*inputs, **options), out)
        results.append([out.detach(), *(x.grad for x in (*inputs, *options.values()))])
    # With soft caps or sinks the softmax is computed in float32.
    tolerance = 1e-10 if softcap is None and sinks is None else 1e-5
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_an_answer_of_usual_length_is_one_attention(monkeypatch, softcap):
    """Of 500 tokens behind 300: in blocks of 64 queries it would be 8 calls."""
    calls = []
    for name in ("_attend", "attend_by_hand"):
        own = getattr(attention, name)
        counted = lambda *a, own=own, **more: calls.append(len(a)) or own(*a, **more)  # noqa: E731
        monkeypatch.setattr(attention, name, counted)
    states = [torch.randn(1, 1, 800, 1) for _ in range(3)]
    tree_attention(None, *states, None, "sdpa", Tree([(300, 500)]), softcap=softcap)
    assert len(calls) == 2  # of the prompt, and of the answer


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_memory_grows_linearly_with_the_tokens_of_a_response(monkeypatch, window, softcap):
    """Of what is kept for the backward pass, and of the largest tensor of both passes.

    One key head of width 1: a mask of all places would be by far the largest tensor.
    """
    monkeypatch.setattr(attention, "PLACES", {False: 2**12, True: 2**12})
    monkeypatch.setattr(attention, "QUERIES", (4, 16))

    def measure(tokens: int) -> tuple[int, int]:
        states = [torch.randn(1, 1, tokens + 30, 1, requires_grad=True) for _ in range(3)]
        kept = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
            return x

        attend = partial(tree_attention, None, own="sdpa", tree=Tree([(30, tokens)]))
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out, _ = attend(*states, None, sliding_window=window, softcap=softcap)
            out.sum().backward()
        return sum(kept.values()), largest.elements

    (kept, largest), (kept_of_4, largest_of_4) = measure(500), measure(2000)
    assert kept_of_4 < 4.2 * kept < 4.2 * 30 * 530
    assert largest <= 2**13 and largest_of_4 <= 2**13 + 4 * 2030
