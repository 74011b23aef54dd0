"""Attention by itself on one GPU: Llama-3-8B's heads in bf16, each back end that is installed.

    python -m benchmarks attention

Prints JSON: for documents of several lengths, milliseconds of the forward pass, and of forward and backward, by back end. Calls
follow each other without a wait, so where one is short, what its launches cost the host is part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from raytune_llm.models import attention
from raytune_llm.models.attention import Case

HEADS, GROUPS, HEAD = 32, 8, 128
BACKENDS = ("varlen", "flash2", "flash3", "flash4")
TOKENS = 8192


def alpacas() -> list[int]:
    """Lengths of as many recorded rows as there is room for, and one of the rest."""
    rows = np.array(json.loads((Path(__file__).parent / "_alpaca_lengths.json").read_text())["rows"])[:, 0]
    ends = list(takewhile(lambda end: end < TOKENS, rows.cumsum().tolist()))
    return np.diff([0, *ends, TOKENS]).tolist()


def milliseconds(call: Callable[[], object], times: int) -> float:
    for _ in range(2):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / times, 3)


def measure(backend: str, lengths: list[int], times: int) -> dict[str, float]:
    tokens = sum(lengths)
    query, key, value = (
        torch.randn(1, tokens, heads, HEAD, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    grad = torch.randn(1, tokens, HEADS, HEAD, device="cuda", dtype=torch.bfloat16)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    attend = partial(attention.BACKENDS[backend], nn.Identity(), query, key, value, None)

    def forward() -> Tensor:
        return attend(cu_seqlens_S=bounds, max_seqlen=max(*lengths, 1024))[0]

    attention.tell_torch(backend)
    with torch.no_grad():
        alone = milliseconds(forward, times)
    return {
        "forward_ms": alone,
        "both_ms": milliseconds(lambda: torch.autograd.grad(forward(), [query, key, value], grad), times),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py needs a GPU")
    case = Case(device_type="cuda", dtype=torch.bfloat16, capability=torch.cuda.get_device_capability(), head=HEAD)
    lacks = {backend: attention.LACKS[backend](case) for backend in BACKENDS}
    results: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "lacking": {k: v for k, v in lacks.items() if v is not None},
    }
    for lengths, times in ((alpacas(), 30), ([TOKENS // 2] * 2, 20), ([32768], 5), ([131072], 2)):
        found = {backend: measure(backend, lengths, times) for backend in BACKENDS if lacks[backend] is None}
        results[f"{len(lengths)}_documents_of_{sum(lengths)}_tokens"] = found
        torch.cuda.empty_cache()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
