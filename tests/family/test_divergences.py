"""python -m pytest tests/family/test_divergences.py

What replaces log-ratios: by hand, at limits, derivatives.
"""

import math
import subprocess
import sys

import pytest
import torch

from nanoalign.family import losses
from nanoalign.family.pairs import DIVERGENCES, divergence_scores


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_divergences_by_hand():
    """u = 3 (log u = 1.098612): log u; 2/3; log(6/4) = 0.405465; alpha 1/2: (1 - 1/sqrt 3) * 2 =
    0.845299.

    As alpha goes to 0 it becomes the reverse KL; at u = 1 all are 0.
    """
    found = [divergence_scores(t(math.log(3)), each, 0.5).item() for each in DIVERGENCES]
    assert found == pytest.approx([1.098612, 2 / 3, 0.405465, 0.845299], abs=5e-7)
    near = divergence_scores(t(math.log(3)), "alpha", 1e-8).item()
    assert near == pytest.approx(math.log(3), abs=1e-7)
    assert [divergence_scores(t(0), each).item() for each in DIVERGENCES] == [0, 0, 0, 0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_finite_and_increasing(divergence):
    """Under every divergence a larger log-ratio is a larger score, where float32 can tell."""
    ratios = torch.tensor(
        [-1e4, -60.0, -30.0, -3.0, -0.1, 0.0, 0.1, 3.0, 12.0, 1e4], requires_grad=True
    )
    scores = divergence_scores(ratios, divergence)
    losses.sigmoid(scores, scores.flip(0)).sum().backward()
    assert scores.isfinite().all() and ratios.grad.isfinite().all()
    assert (scores.diff() >= 0).all() and (scores[2:9].diff() > 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_divergences_are_derivatives(divergence):
    ratios = t(-9, -2, -0.1, 0.3, 2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence_scores(x, divergence), ratios)


def test_losses_import_torch_alone():
    code = "import sys, nanoalign.family.losses; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert "torch" in modules and "transformers" not in modules
    names = ["nanoalign", "nanoalign.family", "nanoalign.losses", "nanoalign.family.losses"]
    assert {m for m in modules if m.startswith("nanoalign")} == {*names}
