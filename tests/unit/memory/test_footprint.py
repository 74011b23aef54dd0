"""The estimate is of the device that a run is on."""

from __future__ import annotations

from dataclasses import replace

import torch

from raytune_llm.config.load import load_config
from raytune_llm.memory.footprint import SMALL_WORKSPACE, WORKSPACE, estimate, needs_of
from raytune_llm.memory.model import Memory
from raytune_llm.models.attention import case_of
from tests.models import LLAMA3_8B

TOKENS = 8192


def expected(capability: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16) -> Memory:
    run = load_config("train", ["data.path=rows.jsonl", f"data.max_length={TOKENS}", "adapter=lora", "train.precision=auto"])
    case = None if capability is None else case_of(LLAMA3_8B, "cuda", capability, dtype)
    return estimate(run, LLAMA3_8B, needs_of(run, LLAMA3_8B, 1, compiled=False, case=case))


def test_a_gpu_that_is_not_known_is_one_of_today():
    assert expected() == expected((9, 0))


def test_an_older_gpu_differs_by_its_smaller_workspaces_alone():
    ampere = expected((8, 0))
    assert replace(ampere, buffers=ampere.buffers + 2 * (WORKSPACE - SMALL_WORKSPACE)) == expected((9, 0))


def test_a_gpu_without_flash_attention_holds_a_mask_of_every_pair_of_positions():
    masks = TOKENS**2 * (1 + torch.float16.itemsize)
    assert expected((7, 5), torch.float16).activations - expected((8, 0), torch.float16).activations == masks


def test_weights_are_in_what_the_gpu_computes_in():
    assert expected((7, 5), torch.float32).weights > 1.9 * expected((8, 0)).weights
