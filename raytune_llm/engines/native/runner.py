"""Runs the policy for the engine: pieces of rows -> a forward pass with the paged cache -> logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raytune_llm.data.batches import collate, to_device
from raytune_llm.engines.native.graphs import DecodeGraphs
from raytune_llm.engines.native.prompt_graphs import SIZES, PromptGraphs, lacks_for_prompt_graphs
from raytune_llm.engines.native.sampler import scored_tokens
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.native.scoring import ScoredText
from raytune_llm.engines.native.slots import Bank
from raytune_llm.engines.requests import ScoredToken
from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache, check_cached
from raytune_llm.models.policy import Policy
from raytune_llm.models.score_head import refuse_separate_head

NOTHING = np.zeros(0, np.int32)
LOGIT_TOKENS = 1024
"""The number of tokens whose logits are in memory at a time when answers are scored."""
POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden_ND: F.normalize(hidden_ND.mean(0), dim=0),
    "last": lambda hidden_ND: F.normalize(hidden_ND[-1], dim=0),
}
"""Pooling -> function from the hidden states of a text to a unit vector."""


class PolicyRunner:
    """A policy, its KV cache and its adapter slots on one device."""

    def __init__(
        self,
        policy: Policy,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        bank: Any = None,
        graphs: Callable[[PagedCache], DecodeGraphs] | None = None,
    ) -> None:
        """graphs: makes the CUDA graphs of decoding steps for the cache that is created here. None: no graphs."""
        check_cached(policy.base.config)
        self.num_blocks, self.block_size, self.device = num_blocks, block_size, device
        self.bank: Bank | None = bank
        self.vocab_size: int = policy.base.config.get_text_config().vocab_size
        self._policy: Any = policy
        self._bank = bank
        alike = 0 if graphs is None else policy.base.config.get_text_config().num_hidden_layers
        # One more block, for padding tokens.
        self._cache = PagedCache(num_blocks + (graphs is not None), block_size, dtype=policy.compute, device=device, alike=alike)
        self._graphs: DecodeGraphs | None = None
        self._prompts: PromptGraphs | None = None
        if graphs is not None:
            with self._eagerly(), torch.no_grad():
                policy.hidden(CachedRows.of(self._cache, [NewTokens([0], 0, [0])]))  # so that the cache has its shape
            self._graphs = graphs(self._cache)
            self._graphs.warm_up()
            if device.type == "cuda" and lacks_for_prompt_graphs(policy.base.config, policy.compute) is None:
                self._prompts = PromptGraphs(policy, self._cache, bank, spare=num_blocks, pool=self._graphs.pool)
                with self._eagerly():
                    self._prompts.warm_up()
        if device.type == "cuda":
            self._warm_up_long_steps()

    @property
    def sampled(self) -> Callable[[Tensor], None] | None:
        return None if self._graphs is None else self._graphs.sampled

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """float32 [R, V]: logits at the last token of each piece that samples, in their order."""
        if self._graphs is None:
            return self._as_written(pieces)
        decoding = list(takewhile(lambda piece: piece.stop - piece.start == 1 and piece.samples, pieces))
        rest = pieces[len(decoding) :]
        # Decoding first: the prompt graphs share its pool and may place outputs in memory that the decoding graphs write to.
        decoded_RV = self._graphs.run(decoding) if decoding else None
        if decoded_RV is not None and not rest:
            return decoded_RV
        captured = self._prompts is not None and self._prompts.takes(rest)
        of_rest_RV = self._prompts.run(rest) if captured and self._prompts is not None else self._as_written(rest)
        return of_rest_RV if decoded_RV is None else torch.cat([decoded_RV, of_rest_RV])

    def _as_written(self, pieces: Sequence[Piece]) -> Tensor:
        # Decoding rows first, then prompts sorted by slot, so that their tokens need no sorting.
        order = sorted(
            range(len(pieces)),
            key=lambda number: (pieces[number].stop - pieces[number].start > 1, self._rank(pieces[number].row.slot)),
        )
        rows = self._rows([pieces[number] for number in order])
        ends = dict(zip(order, rows.starts[1:], strict=True))
        # Created before the layers run, since a copy to the device would wait for them.
        wanted = [ends[number] - 1 for number, piece in enumerate(pieces) if piece.samples]
        wanted_R = torch.tensor(wanted, dtype=torch.int64, device=self.device)
        self._evaluates()
        with self._eagerly():
            hidden_1LD = self._policy.hidden(rows, self._routes([pieces[number] for number in order]))
        if not wanted:
            return torch.empty(0, self.vocab_size, device=self.device)
        return self._policy.logits(hidden_1LD[0, wanted_R])

    @torch.no_grad()
    def _warm_up_long_steps(self) -> None:
        """Compute a step that is longer than the captured ones, so that the first long prompt finds its kernels compiled."""
        number = SIZES[-1] // self.block_size + 1
        rows = CachedRows.of(self._cache, [NewTokens([0] * self.block_size, 0, [0])] * number)
        self._evaluates()
        with self._eagerly():
            self._policy.hidden(rows, self._route([0] * number, [self.block_size] * number))

    def read_adapter(self, folder: Path) -> tuple[Any, int]:
        refuse_separate_head(folder, "the adapter")
        weights = self._bank.read(folder)
        return weights, weights.rank

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, slot: int) -> list[list[float]]:
        """One vector per prompt, computed in packs without a cache, as in training. pooling: a key of POOLED, or `score` for a
        reward model."""
        lengths = [len(ids) for ids in prompts]
        rows = [(np.asarray(ids, np.int32), NOTHING) for ids in prompts]
        batch = to_device(collate([rows], length=sum(lengths), pad_id=0), self.device)
        route = {} if slot < 0 else self._route([slot] * len(prompts), lengths)
        self._evaluates()
        with self._eagerly():
            hidden_LD = self._policy.hidden(batch, route)[0].float()
        if pooling == "score":
            scored_MD = hidden_LD.index_select(0, self._policy.scored_positions(batch))
            return self._policy.scores_of(scored_MD).unsqueeze(1).tolist()
        return [POOLED[pooling](part_ND).tolist() for part_ND in hidden_LD.split(lengths)]

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int, *, top: int = 0
    ) -> list[list[ScoredToken]]:
        """The answers' tokens with log-probabilities, computed in packs without a cache, as in training. Consecutive one-token
        answers to the same prompt share its computation. An answer's last token is not an input."""
        documents: list[tuple[np.ndarray, np.ndarray]] = []
        places: list[int] = []
        """For each answer, the number of its document, which several one-token answers may share."""
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            assert prompt, "the first token has nothing to be predicted from"
            same = number > 0 and len(answer) == len(answers[number - 1]) == 1 and prompt == prompts[number - 1]
            if not same:
                documents.append((np.asarray([*prompt, *answer[:-1]], np.int32), NOTHING))
            places.append(len(documents) - 1)
        lengths = [len(ids) for ids, _ in documents]
        batch = to_device(collate([documents], length=sum(lengths), pad_id=0), self.device)
        route = {} if slot < 0 else self._route([slot] * len(documents), lengths)
        self._evaluates()
        with self._eagerly():
            hidden_LD = self._policy.hidden(batch, route)[0]
        first = list(accumulate(lengths, initial=0))
        positions, targets = [], []
        for place, prompt, answer in zip(places, prompts, answers, strict=True):
            positions += range(first[place] + len(prompt) - 1, first[place] + len(prompt) + len(answer) - 1)
            targets += answer
        scored = self._scored(hidden_LD, positions, targets, top)
        ends = list(accumulate(map(len, answers), initial=0))
        return [scored[start:stop] for start, stop in pairwise(ends)]

    def scored(self, texts: Sequence[ScoredText]) -> list[ScoredToken]:
        """The scored targets of all texts, in order. Of each text, only the tokens that are not in the cache are computed."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number].ids) - texts[number].computed > 1)
        ordered = [texts[number] for number in order]
        rows = CachedRows.of(self._cache, [NewTokens(text.ids[text.computed :], text.computed, text.blocks) for text in ordered])
        first = dict(zip(order, rows.starts, strict=False))
        route = self._route([text.slot for text in ordered], [len(text.ids) - text.computed for text in ordered])
        self._evaluates()
        with self._eagerly():
            hidden_LD = self._policy.hidden(rows, route)[0]
        numbered = [(first[number] - text.computed, text) for number, text in enumerate(texts)]
        positions = [shift + position for shift, text in numbered for position, _ in text.targets]
        return self._scored(hidden_LD, positions, [token for text in texts for _, token in text.targets])

    def _scored(self, hidden_LD: Tensor, positions: Sequence[int], targets: Sequence[int], top: int = 0) -> list[ScoredToken]:
        """Each target, scored as the token after its position. top: the number of likeliest tokens to return for each."""
        positions_N, targets_N = (torch.tensor(one, dtype=torch.int64, device=self.device) for one in (positions, targets))
        scored: list[ScoredToken] = []
        for position_C, target_C in zip(positions_N.split(LOGIT_TOKENS), targets_N.split(LOGIT_TOKENS), strict=True):
            scored += scored_tokens(self._policy.logits(hidden_LD[position_C]), target_C, top)
        return scored

    def _rows(self, pieces: Sequence[Piece]) -> CachedRows:
        """Pieces of one token first."""
        return CachedRows.of(self._cache, [NewTokens(row.ids[start:stop], start, row.blocks) for row, start, stop in pieces])

    def _routes(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._route([row.slot for row, *_ in pieces], [stop - start for _, start, stop in pieces])

    def _route(self, slots: Sequence[int], sizes: Sequence[int]) -> dict[str, Any]:
        """The layers' arguments with which each token uses its row's adapter."""
        if self._bank is None or all(slot < 0 for slot in slots):
            return {}
        slot_M = torch.tensor(slots)
        if max(sizes) == 1:
            return self._bank.by_tokens(slot_M.to(self.device))
        cu_seqlens_S = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(self.device)
        ranks = [self._rank(slot) for slot in slots]
        return self._bank.by_documents(slot_M, cu_seqlens_S, sum(sizes), in_order=ranks == sorted(ranks))

    def _rank(self, slot: int) -> int:
        """The sort key of a slot; rows without an adapter come last."""
        return slot if slot >= 0 or self._bank is None else self._bank.num_slots

    def _evaluates(self) -> None:
        """Switch to eval mode if necessary. Setting it in every module takes milliseconds."""
        if self._policy.training:
            self._policy.eval()

    def _eagerly(self) -> AbstractContextManager[Any]:
        """A context without torch.compile for layers that were compiled for training, since each step has another shape."""
        return torch.compiler.set_stance("force_eager")
