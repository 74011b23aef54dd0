"""The kernel of rows that decode gives what its plain twin gives: on a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache
from raytune_llm.models.attention.cached_attention import decoding
from raytune_llm.models.attention.masked import Scores

BLOCK = 4
LENGTHS = (1, 9, 70, 33, 64, 5)
CASES = {
    "plain": (Scores(None, None, None), 16, 16, False),
    "window": (Scores(None, 10, None), 16, 16, False),
    "capped": (Scores(0.5, None, 5.0), 16, 16, False),
    "sinks": (Scores(None, None, None), 16, 16, True),
    "odd heads": (Scores(None, None, None), 24, 12, False),
}
HEADS, KEY_HEADS = 6, 2


def difference(case: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest, of the kernel and its plain twin in float32."""
    from raytune_llm.models.attention.paged_kernels import paged_decoding

    scores, head, head_v, has_sinks = CASES[case]
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    num_blocks = sum(-(-length // BLOCK) for length in LENGTHS)
    free = torch.randperm(num_blocks, generator=draw).tolist()
    rows = [NewTokens([0], length - 1, [free.pop() for _ in range(-(-length // BLOCK))]) for length in LENGTHS]
    cache = PagedCache(num_blocks, BLOCK, dtype=dtype, device=device)
    step = CachedRows.of(cache, rows)
    keys, values = some(num_blocks, BLOCK, KEY_HEADS, head), some(num_blocks, BLOCK, KEY_HEADS, head_v)
    query, sinks = some(len(LENGTHS), HEADS, head), some(HEADS) if has_sinks else None
    ours = paged_decoding(query, keys, values, step.tables_RK, step.lengths_R, scores, sinks)
    plain = decoding(query.float(), keys.float(), values.float(), scores, step, None if sinks is None else sinks.float())
    return (ours.float() - plain).abs().max().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu(case: str, dtype: torch.dtype, bound: float) -> None:
    assert difference(case, torch.device("cuda"), dtype) < bound


@pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton, and is for machines without a GPU"
)
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides as a kernel is defined."""
    root = Path(__file__).parents[4]
    code = (
        "import torch; from tests.unit.models.attention.test_paged_kernels import CASES, difference\n"
        "print(*[difference(case, torch.device('cpu'), torch.float32) for case in CASES])"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [float(word) for word in done.stdout.split()]
    assert len(found) == len(CASES) and max(found) < 1e-5, done.stdout
