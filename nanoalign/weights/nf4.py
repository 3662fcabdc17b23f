"""Frozen weights in 4 bits: NormalFloat (NF4) of QLoRA, Dettmers et al. 2023, arXiv 2305.14314.

A weight is stored as a code of 4 bits: the place of the nearest one of 16 fixed levels in [-1, 1].
Trained weights look like draws of a normal distribution, so the levels are quantiles of it: each is
the nearest one to about as many weights, and less is lost than by 16 equal steps. A row of a matrix
is cut into blocks of 64 weights, and each block is divided by its largest absolute value, the
maximum of the block. If that is 0.04, the largest of its row, a weight of 0.013 is 0.325 of it; the
nearest level is LEVELS[11] = 0.338, so the code is 11, and the weight is read as 0.338 * 0.04 =
0.0135:

    weight  is read as  LEVELS[code] * maximum       code in 0..15, LEVELS[code] in [-1, 1]
    maximum is read as  (root / 255)^2 * largest     root in 0..255, largest maximum of the row

The second line is the paper's double quantization: a maximum takes 8 bits in place of 32. A row of
n weights is these bytes, one behind the other, 4.125 bits a weight and 4 bytes a row:

    n / 2     the codes, two in a byte, the first one in its upper half
    n / 64    the roots, one for each block
    4         the largest maximum, a float32

The paper subtracts the mean of the maxima and stores the rest in an 8-bit type, in blocks of 256
maxima across rows. Here a row stands for itself, so that each rank packs and keeps its own rows.
The square root spends codes on small maxima: one that is 1/100 of the row's largest is off by at
most 4 %; in equal steps, 20 %. A block whose maximum is below 3.8e-6 of the largest becomes 0.

Shapes: a linear layer computes y = x W^T + b with W (out, n), x (..., n) and y (..., out).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BLOCK = 64  # weights that share a maximum
BYTES = BLOCK // 2 + 1  # of a block: codes and root
# Appendix E of the paper. 0 is a level, so that a weight of 0 stays 0.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# The levels of the two codes of a byte, for each of 256 bytes: two float32, which are looked up as
# one number of 8 bytes.
PAIRS = torch.cartesian_prod(LEVELS, LEVELS).view(torch.int64).flatten()
SMALLEST = torch.finfo(torch.float32).tiny  # in place of the maximum of a block of zeros


# --- the format -----------------------------------------------------------------------------------


def pack(weight: Tensor) -> Tensor:
    """Rounds a matrix to 4 bits: (out, n) floating-point -> (out, 33 / 64 * n + 4) uint8.

    n is a multiple of 64. A row with a weight that is NaN or infinite becomes NaN.
    """
    blocks = weight.float().unflatten(1, (-1, BLOCK))  # (out, n / 64, 64)
    maxima = blocks.abs().amax(2)  # (out, n / 64)
    scaled = blocks / maxima.clamp(min=SMALLEST)[..., None]  # in [-1, 1]
    borders = (LEVELS[1:] + LEVELS[:-1]).to(weight.device) / 2  # so that the nearest level is taken
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8).flatten(1)
    largest = maxima.amax(1, keepdim=True)  # (out, 1)
    roots = (255 * (maxima / largest.clamp(min=SMALLEST)).sqrt()).round().to(torch.uint8)
    return torch.cat([(codes[:, ::2] << 4) | codes[:, 1::2], roots, largest.view(torch.uint8)], 1)


def unpack(packed: Tensor, pairs: Tensor) -> Tensor:
    """The matrix of `pack`, rounded: (out, 33 / 64 * n + 4) uint8 -> (out, n) float32.

    pairs: PAIRS, on the device of `packed`.
    """
    out, n = len(packed), columns(packed)
    codes, roots, largest = packed.split([n // 2, n // BLOCK, 4], 1)
    largest = largest.clone(memory_format=torch.contiguous_format)  # 4 bytes are read as one number
    largest = largest.view(torch.float32)  # (out, 1)
    maxima = (roots.float() / 255).square() * largest  # (out, n / 64)
    levels = pairs.index_select(0, codes.int().flatten()).view(torch.float32)
    return levels.view(out, n // BLOCK, BLOCK).mul_(maxima[..., None]).view(out, n)


def columns(packed: Tensor) -> int:
    """n of packed bytes, (out, 33 / 64 * n + 4)."""
    return (packed.shape[1] - 4) // BYTES * BLOCK


# --- parameters, which may be sharded -------------------------------------------------------------


def is_packed(tensor: Tensor) -> bool:
    """Whether a parameter or buffer of a model is a packed weight."""
    return isinstance(tensor, nn.Parameter) and tensor.dtype == torch.uint8


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a parameter or buffer; (out, n) of a packed weight."""
    return torch.Size((len(tensor), columns(tensor))) if is_packed(tensor) else tensor.shape


def unpacked(tensor: Tensor) -> Tensor:
    """A parameter or buffer as it is, or a packed weight in float32, sharded in the same way."""
    if not is_packed(tensor):
        return tensor
    if not isinstance(tensor, DTensor):
        return unpack(tensor, PAIRS.to(tensor.device))
    rows, shape = tensor.to_local(), shape_of(tensor)
    return DTensor.from_local(
        unpack(rows, PAIRS.to(rows.device)), tensor.device_mesh, tensor.placements,
        shape=shape, stride=(shape[1], 1),
    )  # fmt: skip


# --- layers ---------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """y = x W^T + b of a packed W: (..., n) -> (..., out).

    W is unpacked for this product, and again for that of the backward pass, dx = dy W, and is not
    kept. Neither W nor b gets a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, pairs)
        return F.linear(x, unpack(packed, pairs).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return upstream @ unpack(*ctx.saved_tensors).to(upstream.dtype), None, None, None


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed; `become` makes one of a plain layer.

    It computes in `dtype`. stored: None, or a function that reads the weight as the files store it,
    (out, n); then the layer computes with that weight, unrounded.
    """

    dtype: torch.dtype
    stored: Callable[[], Tensor] | None

    @staticmethod
    def become(layer: nn.Linear, dtype: torch.dtype) -> None:
        """Packs the weight of a linear layer in place.

        On the meta device this sets the shape; slices.copy_rows packs the values as it reads them.
        """
        layer.__class__ = PackedLinear  # the same object: adapters and files refer to it
        layer.weight = nn.Parameter(pack(layer.weight.detach()), requires_grad=False)
        layer.register_buffer("pairs", PAIRS.clone(), persistent=False)
        layer.dtype, layer.stored = dtype, None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.stored:
            return F.linear(x, self.stored().to(x), self.bias)
        return Product.apply(x, self.weight, self.pairs, self.bias)
