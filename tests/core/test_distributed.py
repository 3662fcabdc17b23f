"""python -m pytest tests/core/test_distributed.py"""

import pytest
import torch

from nanoalign.distributed import compute_dtype, setup
from nanoalign.errors import RunError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", CPU, False, torch.float32),
        ("fp32", CPU, False, torch.float32),
        ("bf16", CPU, False, torch.bfloat16),
        ("auto", CUDA, True, torch.bfloat16),
        ("fp32", CUDA, True, torch.float32),
        ("bf16", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float32),
        ("fp32", CUDA, False, torch.float32),
    ],
)
def test_the_dtype_of_matrix_products(monkeypatch, precision, device, has_bf16, expected):
    """has_bf16: whether the GPU computes bfloat16 itself; a T4 does not."""

    def is_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert compute_dtype(precision, device) == expected


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(RunError, match="--precision bf16: .* use --precision fp32"):
        compute_dtype("bf16", CUDA)


def test_a_run_on_a_mac_is_on_its_cpu(monkeypatch):
    """FSDP and float64 sums have no mps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert setup().device == CPU
