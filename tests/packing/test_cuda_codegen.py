"""python -m pytest tests/packing/test_cuda_codegen.py

Needs torch's build for CUDA, which brings Triton, and gcc; no GPU. About 90 s for each GPU.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_codegen
import pytest
import torch

SCRIPT = Path(cuda_codegen.__file__)


@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("gcc") is None,
    reason="torch without CUDA, or no C compiler",
)
@pytest.mark.parametrize("capability", cuda_codegen.SHARED_MEMORY)
def test_attention_compiles_for_gpus_that_are_not_there(capability):
    """Forward and backward kernels fit, and a shape is compiled anew only where it has to be."""
    command = [sys.executable, SCRIPT, *map(str, capability)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert [*found] == [*cuda_codegen.CASES, "20 batches"]
    for name in cuda_codegen.CASES:
        again = "window" in name  # its spans are data: the same kernels
        assert found[name]["graphs"] == len(found[name]["shared"]) == (0 if again else 2), name
        for bytes_shared in found[name]["shared"]:
            assert 0 < bytes_shared <= cuda_codegen.SHARED_MEMORY[capability]
    assert found["20 batches"]["graphs"] == 4  # up to a block of tokens and above, with gradients
