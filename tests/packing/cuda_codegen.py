"""Compiles packed attention for a GPU that is not there, with torch's CUDA build and Triton.

    python tests/packing/cuda_codegen.py 9 0        for GPUs of compute capability 9.0

torch's compiler sees fake tensors on CUDA and a table of the GPU's properties; a stub stands in for
NVIDIA's driver, of which the CUDA build asks a few questions. Each kernel of flex_attention is then
compiled by Triton down to a cubin. Nothing runs on a GPU, so results are not seen. Prints one JSON
object a case: its name, the number of graphs that were compiled for it, and of each kernel the
bytes of shared memory. The private names of torch that are replaced are those of 2.11 to 2.13.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanoalign.packing import flex
from nanoalign.packing.tree import Tree

SHARED_MEMORY = {(8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448}  # bytes: A100, 4090, H100
STUB = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
int cudaGetLastError(void) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = ""; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{ *flags = 0; *active = 1; return 0; }
"""
# By name: heads, heads of keys, rows, and what else by_blocks takes.
SHORT, LONG = [(20, 30, 10)], [(300, 150, 140), (230, 160, 120)]
CASES = {
    f"groups of {group}, {sum(map(sum, rows))} tokens": (8 // group * group, rows, {}, group)
    for group in (1, 2, 4, 7, 8)
    for rows in (SHORT, LONG)
} | {
    "window": (8, LONG, {"window": 100}, 4),
    "soft cap": (8, LONG, {"softcap": 50.0}, 2),
    "sinks": (8, LONG, {"sinks": True}, 8),
    "window, short": (8, SHORT, {"window": 5}, 4),
}


def run_with_stub(main: Callable[[tuple[int, int]], None]) -> None:
    """Runs the main of a script with the capability of its command line.

    The script runs again, with the stub before the CUDA runtime and in the driver's place.
    """
    if "libcuda" in os.environ.get("LD_PRELOAD", ""):
        return main((int(sys.argv[1]), int(sys.argv[2])))
    with tempfile.TemporaryDirectory() as folder:
        source, driver = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
        source.write_text(STUB)
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", driver, source], check=True)
        paths = {"LD_LIBRARY_PATH": folder, "LD_PRELOAD": str(driver)}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | paths).returncode)


def pretend(capability: tuple[int, int]) -> object:
    """Puts a table of properties in place of torch.cuda's questions, and Triton's target there."""
    import torch
    import triton
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    memory = SHARED_MEMORY[capability]
    properties = SimpleNamespace(
        name="GPU", major=capability[0], minor=capability[1], multi_processor_count=132,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32,
        max_threads_per_block=1024, shared_memory_per_block=49152, total_memory=80 << 30,
        shared_memory_per_block_optin=memory, shared_memory_per_multiprocessor=memory + 1024,
        L2_cache_size=50 << 20, gcnArchName="", clock_rate=1_980_000,
        memory_clock_rate=2_619_000, memory_bus_width=5120,
    )  # fmt: skip
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    of_triton = {"max_shared_mem": memory, "multiprocessor_count": 132, "warpSize": 32}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_device_interface=lambda: torch.cuda,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_current_stream=lambda *device: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: of_triton),
        )
    )
    answers = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1,
        "get_device_capability": capability, "get_device_properties": properties,
        "_get_device_properties": properties, "get_device_name": "GPU", "_lazy_init": None,
        "is_bf16_supported": True, "synchronize": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args: torch.zeros(1)
        module.set_rng_state = lambda *args, **options: None
    torch.accelerator.is_available = lambda: False
    torch.Tensor.pin_memory = lambda tensor: tensor
    fake_tensor.init_gpu_context = lambda *args: None
    joint_graph.lazy_init = lambda *args: None  # it would run patterns on the GPU
    config.pattern_matcher, config.fx_graph_cache, config.compile_threads = False, False, 1
    config.joint_graph_constant_folding = False  # it would fold on the GPU
    return target


class Compiled(Exception):
    """Raised in place of running what was compiled."""


def collect_sources() -> list[str]:
    """The list to which inductor's code of each graph is added; the graphs themselves never run."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def compile_to_module(graph: GraphLowering) -> SimpleNamespace:
        code = graph.codegen()[0]
        sources.append(getattr(code, "value", code))

        def call(*args: object) -> None:
            raise Compiled

        return SimpleNamespace(call=call, __file__="none.py", key="none", __name__="none")

    GraphLowering.compile_to_module = compile_to_module
    GraphLowering._compile_to_module = compile_to_module
    return sources


def shared_bytes(source: str, target: object, folder: Path) -> Iterator[int]:
    """Bytes of shared memory of each attention kernel in inductor's code, compiled to a cubin."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.compiler import ASTSource

    for number, found in enumerate(
        re.finditer(r"async_compile\.triton\('\w+', '''(.*?)'''", source, re.DOTALL)
    ):
        if "@triton_heuristics.template(" not in found[1]:
            continue
        meta, own = {}, triton_heuristics.template
        triton_heuristics.template = lambda meta=meta, **options: (
            lambda function: meta.update(options, function=function)
        )
        path = folder / f"kernel{number}.py"  # triton reads a kernel's text from its file
        path.write_text(found[1])
        try:
            exec(compile(found[1], path, "exec"), {"__name__": "kernel", "__file__": str(path)})
        finally:
            triton_heuristics.template = own
        of_triton = meta["triton_meta"]
        kernel = ASTSource(
            fn=meta["function"], signature=dict(of_triton["signature"]),
            constexprs=dict(of_triton["constants"]), attrs=dict(of_triton["configs"][0]),
        )  # fmt: skip
        sizes = {name: meta[name] for name in ("num_warps", "num_stages")}
        made = triton.compile(kernel, target=target, options=sizes)
        assert made.asm["cubin"]
        yield made.metadata.shared


def attend(rows: list, heads: int, group: int, window=None, softcap=None, sinks=False) -> None:
    """One forward of the project's own function; its backward is compiled at the same time."""
    import torch

    flex.to_device = lambda tensor, device: torch.empty(
        tensor.shape, dtype=tensor.dtype, device=device
    )
    tree, options = Tree(rows), {"device": "cuda", "dtype": torch.bfloat16}
    query, key, value = (
        torch.empty(1, sum(tree.parts), n, 64, **options).transpose(1, 2).requires_grad_()
        for n in (heads, heads // group, heads // group)
    )
    sinks = torch.zeros(heads, **options) if sinks else None
    try:
        flex.by_blocks(query, key, value, tree, 0.125, window, softcap, sinks)
    except Compiled:
        return
    raise AssertionError("nothing was compiled")


def main(capability: tuple[int, int]) -> None:
    target, sources = pretend(capability), collect_sources()
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), tempfile.TemporaryDirectory() as folder:
        for name, (heads, rows, options, group) in CASES.items():
            sources.clear()
            attend(rows, heads, group, **options)
            shared = [n for code in sources for n in shared_bytes(code, target, Path(folder))]
            print(json.dumps({"case": name, "graphs": len(sources), "shared": shared}), flush=True)
        sources.clear()
        for tokens in range(40, 2040, 100):  # of two lengths of rows, on both sides of a block
            attend([(tokens // 2, tokens // 4), (tokens // 3, 7)], 6, 2)
        print(json.dumps({"case": "20 batches", "graphs": len(sources), "shared": []}))


if __name__ == "__main__":
    run_with_stub(main)
