"""The kernels of decoding, run by Triton's interpreter on the CPU, beside their plain twins."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("kernel", ["paged_decode", "slot_products", "few_rows", "fused"])
def test_a_kernel_equals_its_plain_twin(kernel):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script), kernel], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") >= 4
