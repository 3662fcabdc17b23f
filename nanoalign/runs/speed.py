"""How fast a run is, and how much memory it takes: keys of the lines of steps in metrics.jsonl.

    tokens_per_second  of the prompts (each counted once) and responses of a step, over all ranks
    ms_per_step        from the first forward of a step to its optimizer step
    memory_gb          the largest so far on this rank: of the GPU's allocator, or of the process
    mfu                model FLOPs utilization (PaLM, arXiv 2204.02311): the share of the GPU's peak
                       that the products with weights take; in bfloat16 on a GPU of PEAKS

loop.train gives tokens and seconds of a step: without evaluations and checkpoints, and without a
wait for the GPU, for which a step waits once anyway. The first step of a process, which compiles,
has no speed. These keys differ from run to run; all others are the same.
"""

import gc
import resource
import sys
from argparse import Namespace

import torch

from nanoalign.distributed import World
from nanoalign.model import Scorer
from nanoalign.weights.nf4 import shape_of

KEYS = ("tokens_per_second", "ms_per_step", "memory_gb", "mfu")
# Dense products in bfloat16, FLOP/s, by a part of the name of a GPU; from NVIDIA's data sheets.
# The first part that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Meter:
    """Measures the steps of a run, on this rank.

    args: the flags of the run, which say whether a step also computes a frozen reference.
    """

    def __init__(self, model: Scorer, args: Namespace, world: World):
        self.device, self.steps, self.flops, self.peak = world.device, 0, 0.0, 0.0
        config = model.model.config.get_text_config().to_dict()
        mixture = any("expert" in key for key in config)  # of which a token takes some blocks alone
        if self.device.type == "cuda" and model.dtype == torch.bfloat16 and not mixture:
            gpu = torch.cuda.get_device_name(self.device)
            peak = next((peak for name, peak in PEAKS.items() if name in gpu), 0.0)
            self.peak = world.size * peak
            reference = vars(args).get("reference", "none") != "none"
            computed = reference and not vars(args).get("precompute_reference")
            self.flops = flops_per_token(model, computed)

    def measure(self, tokens: int, seconds: float) -> dict[str, float]:
        """Returns the values of KEYS that are known, for a step of so many tokens and seconds.

        The first call returns the memory alone. On a GPU it also frees what is garbage and takes
        what is left from Python's garbage collector, which would else stop a later step for most of
        a second.
        """
        if self.device.type == "cuda":
            measured = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            measured = {"memory_gb": peak * unit / 1e9}
        self.steps += 1
        if self.steps == 1:
            if self.device.type == "cuda":
                gc.collect()
                gc.freeze()
            return measured
        speed = {"tokens_per_second": tokens / seconds, "ms_per_step": 1000 * seconds}
        if self.peak:
            measured["mfu"] = speed["tokens_per_second"] * self.flops / self.peak
        return speed | measured


def flops_per_token(model: Scorer, reference: bool) -> float:
    """Returns an estimate of the FLOPs of a token in a step, in products with weights of blocks.

    reference: whether a step computes a frozen reference.
    2 for each weight in the forward pass, 2 for gradients of activations, 2 for the gradient of a
    weight that is trained; 2 more where a frozen reference is computed. Left out are attention
    scores, the head (which reads the scored tokens alone), and blocks that run again in the
    backward pass (--activation_checkpointing).
    """
    weights = [p for block in model.blocks() for p in block.parameters() if p.ndim >= 2]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    return (4 + 2 * reference) * sum(shape_of(p).numel() for p in weights) + 2.0 * trained
