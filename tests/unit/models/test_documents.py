"""Blocks of a mask are those that the mask has something in."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from raytune_llm.models.documents import BLOCK, block_masks, document_mask
from raytune_llm.records import Prefixes


def dense(mask: BlockMask, *, full: bool) -> torch.Tensor:
    """[B, N, N]"""
    counts, indices = (mask.full_kv_num_blocks, mask.full_kv_indices) if full else (mask.kv_num_blocks, mask.kv_indices)
    assert counts is not None and indices is not None
    taken = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(indices, dtype=torch.bool).scatter(-1, indices.long(), taken)[:, 0]


def boundaries(tokens: int, documents: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    inner = torch.randperm(tokens - 1, generator=draw)[: documents - 1] + 1
    return torch.tensor([0, *sorted(inner.tolist()), tokens])


@pytest.mark.parametrize("T", [BLOCK, 5 * BLOCK, 4 * BLOCK + 37])
@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("documents", [1, 3, 40])
def test_blocks_follow_from_boundaries_as_from_the_mask_itself(T, window, documents):
    bounds = torch.cat([boundaries(T, documents, seed=T), T + boundaries(T, 2, seed=1)[1:]])
    for size, ours in block_masks(bounds, 2, T, window).items():
        wanted = create_block_mask(ours.mask_mod, 2, None, T, T, device="cpu")
        for full in (False, True):
            assert torch.equal(dense(ours, full=full), dense(wanted, full=full)), (size, full)
        assert ours.shape == wanted.shape


def test_blocks_hold_what_documents_go_on_from():
    T, bounds = 1000, torch.tensor([0, 400, 700, 1000])
    queries, keys = torch.arange(400, 1000), torch.cat([torch.arange(0, 300), torch.arange(0, 150)])
    prefixes = Prefixes(queries, keys, torch.tensor([0, 300, 600]), torch.tensor([0, 300, 450]), 300, 300)
    ours = block_masks(bounds, 1, T, None, prefixes)[0]
    mask = F.pad(document_mask(bounds, 1, T, None, prefixes)[:, 0], (0, -T % BLOCK, 0, -T % BLOCK))
    in_blocks = mask.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(3)
    partial, full = dense(ours, full=False), dense(ours, full=True)
    assert not (partial & full).any()
    assert torch.equal(partial | full, in_blocks.any(3))
    assert in_blocks.all(3)[full].all()
