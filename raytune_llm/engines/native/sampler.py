"""Sampling the next token of every row on the device, from logits [R, V].

Rows are independent of each other. A row's n-th random number depends only on its seed and n (Philox, Salmon et al. 2011, with
counter n and key seed), so a seed gives the same answer in any batch. The token is found by inverting the cumulative
distribution, with tokens in descending order of probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_llm.engines.requests import Sampling, ScoredToken, TokenLogprob

LIKELIEST = 256
"""On a CPU, tokens are drawn among so many likeliest ones if that suffices, since sorting a whole vocabulary takes milliseconds a
row. At temperature 1, it nearly always does."""
MIN_TEMPERATURE = 1e-5
"""Below it the likeliest token is drawn anyway, and a quotient of a logit may be infinite."""


@dataclass(eq=False)
class RowSampler:
    """The sampling state of one row."""

    sampling: Sampling
    end_ids: tuple[int, ...]
    prompt_ids: Sequence[int]
    drawn: int = 0
    """The number of tokens of the answer so far, including those that the host has not read."""
    seen_V: Tensor | None = field(default=None, repr=False)
    """bool [V]: the tokens that occur in prompt or answer; only set if a penalty needs it."""
    counts_V: Tensor | None = field(default=None, repr=False)
    """float32 [V]: how often each token occurs in the answer."""

    @property
    def penalized(self) -> bool:
        s = self.sampling
        return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0

    def count(self, token: int) -> None:
        """Count a token of the answer."""
        if self.counts_V is not None and self.seen_V is not None:
            self.counts_V[token] += 1
            self.seen_V[token] = True

    def _counted(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.seen_V is None or self.counts_V is None:
            self.seen_V = torch.zeros(size, dtype=torch.bool, device=device)
            self.seen_V[torch.as_tensor(list(self.prompt_ids), device=device)] = True
            self.counts_V = torch.zeros(size, device=device)
        return self.seen_V, self.counts_V

    def change(self, logits_V: Tensor) -> None:
        """Apply penalties and biases in place."""
        s = self.sampling
        if self.penalized:
            seen_V, counts_V = self._counted(len(logits_V), logits_V.device)
            if s.repetition_penalty != 1.0:
                changed_V = torch.where(logits_V > 0, logits_V / s.repetition_penalty, logits_V * s.repetition_penalty)
                logits_V.copy_(torch.where(seen_V, changed_V, logits_V))
            logits_V -= s.frequency_penalty * counts_V + s.presence_penalty * (counts_V > 0)
        if s.logit_bias:
            tokens, biases = zip(*s.logit_bias, strict=True)
            logits_V[_on(logits_V.device, tokens, torch.int64)] += _on(logits_V.device, biases, logits_V.dtype)
        if s.among:
            candidates_K = _on(logits_V.device, s.among, torch.int64)
            kept_K = logits_V[candidates_K]
            logits_V.fill_(-torch.inf)[candidates_K] = kept_K

    @property
    def forbidden(self) -> tuple[int, ...]:
        """The tokens that would end the answer, if it may not end yet; else none."""
        return self.end_ids if self.sampling.ignore_end or self.drawn < self.sampling.min_new_tokens else ()

    @property
    def changes(self) -> bool:
        return self.penalized or bool(self.sampling.logit_bias or self.sampling.among)


def sample(logits_RV: Tensor, rows: Sequence[RowSampler], bitmask_RW: Tensor | None = None) -> Tensor:
    """The next tokens, int64 [R]. logits_RV: float32, changed in place. bitmask_RW: int32, one bit per token that a row's grammar
    allows (all ones for rows without one). If an answer may not end yet but its grammar allows nothing else, it ends."""
    for number, row in enumerate(rows):
        if row.changes:
            row.change(logits_RV[number])
    if bitmask_RW is not None:
        logits_RV.masked_fill_(~allowed(bitmask_RW, logits_RV.shape[1]), -torch.inf)
    forbidden = [(number, token) for number, row in enumerate(rows) for token in row.forbidden]
    if forbidden:
        row_N, token_N = _on(logits_RV.device, forbidden, torch.int64).T
        ends_N = logits_RV[row_N, token_N]
        logits_RV[row_N, token_N] = -torch.inf
        only_ends_R = logits_RV.amax(dim=1) == -torch.inf
        logits_RV[row_N, token_N] = torch.where(only_ends_R[row_N], ends_N, -torch.inf)
    tokens_R = logits_RV.argmax(dim=1)
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        index = _on(logits_RV.device, drawn, torch.int64)
        tokens_R[index] = _draw(logits_RV[index], [rows[number] for number in drawn])
    return tokens_R


def _on(device: torch.device, numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The numbers as a tensor on the device. Copied from page-locked memory, since other copies wait for the running step."""
    held = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return held.to(device, non_blocking=True)


def allowed(bitmask_RW: Tensor, size: int) -> Tensor:
    """bool [R, size] from one bit per token, lowest bit first."""
    bits = torch.arange(32, device=bitmask_RW.device, dtype=torch.int32)
    return ((bitmask_RW[:, :, None] >> bits) & 1).bool().flatten(1)[:, :size]


