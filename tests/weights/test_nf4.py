"""python -m pytest tests/weights/test_nf4.py"""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanoalign.weights import nf4


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    return nf4.unpack(nf4.pack(weight), nf4.PAIRS)


def error(rounded: torch.Tensor, weight: torch.Tensor) -> float:
    return ((rounded.float() - weight).norm() / weight.norm()).item()


# --- the format


def test_levels_are_quantiles_of_the_normal_distribution():
    """Section 3 of the paper: 8 and 9 equally likely halves, with 0 in both; largest 1."""
    ends = 1 - (1 / 30 + 1 / 32) / 2  # the mean of the outermost probabilities of 15 and 16 levels
    above = torch.special.ndtri(torch.linspace(ends, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(ends, 0.5, 8, dtype=torch.float64))
    expected = torch.cat([below, above[:-1]]).sort().values / above.max()
    assert torch.allclose(nf4.LEVELS.double(), expected, atol=1e-6)


def test_two_blocks_by_hand():
    """Maxima 2 and 1/2: roots 255 and 255 / 2, which rounds to 128. 0.9 is nearest to 0.4407 * 2.

    (128 / 255)^2 * 2 = 0.50394 is the maximum of the second block then.
    """
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([2.0, -2.0, 0.0, 0.9])  # codes 15, 0, 7, 12
    row[0, 64] = -0.5  # code 0
    packed = nf4.pack(row)
    bytes_of_codes = [0xF0, 0x7C] + [0x77] * 30 + [0x07] + [0x77] * 31
    assert packed.tolist() == [bytes_of_codes + [255, 128] + list(struct.pack("<f", 2.0))]
    expected = torch.zeros(1, 128)
    expected[0, :4] = torch.tensor([2.0, -2.0, 0.0, 2 * 0.44070982933044434])
    expected[0, 64] = -2 * (128 / 255) ** 2
    assert torch.allclose(round_trip(row), expected, rtol=1e-6)
    assert nf4.columns(packed) == 128


def test_each_weight_gets_the_nearest_level():
    torch.manual_seed(0)
    row = torch.randn(3, 192)
    blocks = row.view(3, 3, 64)
    scaled = blocks / blocks.abs().amax(2, keepdim=True)
    nearest = (scaled[..., None] - nf4.LEVELS).abs().argmin(-1).view(3, 192)
    codes = nf4.pack(row)[:, :96]
    assert torch.equal(torch.stack([codes >> 4, codes & 15], 2).view(3, 192), nearest)


def test_maxima_are_within_the_error_that_is_promised():
    """A block whose maximum is 1/100 of the row's largest is off by at most 4 %."""
    blocks = torch.ones(200, 2, 64)
    blocks[:, 1] = torch.linspace(0.01, 1.0, 200)[:, None]
    rounded = round_trip(blocks.view(200, 128)).view(200, 2, 64)
    off = (rounded / blocks - 1).abs()
    assert not off[:, 0].any() and off[0, 1].max() <= 0.04 and off.max() <= 0.04
    assert (off[:, 1] <= 1.01 / 255 / blocks[:, 1].sqrt()).all()


def test_zeros_stay_and_what_is_not_finite_shows():
    weight = torch.randn(5, 128)
    weight[0], weight[1, :64] = 0.0, 0.0
    weight[2, 3], weight[3, 100] = math.nan, math.inf
    rounded = round_trip(weight)
    assert not rounded[0].any() and not rounded[1, :64].any() and rounded[1, 64:].any()
    assert not rounded[2].isfinite().any() and not rounded[3].isfinite().all()
    assert rounded[4].isfinite().all()


def weights_of(kind: str) -> torch.Tensor:
    draws = np.random.default_rng(0).standard_normal((256, 1024), dtype=np.float32)
    weight = 0.02 * torch.from_numpy(draws)
    if kind == "heavy tails":
        weight = 1000 * weight**3
    elif kind == "large columns":
        weight[:, 5] *= 100
    return weight


# Of bitsandbytes 0.50.2 on a CPU: SHA-256 of the codes that quantize_4bit returns, type nf4, and
# the relative error with maxima in float32 and doubly quantized. Where that package is installed,
# peft imports it in each run, which takes seconds; so it is none of requirements-dev.txt.
OF_BITSANDBYTES = {
    "normal": (
        "cbfe8f20952e5d5939809b25226e9f550ed85fa9cc96f30c9ad3964c83cef94b",
        0.09184140,
        0.09187029,
    ),
    "heavy tails": (
        "f40828220755bb3b81f16b521f6f9ce3b7f7a4c0a777edf86c285c304ce4c94f",
        0.10974162,
        0.11007818,
    ),
    "large columns": (
        "550d3a668c01ab68e6425d14d0334a932687d85e89c402635187550f19eb4932",
        0.07355130,
        0.07644911,
    ),
}


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    return packed[:, : nf4.columns(packed) // 2].flatten()


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_codes_are_those_of_bitsandbytes_and_maxima_not_worse(kind):
    """Its maxima of 8 bits are less their mean, in blocks of 256. Ours lose 1/5000 more at most."""
    digest, plain, double = OF_BITSANDBYTES[kind]
    weight = weights_of(kind)
    codes = codes_of(nf4.pack(weight))
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == digest
    assert plain < error(round_trip(weight), weight) < min(1.003 * plain, 1.0002 * double)


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_figures_of_bitsandbytes_are_its_own(kind):
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    weight = weights_of(kind)
    digest, *errors = OF_BITSANDBYTES[kind]
    for double, expected in zip((False, True), errors, strict=True):
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double
        )
        assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == digest
        found = error(functional.dequantize_4bit(codes, state), weight)
        assert found == pytest.approx(expected, rel=1e-5)


# --- a layer


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 6)
    layer.requires_grad_(False)
    nf4.PackedLinear.become(layer, torch.float32)
    return layer


def test_gradient_of_the_product(layer):
    """By finite differences, in float64."""
    x = torch.randn(2, 3, 128, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.double()
    product = lambda x: nf4.Product.apply(x, layer.weight, layer.pairs, bias)  # noqa: E731
    assert torch.autograd.gradcheck(product, x)


def test_a_layer_is_the_dense_layer_and_keeps_no_weights(layer):
    """Bit for bit, forward and backward; the graph holds packed bytes and nothing of out x n."""
    kept = []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert all(t.dtype == torch.uint8 or t.numel() < 6 * 128 for t in kept)
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    dense = F.linear(again, nf4.unpacked(layer.weight), layer.bias)
    dense.square().sum().backward()
    assert torch.equal(y, dense) and torch.equal(x.grad, again.grad)


def test_a_layer_compiles_as_one_graph(layer):
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    y = fast(x)
    assert torch.allclose(y, layer(x), atol=1e-6)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], gradient, atol=1e-6)
