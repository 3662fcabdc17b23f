"""--keep_best and --patience: the weights with the lowest held-out loss become the result."""

import math
from argparse import Namespace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanoalign.loop import Objective


def keeps_best(args: Namespace) -> bool:
    """Whether the best weights of a run become its result, not those of the last step."""
    return args.keep_best or args.patience is not None


LOSS, STEP, WORSE = "best/loss", "best/step", "best/evaluations since"  # keys of Objective.state


class Best(nn.Module):
    """Keeps the weights of the evaluation with the lowest held-out loss, as a part of checkpoints.

    Its buffers are a copy of the trained parameters of `model`, sharded as they are.
    patience: evaluations in a row without a lower held-out loss that end the run; None: any number.
    """

    def __init__(self, model: nn.Module, objective: Objective, patience: int | None):
        super().__init__()
        self.of = [model]  # in a list, so that it is no part of this module
        self.objective, self.patience = objective, patience
        for n, parameter in enumerate(self.trained()):
            self.register_buffer(str(n), parameter.detach().clone())
        objective.modules["best"] = self
        objective.state |= {LOSS: math.inf, STEP: 0, WORSE: 0}

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters of the model, which are sharded again if they were gathered."""
        (model,) = self.of
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without a backward pass leaves parameters gathered
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Copies the weights of a step, if its metrics have the lowest held-out loss until now."""
        state = self.objective.state
        if (loss := metrics.get("eval/loss")) is None:
            return
        if loss < state[LOSS]:
            for copy, parameter in zip(self.buffers(), self.trained(), strict=True):
                copy.copy_(parameter)
            state |= {LOSS: loss, STEP: step, WORSE: 0}
        else:
            state[WORSE] += 1

    def is_over(self) -> bool:
        """Whether --patience is used up."""
        return self.patience is not None and self.objective.state[WORSE] >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Copies the best weights into the model; does nothing if no step had a held-out loss."""
        if self.objective.state[STEP]:
            for copy, parameter in zip(self.buffers(), self.trained(), strict=True):
                parameter.copy_(copy)


def up_to_best(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl up to the step whose weights are the result.

    That is the evaluation with the lowest held-out loss after step 0, which is printed. Without
    such an evaluation returns all lines, and prints nothing.
    """
    evaluations = [line for line in lines if "eval/loss" in line and line["step"]]
    if not evaluations:
        return lines
    best = min(evaluations, key=lambda line: line["eval/loss"])["step"]
    print(f"{'best':<11} the weights after step {best}, of {lines[-1]['step']} that were done")
    return [line for line in lines if line["step"] <= best]
