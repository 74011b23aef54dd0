"""Answers that share their request's tokens are computed as if each had a copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raytune_llm.data import store as token_store
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import Store
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.stages.logprobs import answer_logprobs
from tests.models import VOCABULARY, tiny_llama

MAX_LENGTH = 40
BACKENDS = ["varlen", "sdpa"]


def ids(length: int, draw: np.random.Generator) -> np.ndarray:
    return draw.integers(1, VOCABULARY, length).astype(np.int32)


def rows(seed: int = 0) -> list[PairRow]:
    """Requests and answers of very different lengths."""
    draw = np.random.default_rng(seed)
    lengths = [(1, 1, 1), (12, 3, 20), (30, 10, 1), (5, 30, 9), (20, 20, 20), (2, 7, 8), (17, 1, 5)]
    return [PairRow(*(ids(length, draw) for length in three)) for three in lengths]


def store_of(folder: Path, rows: Sequence[PairRow]) -> Store:
    with token_store.under_construction(folder, "key") as partial:
        assert partial is not None
        shards = [token_store.write_shard(partial / token_store.shard_name(0), rows, Dropped(), kind=KINDS["pairs"])]
        token_store.complete(partial, shards, {}, folder / "key", kind="pairs")
    return Store.open(folder / "key")


def logprobs(model: CausalLM, samples: Samples, together: int = 1) -> Tensor:
    """[rows, 2] in the order of the store, some samples at a time."""
    found: list[Tensor] = [torch.zeros(2)] * len(samples.store)
    for start in range(0, len(samples), together):
        numbers = np.arange(start, min(start + together, len(samples)))
        batch = samples.batch(numbers, micro_batch_size=together, pad_id=0)
        for row, both in zip(batch.rows, answer_logprobs(model, batch), strict=True):
            found[row] = both
    return torch.stack(found)


def samples_of(store: Store, *, packing: bool, share: bool) -> Samples:
    return Samples(store, np.arange(len(store)), max_length=MAX_LENGTH, packing=packing, share_prompts=share)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("packing", "together"), [(False, 1), (False, 3), (True, 1), (True, 2)])
def test_shared_requests_give_the_logprobs_and_gradients_of_copied_ones(
    backend: str, packing: bool, together: int, tmp_path: Path
) -> None:
    store = store_of(tmp_path, rows())
    plain, shared = tiny_llama(backend), tiny_llama(backend)
    weights_R2 = torch.randn(len(store), 2, generator=torch.Generator().manual_seed(1))
    wanted = logprobs(plain, samples_of(store, packing=False, share=False))
    got = logprobs(shared, samples_of(store, packing=packing, share=True), together)
    assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-5)
    (wanted * weights_R2).sum().backward()
    (got * weights_R2).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5 * float(a.grad.abs().max())), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_a_pair_leaves_the_others_bit_identical(backend: str, tmp_path: Path) -> None:
    model, before = tiny_llama(backend), rows()
    after = list(before)
    after[3] = rows(seed=9)[3]
    first, second = (
        logprobs(model, samples_of(store_of(tmp_path / str(n), these), packing=True, share=True))
        for n, these in enumerate((before, after))
    )
    changed = (first != second).any(1)
    assert changed.tolist() == [row == 3 for row in range(len(before))]


def test_neither_answer_sees_the_other(tmp_path: Path) -> None:
    model, before = tiny_llama(), rows()
    swapped = [PairRow(row.prompt_ids, row.rejected_ids, row.chosen_ids) for row in before]
    first, second = (
        logprobs(model, samples_of(store_of(tmp_path / str(n), these), packing=True, share=True))
        for n, these in enumerate((before, swapped))
    )
    assert torch.allclose(first, second.flip(1), atol=1e-5)


def test_shared_requests_take_fewer_tokens_and_no_less_training(tmp_path: Path) -> None:
    store = store_of(tmp_path, rows())
    plain, shared = (samples_of(store, packing=False, share=share) for share in (False, True))
    for samples in (plain, shared):
        for sample in range(len(samples)):
            assert samples.tokens[sample] == sum(len(document.ids) for document in samples[sample])
    batches = [samples.batch(np.arange(7), micro_batch_size=7, pad_id=0) for samples in (plain, shared)]
    assert len(batches[0].trained_N) == len(batches[1].trained_N)
    assert plain.tokens.sum() > shared.tokens.sum()
    assert plain.counts.sum() == shared.counts.sum() == 7
