"""The table of where a step's time goes, from what a profiler saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from raytune_llm import api
from raytune_llm.report.metrics import TABLE, TRACE
from raytune_llm.report.profile import gpu_rows, table
from tests.runs import tiny_run


def kernel(name: str, start_us: float, end_us: float, *, note: bool = False) -> Any:
    span = SimpleNamespace(start=start_us, end=end_us, elapsed_us=lambda: end_us - start_us)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, is_user_annotation=note, time_range=span)


def launch(name: str, shapes: list[list[int]], kernels: list[tuple[str, float]], *, within: str | None = None) -> Any:
    around = None if within is None else SimpleNamespace(name=within, cpu_parent=None)
    launched = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, input_shapes=shapes, kernels=launched, cpu_parent=around)


def test_kernels_are_of_the_kind_of_their_name_and_gaps_are_idle():
    rows = dict(
        gpu_rows([kernel("nvjet_gemm", 0, 4000), kernel("flash_fwd", 5000, 7000), kernel("triton_poi", 6000, 8000)], thin=32)
    )
    assert rows == {"matmul": 4, "attention": 2, "elementwise and the rest": 2, "idle": 1}


def test_what_runs_in_the_loss_or_the_optimizer_is_theirs():
    notes = [kernel("head and loss", 0, 2000, note=True), kernel("optimizer step", 3000, 5000, note=True)]
    rows = dict(gpu_rows([*notes, kernel("nvjet_gemm", 0, 2000), kernel("multi_tensor", 3000, 5000)], thin=32))
    assert rows == {"loss": 2, "optimizer": 2, "idle": 1}


def test_products_with_a_low_rank_matrix_are_loras():
    events = [
        kernel("gemm_a", 0, 1000),
        kernel("gemm_b", 1000, 5000),
        launch("aten::addmm_", [[8192, 4096], [8192, 8], [8, 4096]], [("gemm_a", 1000)]),
        launch("aten::mm", [[8192, 4096], [4096, 4096]], [("gemm_b", 4000)]),
    ]
    assert dict(gpu_rows(events, thin=32)) == {"matmul": 4, "LoRA": 1, "idle": 0}


def test_a_low_rank_product_of_the_loss_stays_the_losss():
    events = [
        kernel("head and loss", 0, 1000, note=True),
        kernel("gemm_a", 0, 1000),
        kernel("gemm_b", 1000, 5000),
        launch("aten::mm", [[8192, 8], [8, 4096]], [("gemm_a", 1000)], within="head and loss"),
    ]
    assert dict(gpu_rows(events, thin=32)) == {"loss": 1, "matmul": 4, "idle": 0}


def test_a_head_with_an_adapter_is_in_the_loss(chat_rows, cache, tmp_path):
    overrides = ["train.max_steps=3", "train.profile=true", "adapter.targets=[q_proj,lm_head]"]
    shown = (api.train(tiny_run(chat_rows, cache, tmp_path, *overrides)).output_dir / TABLE).read_text()
    assert "loss" in shown


def test_shares_add_up_and_idle_comes_last():
    lines = table([("idle", 1.0), ("matmul", 3.0)]).splitlines()
    assert [line.split()[0] for line in lines] == ["matmul", "idle", "a"]
    assert "75.0%" in lines[0] and "25.0%" in lines[1] and "4.00 ms" in lines[2]


@pytest.mark.parametrize("steps", [3, 12])
def test_a_profiled_run_leaves_a_table_and_a_trace(steps, chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path, f"train.max_steps={steps}", "train.profile=true")
    folder = api.train(run).output_dir
    shown = (folder / TABLE).read_text()
    assert all(kind in shown for kind in ("attention", "matmul", "LoRA", "loss", "optimizer"))
    assert (folder / TRACE).stat().st_size > 0
