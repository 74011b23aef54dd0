"""GPTQ and AWQ by llmcompressor: a separate program, started with the Python of an environment that has llmcompressor.

    python -P llmcompressor_job.py JOB.json

It imports nothing of raytune_llm: llmcompressor pins another transformers. The job has: `model` and `output`, folders; `method`;
`group_size`; `skipped`, names of linear layers; `rows`, token ids; `shard_bytes`; `trust_remote_code`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM


def gptq(groups: dict[str, QuantizationScheme], skipped: list[str]) -> list[Any]:
    """Frantar et al. 2022 (arXiv 2210.17323): columns are rounded one by one, and later columns compensate the error."""
    return [GPTQModifier(config_groups=groups, ignore=skipped)]


def awq(groups: dict[str, QuantizationScheme], skipped: list[str]) -> list[Any]:
    """Lin et al. 2023 (arXiv 2306.00978): channels with large activations are scaled up before rounding."""
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=skipped)]


METHODS = {"gptq": (gptq, "W4A16"), "awq": (awq, "W4A16_ASYM")}
"""Method -> (its modifiers, compressed-tensors' name of the storage scheme)."""


def main(job: dict[str, Any]) -> None:
    modifiers, preset = METHODS[job["method"]]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert scheme.weights is not None
    scheme.weights.group_size = job["group_size"]
    rows = job["rows"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", trust_remote_code=job["trust_remote_code"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=modifiers({"group_0": scheme}, job["skipped"]),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True, max_shard_size=job["shard_bytes"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
