"""What plan foretells beside the peaks that `scripts/bench plan` measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plan import CASES, run_of, write_rows
from raytune_llm import api
from raytune_llm.runs import plan
from raytune_llm.runs.plan import Device

RESULTS = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("plan-1x-nvidia-h200-*.json"))
MEASURED = {case: found for path in RESULTS for case, found in json.loads(path.read_text())["results"].items()}
SOME = (
    "adapter=none", "adapter=freeze", "adapter=llama_pro", "adapter=lora", "adapter=dora", "adapter=oft", "adapter=vera",
    "adapter=ia3", "quantization=bnb_nf4", "quantization=bnb_int8", "adapter=ia3 quantization=bnb_int8", "adapter.dropout=0.1",
    "adapter.rank=64", "adapter.last_layers=2", "optimizer=adamw_8bit", "optimizer=galore", "optimizer=muon", "optimizer=sgd",
    "optimizer=adalomo", "stage=dpo", "stage=reward", "stage=kto", "stage=dpo adapter=none",
    "train.activation_checkpointing=full",
    "train.precision=bf16 adapter=none", "train.micro_batch_size=2",
)  # fmt: skip
MORE = [pytest.param(case, marks=pytest.mark.long) for case in CASES if case not in SOME]


@pytest.mark.parametrize("case", [*SOME, *MORE])
def test_the_peak_is_foretold_within_a_tenth(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpus_here", lambda: [Device(name="H200", memory=141 * 10**9)])
    foretold = api.plan(run_of(CASES[case], write_rows(tmp_path, on_gpu=True), tmp_path, on_gpu=True)).memory.total
    assert foretold / 2**20 == pytest.approx(MEASURED[case]["peak_mib"], rel=0.1)