def _draw(logits_KV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    device, size = logits_KV.device, logits_KV.shape[1]
    settings = [row.sampling for row in rows]
    numbers = [
        (uniform(s.seed, row.drawn), max(s.temperature, MIN_TEMPERATURE), min(s.top_k or size, size), s.top_p, s.min_p)
        for s, row in zip(settings, rows, strict=True)
    ]
    columns_5K1 = _on(device, numbers, torch.float32).T[:, :, None]
    probs_KV = torch.softmax(logits_KV / columns_5K1[1], dim=1)
    if device.type != "cpu" or size <= 2 * LIKELIEST:
        sorted_KV, order_KV = probs_KV.sort(dim=1, descending=True)
        return order_KV.gather(1, _places(sorted_KV, settings, columns_5K1)[0]).squeeze(1)
    # All other tokens are one more, the last. Where that is drawn, or a limit lies within it, the row is drawn among all tokens.
    likeliest_KN, order_KN = probs_KV.topk(LIKELIEST, dim=1)
    rest_K1 = (1 - likeliest_KN.sum(dim=1, keepdim=True)).clamp_min(0)
    min_p_K1 = torch.tensor([[0.0 if s.top_k else s.min_p] for s in settings])
    rest_K1[likeliest_KN[:, -1:] < likeliest_KN[:, :1] * min_p_K1] = 0  # none of them is a candidate
    place_K1, keeps_rest_K1 = _places(torch.cat([likeliest_KN, rest_K1], dim=1), settings, columns_5K1)
    limited_K = torch.tensor([bool(s.top_k) or s.top_p < 1 or s.min_p > 0 for s in settings])
    open_K = (place_K1.squeeze(1) == LIKELIEST) | (keeps_rest_K1.squeeze(1) & limited_K)
    tokens_K = order_KN.gather(1, place_K1.clamp_max(LIKELIEST - 1)).squeeze(1)
    if open_K.any():
        sorted_MV, order_MV = probs_KV[open_K].sort(dim=1, descending=True)
        place_M1, _ = _places(sorted_MV, list(compress(settings, open_K)), columns_5K1[:, open_K])
        tokens_K[open_K] = order_MV.gather(1, place_M1).squeeze(1)
    return tokens_K


def _places(probs_KV: Tensor, settings: Sequence[Sampling], columns_5K1: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each row's token among its probabilities, which are in descending order (int64 [K, 1]), and whether the last
    place is a candidate (bool [K, 1])."""
    uniform_K1, _, top_k_K1, top_p_K1, min_p_K1 = columns_5K1
    kept_KV = torch.ones_like(probs_KV, dtype=torch.bool)
    if any(s.top_k for s in settings):
        kept_KV &= torch.arange(probs_KV.shape[1], device=probs_KV.device) < top_k_K1
        probs_KV = probs_KV * kept_KV
        probs_KV = probs_KV / probs_KV.sum(dim=1, keepdim=True)  # top_p applies to the distribution after top_k
    if any(s.top_p < 1 for s in settings):
        before_KV = probs_KV.cumsum(dim=1) - probs_KV
        kept_KV &= before_KV < top_p_K1
    if any(s.min_p for s in settings):
        kept_KV &= probs_KV >= probs_KV[:, :1] * min_p_K1
    kept_KV[:, 0] = True
    cumulated_KV = (probs_KV * kept_KV).cumsum(dim=1)
    place_K1 = torch.searchsorted(cumulated_KV, uniform_K1 * cumulated_KV[:, -1:], right=True)
    last_K1 = kept_KV.sum(dim=1, keepdim=True) - 1
    return torch.minimum(place_K1, last_K1), kept_KV[:, -1:]


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    bits = np.random.Philox(key=seed % 2**64, counter=number).random_raw()
    return (int(bits) >> 11) / 2**53


def scored_tokens(logits_NV: Tensor, targets_N: Tensor, top: int = 0) -> list[ScoredToken]:
    """The targets with their log-probabilities, and the `top` likeliest tokens of each. logits_NV: float32, unmodified."""
    values_NV = logits_NV.log_softmax(dim=1)
    chosen = values_NV.gather(1, targets_N[:, None]).squeeze(1).tolist()
    likeliest = (logits_NV.argmax(dim=1) == targets_N).tolist()
    if not top:
        return list(map(ScoredToken, chosen, likeliest))
    value_NK, token_NK = values_NV.topk(min(top, values_NV.shape[1]), dim=1)
    best = [tuple(zip(t, v, strict=True)) for t, v in zip(token_NK.tolist(), value_NK.tolist(), strict=True)]
    return list(map(ScoredToken, chosen, likeliest, best))


def logprobs(logits_RV: Tensor, tokens_R: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens, and of the `top` likeliest ones. Logits are the model's own, float32."""
    values_RV = torch.log_softmax(logits_RV, dim=1)
    chosen = values_RV.gather(1, tokens_R[:, None]).squeeze(1).tolist()
    best: list[tuple[tuple[int, float], ...]] = [()] * len(chosen)
    if top:
        value_RK, token_RK = values_RV.topk(min(top, values_RV.shape[1]), dim=1)
        best = [tuple(zip(t, v, strict=True)) for t, v in zip(token_RK.tolist(), value_RK.tolist(), strict=True)]
    return [
        TokenLogprob(token=token, logprob=value, top=likeliest)
        for token, value, likeliest in zip(tokens_R.tolist(), chosen, best, strict=True)
    ]
