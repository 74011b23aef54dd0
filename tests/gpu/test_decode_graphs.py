"""Captured steps of rows that decode, compiled and not, beside steps as they are written: the same tokens in float32."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.graphs import DecodeGraphs
from raytune_llm.engines.native.runner import PolicyRunner
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.models import attention
from raytune_llm.models.adapters import LoraBank
from raytune_llm.models.adapters.routes import _by_row, slot_products
from raytune_llm.models.attention.decode_step import StepNumbers
from raytune_llm.models.attention.paged_decode import paged_decode, plain
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.few_rows import few_rows, few_rows_fp8
from raytune_llm.models.quantization.fp8 import _rows_in_fp8, fp8_product
from tests.invariant.test_served_equals_trained import CONFIG, Tokenizer, save_adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "head", "window", "softcap"), [(8, 4, 128, 0, 0.0), (2, 1, 80, 100, 0.0), (1, 7, 64, 0, 30.0)]
)
def test_decoding_equals_its_plain_twin(heads, groups, head, window, softcap, dtype):
    torch.manual_seed(0)
    size, blocks, lengths = 16, 400, [1, 2000, 17, 300, 64]
    keys, values = (torch.randn(3, blocks, size, heads, head, device=CUDA, dtype=dtype) for _ in range(2))
    free = torch.randperm(blocks).tolist()
    numbers = StepNumbers(8, 200, CUDA)
    numbers.put(8, [1] * 5, lengths, [0] * 5, [[free.pop() for _ in range(-(-length // size))] for length in lengths], size)
    q, k, v = (torch.randn(8, count, head, device=CUDA, dtype=dtype) for count in (heads * groups, heads, heads))
    layer = torch.tensor([1], dtype=torch.int32, device=CUDA)
    theirs = keys.clone(), values.clone()
    expected = plain(q, k, v, *theirs, layer, numbers.device, 8, head**-0.5, window, softcap)
    got = paged_decode(q, k, v, keys, values, layer, numbers.device, 8, head**-0.5, window, softcap)
    assert torch.equal(keys, theirs[0])
    assert torch.equal(values, theirs[1])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [5, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_slot_equal_their_plain_twin(dtype, rows):
    torch.manual_seed(0)
    slots = torch.randint(-1, 3, (rows,), dtype=torch.int32, device=CUDA)
    slots[1] = -1
    for inputs, rank, widths in ((4096, 8, (4096, 1024, 1024)), (14336, 8, (4096,)), (96, 64, (100, 36))):
        x = torch.randn(rows, inputs, device=CUDA, dtype=dtype)
        a = [torch.randn(4, rank, inputs, device=CUDA, dtype=dtype) / inputs**0.5 for _ in widths]
        b = [torch.randn(4, rank, width, device=CUDA, dtype=dtype) / rank**0.5 for width in widths]
        for bank in (*a, *b):
            bank[-1] = 0
        outs = list(torch.randn(rows, sum(widths), device=CUDA, dtype=dtype).split(widths, dim=1))
        got = slot_products(outs, x, slots, slots.argsort(), a, b)
        for out, one, a_GRK, b_GRO in zip(outs, got, a, b, strict=True):
            tolerance = 5e-2 if dtype != torch.float32 else 1e-3
            torch.testing.assert_close(one, _by_row(out, x, slots, a_GRK, b_GRO), rtol=tolerance, atol=tolerance)
            assert torch.equal(one[1], out[1])


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 100, 128, 129])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (200, 96)])
def test_products_of_few_rows_equal_their_plain_twins(rows, outputs, inputs):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device=CUDA, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=CUDA, dtype=torch.bfloat16) / inputs**0.5
    torch.testing.assert_close(few_rows(x, weight).float(), x.float() @ weight.float().T, rtol=1e-2, atol=2e-2)
    if outputs % 16 == 0:
        rounded, scale = _rows_in_fp8(weight)
        torch.testing.assert_close(
            few_rows_fp8(x, rounded, scale.flatten()), fp8_product(x, rounded, scale.T), rtol=2e-2, atol=2e-2
        )


def answers(folders: dict[str, Path], *, compiled: bool | None) -> list[tuple[int, ...]]:
    """compiled: None for steps as they are written."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.to(CUDA)
    attention.attach(model, "sdpa")
    policy = CausalLM(model)
    bank = LoraBank(model, num_slots=2, max_rank=8, dtype=torch.float32)
    made = partial(DecodeGraphs, policy, bank=bank, max_rows=6, max_length=64, compiled=bool(compiled))
    runner = PolicyRunner(policy, num_blocks=60, block_size=4, device=CUDA, bank=bank, graphs=None if compiled is None else made)
    engine = NativeEngine(runner, Tokenizer(), end_ids=(), max_length=64, max_rows=6)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    names = [None, *folders] * 3
    found = engine.generate(
        [
            Request(prompt_ids=[5 + number, 9, 40] * (1 + number), adapter=name, sampling=Sampling(max_new_tokens=9 + number))
            for number, name in enumerate(names[:5])
        ]
    )
    engine.close()
    return [completion.ids for completion in found]


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_give_the_same_tokens(tmp_path, compiled):
    folders = {name: save_adapter(tmp_path / name, rank, seed=rank) for name, rank in (("a", 4), ("b", 8))}
    assert answers(folders, compiled=compiled) == answers(folders, compiled=None)
