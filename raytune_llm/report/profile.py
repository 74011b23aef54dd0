"""train.profile: traces a few steps, and tabulates their time by kind of work."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from raytune_llm.report.metrics import TABLE, TRACE

WARMUP, STEPS = 5, 3
"""Steps before profiling starts, in which compilation happens, and steps that are profiled."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
KERNELS = {
    "communication": ("nccl", "c10d::", "gloo"),
    "attention": ("flash", "fmha", "cudnn_generated", "_attention", "_varlen_attn", "flex_"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "gemv", "_scaled_mm", *PRODUCTS),
    "copies": ("memcpy", "memset", "aten::copy_", "pin_memory"),
}  # fmt: skip
"""Kind of work -> substrings of the names of kernels or CPU operations; the first match counts."""
OTHER, IDLE = "elementwise and the rest", "idle"
RANGES = {"head and loss": "loss", "optimizer step": "optimizer"}
"""Profiler ranges in which all work is counted as one kind."""

Row = tuple[str, float]
"""(kind of work, milliseconds)."""


class StepProfile:
    """Profiles a few steps of a run and writes a table and a trace.

    thin: matrix products with a dimension of at most this size are counted as LoRA.
    """

    def __init__(self, folder: Path, device: torch.device, *, first_step: int, total_steps: int, thin: int) -> None:
        self.folder, self.device, self.thin = folder, device, thin
        self.begins = first_step + max(min(WARMUP, total_steps - first_step - STEPS), 0)
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        self._seen = 0
        self._running = False
        self.stepped(first_step)

    def stepped(self, step: int) -> None:
        """Call after each step of the run."""
        if self._running:
            self._seen += 1
        if self._running and self._seen == STEPS:
            self.close()
        elif step == self.begins and not self._running and not self._seen:
            self._synchronize()
            self._profiler.start()
            self._running = True

    def close(self) -> None:
        """Write the table and the trace, with fewer steps if the run ended early."""
        if not self._running:
            return
        self._synchronize()
        self._profiler.stop()
        self._running = False
        steps = max(self._seen, 1)
        trace = self.folder / TRACE
        trace.parent.mkdir(parents=True, exist_ok=True)
        plain = trace.with_suffix("")
        self._profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        events: list[Any] = list(self._profiler.events() or [])
        rows = gpu_rows(events, self.thin) if self.device.type == "cuda" else cpu_rows(events, self.thin)
        (self.folder / TABLE).write_text(table([(kind, ms / steps) for kind, ms in rows]))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def table(rows: Sequence[Row]) -> str:
    """The table: kinds of work by decreasing time, idle last, with their share of the step."""
    total = sum(ms for _, ms in rows)
    ordered = sorted(rows, key=lambda row: (row[0] == IDLE, -row[1]))
    lines = [f"{kind:<26}{ms:10.2f} ms{ms / max(total, 1e-9):8.1%}" for kind, ms in ordered if ms > 0 or kind == IDLE]
    return "\n".join([*lines, f"{'a step':<26}{total:10.2f} ms", ""])


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KERNELS.items() if any(part in lower for part in parts)), OTHER)


def gpu_rows(events: Iterable[Any], thin: int) -> list[Row]:
    """Milliseconds by kind over all profiled steps. Kernels that run at the same time count in full; idle: no kernel runs."""
    events = list(events)
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    ranges = [
        (event.time_range.start, event.time_range.end, RANGES[event.name])
        for event in on_gpu
        if event.is_user_annotation and event.name in RANGES
    ]
    totals: dict[str, float] = {}
    for kernel in kernels:
        start = kernel.time_range.start
        kind = next((kind for begin, end, kind in ranges if begin <= start < end), None) or kind_of(kernel.name)
        totals[kind] = totals.get(kind, 0.0) + kernel.time_range.elapsed_us() / 1000
    for name, ms in _lora_kernels(events, thin):
        kind = kind_of(name)
        totals[kind] = totals.get(kind, 0.0) - ms
        totals["LoRA"] = totals.get("LoRA", 0.0) + ms
    if kernels:
        spans = sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)
        totals[IDLE] = (max(end for _, end in spans) - spans[0][0] - _covered(spans)) / 1000
    return list(totals.items())


def cpu_rows(events: Iterable[Any], thin: int) -> list[Row]:
    """Milliseconds by kind, of each event's own CPU time without its children."""
    totals: dict[str, float] = {}
    for event in events:
        kind = _range_of(event) or ("LoRA" if _is_thin(event, thin) else kind_of(event.name))
        totals[kind] = totals.get(kind, 0.0) + event.self_cpu_time_total / 1000
    return list(totals.items())


def _lora_kernels(events: Iterable[Any], thin: int) -> Iterable[tuple[str, float]]:
    """(kernel, milliseconds) of matrix products with a low-rank matrix outside of RANGES."""
    for event in events:
        if event.device_type == DeviceType.CUDA or not event.kernels:
            continue
        if _is_thin(event, thin) and _range_of(event) is None:
            yield from ((kernel.name, kernel.duration / 1000) for kernel in event.kernels)


def _range_of(event: Any) -> str | None:
    """The kind of the range in RANGES that a CPU event is in, if any."""
    kind = None
    while kind is None and event is not None:
        kind, event = RANGES.get(event.name), event.cpu_parent
    return kind


def _is_thin(event: Any, thin: int) -> bool:
    """Whether the event is a product with a low-rank matrix."""
    shapes = [shape for shape in event.input_shapes or () if shape]
    return event.name in PRODUCTS and any(0 < min(shape) <= thin for shape in shapes if len(shape) == 2)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The total length of the union of intervals, which must be sorted by their start."""
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered
