"""Compiles blocks and head of a model for a GPU that is not there: see packing/cuda_codegen.py.

    python tests/compile/cuda_block.py 9 0          for GPUs of compute capability 9.0
    python tests/compile/cuda_block.py 9 0 varlen   with benchmarks/gpu/varlen.py in place of flex

Prints one JSON object for each kind of function that --compile makes: its name, the number of its
graphs, and the bytes of shared memory of its kernels of attention.
"""

import contextlib
import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)]
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packing"))

import cuda_codegen  # noqa: E402


def main(capability: tuple[int, int]) -> None:
    target, sources = cuda_codegen.pretend(capability), cuda_codegen.collect_sources()
    import torch
    import transformers
    from gpu import varlen
    from torch._subclasses import FakeTensorMode

    from nanoalign.compile import opaque
    from nanoalign.compile.compiler import Compiler
    from nanoalign.distributed import World
    from nanoalign.packing import flex
    from nanoalign.packing.attention import use_tree_attention
    from nanoalign.packing.tree import Tree

    def to_device(tensor, device):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    flex.to_device = varlen.to_device = to_device
    device = torch.device("cuda", 0)
    compiler = Compiler(Namespace(compile="auto", batch_size=4), World(0, 1, device, mesh=None))
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip

    def report(name: str, function, *args, **options) -> None:
        sources.clear()
        with contextlib.suppress(cuda_codegen.Compiled):
            function(*args, **options)
        shared = [
            n for code in sources for n in cuda_codegen.shared_bytes(code, target, Path(folder))
        ]
        print(json.dumps({"case": name, "graphs": len(sources), "shared": shared}), flush=True)

    replaced = varlen.in_place_of_flex if "varlen" in sys.argv else contextlib.nullcontext
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with replaced(), fakes, tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for part in model.modules():  # model.to has no fake parameters
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(parameter, device=device)
                )
        use_tree_attention(model)
        opaque.use_compiled_attention(model)
        blocks = model.model.layers

        def run(block, tokens: int) -> None:
            tree = Tree([(tokens // 2, tokens // 4, tokens // 4)])
            n = sum(tree.parts)
            hidden = torch.empty(1, n, 256, device=device, dtype=torch.bfloat16)
            angles = torch.empty(1, n, 64, device=device, dtype=torch.bfloat16)
            opaque.seen(tree, opaque.windows(model), device)
            mask = torch.empty(1, 1, 1, 1, device=device)
            compiler.run_block(
                block, hidden.requires_grad_(torch.is_grad_enabled()), attention_mask=mask,
                position_ids=torch.empty(1, n, dtype=torch.long, device=device),
                past_key_values=None, use_cache=False, position_embeddings=(angles, angles),
                tree=tree,
            )  # fmt: skip

        report("trained block", run, blocks[0], 1100)
        report("another block, longer", run, blocks[1], 2040)
        with torch.no_grad():
            report("block without gradient", run, blocks[0], 1100)
        for name, chunk in (("head", 512), ("head, another chunk", 320)):
            products = torch.empty(100, chunk, device=device, dtype=torch.bfloat16)
            place = torch.empty(100, dtype=torch.long, device=device)
            row = torch.empty(100, device=device)
            report(name, compiler.kernels.read, products, place, row, row, 1.0, None)
            slopes = compiler.kernels.slopes
            report(f"{name}, backward", slopes, products, place, row, row, 1.0, None)


if __name__ == "__main__":
    cuda_codegen.run_with_stub(main)
