"""Run with TRITON_INTERPRET=1: kernels beside their plain twins, on the CPU."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from raytune_llm.models import few_rows_kernels, fused_kernels
from raytune_llm.models.adapters import slot_kernels, slot_tile_kernels
from raytune_llm.models.adapters.routes import _by_row
from raytune_llm.models.attention.decode_step import StepNumbers
from raytune_llm.models.attention.paged_decode import plain
from raytune_llm.models.attention.paged_kernels import attend, write


def paged_decode() -> None:
    torch.manual_seed(0)
    size, blocks = 4, 60
    for heads, groups, head, splits, window, softcap in (
        (2, 3, 16, 1, 0, 0.0),
        (1, 4, 24, 5, 0, 0.0),
        (2, 1, 16, 3, 70, 0.0),
        (1, 2, 8, 2, 0, 20.0),
    ):
        keys, values = (torch.randn(3, blocks, size, heads, head) for _ in range(2))
        numbers = StepNumbers(8, 40, torch.device("cpu"))
        lengths = [1, 150, 7]
        free = torch.randperm(blocks).tolist()
        tables = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
        numbers.put(4, [1, 2, 3], lengths, [0, -1, 1], tables, size)
        numbers.device[:] = numbers.host
        q, k, v = torch.randn(4, heads * groups, head), torch.randn(4, heads, head), torch.randn(4, heads, head)
        layer = torch.tensor([1], dtype=torch.int32)
        theirs = keys.clone(), values.clone()
        expected = plain(q, k, v, *theirs, layer, numbers.device, 4, 0.3, window, softcap)
        write(k, v, keys, values, layer, numbers.device, 4)
        got = attend(q, keys, values, layer, numbers.device, 4, 0.3, window, softcap, splits)
        assert torch.equal(keys, theirs[0])
        assert torch.equal(values, theirs[1])
        torch.testing.assert_close(got[:3], expected[:3], rtol=1e-5, atol=1e-5)
        assert got[3].eq(0).all()
        print("equal", heads, groups, head)


def slot_products() -> None:
    torch.manual_seed(0)
    slot_tile_kernels.MANY_ROWS = 50  # so that the last case has large tiles
    for rows, inputs, rank, widths in (
        (5, 40, 8, (24,)),
        (5, 3000, 8, (700, 40)),
        (5, 64, 16, (64, 32, 32)),
        (5, 2100, 24, (33, 1030, 5)),
        (40, 600, 8, (300, 100, 64)),
        (70, 600, 8, (300, 40)),
    ):
        x, slots = torch.randn(rows, inputs), torch.randint(-1, 3, (rows,), dtype=torch.int32)
        slots[1] = -1
        a = [torch.randn(4, rank, inputs) / inputs**0.5 for _ in widths]
        b = [torch.randn(4, rank, width) for width in widths]
        for bank in (*a, *b):
            bank[-1] = 0
        whole = torch.randn(rows, sum(widths))
        for outs in (whole.split(widths, dim=1), [out.contiguous() for out in whole.split(widths, dim=1)]):
            by_row = slot_kernels.products(outs, x, slots, a, b)
            by_tile = slot_tile_kernels.products(outs, x, slots, slots.argsort(), a, b)
            for out, one, other, a_GRK, b_GRO in zip(outs, by_row, by_tile, a, b, strict=True):
                expected = _by_row(out, x, slots, a_GRK, b_GRO)
                for got in (one, other):
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
                    assert torch.equal(got[1], out[1])
        print("equal", inputs, rank, widths)


def few_rows() -> None:
    torch.manual_seed(0)
    for rows, outputs, inputs in ((1, 96, 256), (5, 100, 200), (17, 6400, 130), (3, 64, 2048)):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        torch.testing.assert_close(few_rows_kernels.product(x, weight, x.dtype), x @ weight.T, rtol=1e-4, atol=1e-4)
        scales = torch.rand(rows) + 0.5, torch.rand(outputs) + 0.5
        expected = (x @ weight.T) * scales[0][:, None] * scales[1]
        torch.testing.assert_close(few_rows_kernels.product(x, weight, x.dtype, scales), expected, rtol=1e-4, atol=1e-4)
        print("equal", rows, outputs, inputs)


def fused() -> None:
    torch.manual_seed(0)
    for rows, heads, head, width in ((3, 4, 16, 96), (1, 1, 8, 64), (9, 7, 24, 1030), (5, 2, 128, 600)):
        x, weight = torch.randn(1, rows, width), torch.randn(width)
        expected = F.rms_norm(x, (width,), weight, 1e-5)
        torch.testing.assert_close(fused_kernels.norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-5)
        whole = torch.randn(rows, 2 * width)
        gate, up = whole.split(width, dim=1)
        torch.testing.assert_close(fused_kernels.gated(gate, up), F.silu(gate) * up, rtol=1e-5, atol=1e-5)
        query, key, _ = torch.randn(1, rows, (heads + 2) * head).split([heads * head, head, head], dim=-1)
        query, key = (x.view(1, rows, -1, head).transpose(1, 2) for x in (query, key))
        cos, sin = torch.randn(1, rows, head), torch.randn(1, rows, head)
        expected = apply_rotary_pos_emb(query, key, cos, sin)
        for x, rotated in zip((query, key), expected, strict=True):
            fused_kernels.rotate_(x[0], cos[0], sin[0])
            torch.testing.assert_close(x, rotated, rtol=1e-5, atol=1e-5)
        print("equal", rows, heads, head, width)


if __name__ == "__main__":
    kernels = {"paged_decode": paged_decode, "slot_products": slot_products, "few_rows": few_rows, "fused": fused}
    kernels[sys.argv[1]]()
