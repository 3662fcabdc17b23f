"""python -m pytest tests/compile/test_compiled_parts.py

The parts of compiled models, not compiled: the kernels of the head, the operator of attention.
"""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from torch import Tensor
from tqdm import tqdm

from nanoalign.compile import fused_head, opaque
from nanoalign.compile.compiler import Compiler, reason
from nanoalign.errors import RunError
from nanoalign.logps import Head, chunked_token_logps
from nanoalign.model import read_whole
from nanoalign.packing.attention import tree_attention
from nanoalign.packing.tree import Tree

FusedHead = fused_head.fused_head(fused_head.Kernels(fused_head.read, fused_head.slopes))
ROWS = [(5, 3, 4), (1, 2), (7, 6, 2, 9)]
TOKENS = sum(map(sum, ROWS))


def head_and_tokens(dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(10, 6), (13, 6), (13,)] if bias else [(10, 6), (13, 6)]
    given = [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]
    return [x.requires_grad_() for x in given], torch.randint(0, 13, (10,), generator=draw)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (2.0, 1.5)])
@pytest.mark.parametrize("chunk", [4, 13])
def test_the_fused_head_is_the_chunked_head(chunk, scale, cap, bias):
    """Values and gradients in float64, and gradients against differences of values."""
    given, targets = head_and_tokens(torch.float64, bias)

    def logps(kind: type[Head], hidden: Tensor, weight: Tensor, bias: Tensor | None = None):
        return chunked_token_logps(hidden, kind(weight, bias, scale, cap), targets, chunk)

    found, expected = (
        [values, *torch.autograd.grad(values @ torch.arange(10.0).double(), given)]
        for values in (logps(FusedHead, *given), logps(Head, *given))
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *x: logps(FusedHead, *x), given)


def test_the_fused_head_in_bfloat16():
    """Products are rounded once, and so are their gradients."""
    given, targets = head_and_tokens(torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            chunked_token_logps(given[0], kind(*given[1:]), targets, 5)
            for kind in (FusedHead, Head)
        )
    assert torch.allclose(found, expected, rtol=1e-6) and found.dtype == torch.float32
    for a, b in zip(*(torch.autograd.grad(x.sum(), given) for x in (found, expected)), strict=True):
        assert torch.allclose(a, b, rtol=2**-7, atol=1e-3) and a.dtype == torch.float32


def test_rows_go_into_a_tensor_and_come_back():
    numbers = opaque.encode(Tree(ROWS))
    assert numbers.tolist() == [3, 5, 3, 4, 2, 1, 2, 4, 7, 6, 2, 9]
    assert opaque.decode(numbers.numpy().tobytes()).rows == ROWS


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"sinks": True}], ids=str
)
def test_the_operator_is_the_attention_of_packed_rows(options):
    """Values and gradients; and torch's own checks of an operator."""
    opaque.define_operator()
    draw, options = torch.Generator().manual_seed(0), dict(options)
    query, key, value = (
        torch.randn(1, heads, TOKENS, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)
    )
    sinks = torch.zeros(4, requires_grad=True) if options.pop("sinks", False) else None
    options = {"scaling": 0.3, "sliding_window": None, "softcap": None} | options
    given = [x for x in (query, key, value, sinks) if x is not None]
    rows, tree = opaque.encode(Tree(ROWS)), Tree(ROWS)
    op = torch.ops.nanoalign.tree_attention
    found = op(query, key, value, sinks, rows, **options)
    expected, _ = tree_attention(
        None, query, key, value, None, "sdpa", tree, s_aux=sinks, **options
    )
    assert torch.equal(found, expected)
    upstream = torch.randn(found.shape, generator=draw)
    for a, b in zip(*(torch.autograd.grad(x, given, upstream) for x in (found, expected)),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (query, key, value, sinks, rows), options, test_utils=tests)


@pytest.mark.parametrize(
    ("kinds", "windows"),
    [
        (["full_attention"] * 2, {None}),
        (["full_attention", "sliding_attention"], {None, 7}),
        (["sliding_attention"] * 2, {7}),
        (None, {None, 7}),
    ],
)
def test_the_windows_of_which_masks_are_made(kinds, windows):
    model = tiny_llama()
    model.config.sliding_window, model.config.layer_types = 7, kinds
    assert opaque.windows(model) == windows


def test_an_error_of_the_compiler_is_one_line_that_says_what_it_is_about():
    text = "Attempted to call function marked as skipped\n  Explanation: Dynamo can't.\n  Hint: no"
    error = RuntimeError(
        text + "\n\n  Developer debug context: qualname: print\nSet TORCHDYNAMO_VERBOSE"
    )
    assert reason(error) == (
        "RuntimeError: Attempted to call function marked as skipped Explanation: Dynamo can't. "
        "Developer debug context: qualname: print"
    )


@pytest.fixture
def compiler(world):
    """A Compiler. Settings of torch are no plain attributes: its own patch restores them."""
    with ExitStack() as stack:
        for config, names in (
            (torch._dynamo.config, ("recompile_limit", "specialize_float")),
            (torch._functorch.config, ("force_non_lazy_backward_lowering",)),
            (torch.fx.experimental._config, ("use_duck_shape",)),
        ):
            stack.enter_context(config.patch({name: getattr(config, name) for name in names}))
        yield Compiler(Namespace(compile="on", batch_size=4), world)


def shown(x: Tensor) -> Tensor:
    """A function that the compiler refuses."""
    print("shown")
    return x + 1


def test_what_the_compiler_cant_do_is_plain_before_the_first_step_and_an_error_later(compiler):
    run = compiler.compiled(shown)
    with pytest.raises(RunError, match="--compile: Unsupported: .*print.*--resume$"):
        run(torch.ones(2))
    compiler.starting, compiler.bar = True, tqdm(disable=True)
    assert run(torch.ones(2)).tolist() == [2, 2]
    assert compiler.problem.startswith("Unsupported: ")


def test_a_plain_run_has_nothing_of_the_compiler(world):
    """By default on a CPU; on a GPU it is compiled by default."""
    for how in ("auto", "off"):
        plain = Compiler(Namespace(compile=how, batch_size=4), world)
        assert plain.reading(read_whole) is read_whole
        model = object()
        plain.start(model, None, None, "")  # which looks at nothing
    gpu = replace(world, device=torch.device("cuda"))
    assert not Compiler(Namespace(compile="off", batch_size=4), gpu).is_on


@pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ >= "2.14" or shutil.which("gcc") is None,
    reason="torch without CUDA, a torch that asks more of the driver than the stub answers, or no "
    "C compiler",
)
def test_blocks_and_head_compile_for_a_gpu_that_is_not_there():
    """Attention is inside of the graph of a block; another length or block is no other graph."""
    script = Path(__file__).parent / "cuda_block.py"
    run = subprocess.run([sys.executable, script, "9", "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    graphs = {line["case"]: (line["graphs"], len(line["shared"])) for line in found}
    assert graphs == {
        "trained block": (2, 2),
        "another block, longer": (0, 0),
        "block without gradient": (1, 1),
        "head": (1, 0),
        "head, backward": (1, 0),
        "head, another chunk": (0, 0),
        "head, another chunk, backward": (0, 0),
    }
    assert all(0 < n <= 232_448 for line in found for n in line["shared"])
