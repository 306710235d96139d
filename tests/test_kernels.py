"""Triton's kernels (ops/kernels.py, ops/token_kernels.py) against their twins in PyTorch, and the static token step.

Without a GPU the kernels run in Triton's interpreter, a process of its own as that is decided at import; with one, on
the GPU as well. The interpreter cuts bfloat16 off where a GPU rounds to the nearest, so the tests round for it.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PLACES = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu")]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it is for Linux only")
@pytest.mark.parametrize("device", PLACES)
def test_the_kernels_agree_with_pytorch(device):
    """tests/gpu/check_kernels.py, each of whose tests holds one operation against its twin."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/gpu/check_kernels.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANOQWEN_TEST_DEVICE": device, **interpret}
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
