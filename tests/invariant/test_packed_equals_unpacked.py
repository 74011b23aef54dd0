"""A row in a pack is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch

from raytune_llm.losses.tokens import cross_entropy
from tests.models import logits, packed, some_rows, tiny_llama

LENGTHS = [3, 17, 5, 40, 2]


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_logits_of_a_row_are_those_of_the_row_alone(backend: str) -> None:
    model, rows = tiny_llama(backend), some_rows(LENGTHS)
    together = model(packed(rows, length=80), logits)
    alone = torch.cat([model(packed([row]), logits) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_gradients_of_a_pack_are_the_sum_of_its_rows(backend: str) -> None:
    rows = some_rows(LENGTHS)
    together, alone = tiny_llama(backend), tiny_llama(backend)
    together(packed(rows, length=80), cross_entropy).sum().backward()
    for row in rows:
        alone(packed([row]), cross_entropy).sum().backward()
    for (name, a), (_, b) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_changing_a_row_leaves_the_others_bit_identical(backend: str) -> None:
    model, rows = tiny_llama(backend), some_rows(LENGTHS)
    before = model(packed(rows), logits)
    changed = list(rows)
    changed[1] = some_rows(LENGTHS, seed=9)[1]
    after = model(packed(changed), logits)
    trained = [len(ids) - len(ids) // 2 for ids, _ in rows]
    own = slice(trained[0], trained[0] + trained[1])
    assert not torch.equal(before[own], after[own])
    assert torch.equal(before[: own.start], after[: own.start])
    assert torch.equal(before[own.stop :], after[own.stop :])


def test_the_back_ends_agree() -> None:
    rows = some_rows(LENGTHS)
    out = {backend: tiny_llama(backend)(packed(rows), logits) for backend in ("varlen", "sdpa")}
    assert torch.allclose(out["varlen"], out["sdpa"], atol=1e-5)


def test_chunks_of_the_head_do_not_show() -> None:
    batch = packed(some_rows(LENGTHS))
    whole, chunked = tiny_llama(), tiny_llama()
    chunked.chunk_tokens = 4
    losses = [model(batch, cross_entropy) for model in (whole, chunked)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.sum().backward()
    for a, b in zip(whole.parameters(), chunked.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-5)


def test_a_batch_without_trained_tokens_gives_zero_and_zero_gradients() -> None:
    model = tiny_llama()
    (ids, spans) = some_rows([8])[0]
    loss = model(packed([(ids, spans[:0])]), cross_entropy)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
