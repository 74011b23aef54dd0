"""A toy language model for what surrounds models: its cache holds what was written, so a wrong block, order or adapter shows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raytune_llm.engines.native.sampler import scored_tokens
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.requests import ScoredToken
from raytune_llm.errors import DataError

V, END = 97, 0
BROKEN_ONCE = -2
"""Weights that whoever reads them second falls over."""
WORDS = [chr(0x4E00 + number) for number in range(V)]


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(WORDS[id] for id in ids)


class ToyBank:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: dict[int, int] = {}

    def load(self, slot: int, weights: int) -> None:
        self.held[slot] = weights

    def clear(self, slot: int) -> None:
        del self.held[slot]


class ToyRunner:
    """Keys are tokens with what computed them."""

    device = torch.device("cpu")

    def __init__(
        self, num_blocks: int = 64, block_size: int = 4, slots: int = 4, vocab_size: int = V, runs_ahead: bool = False
    ) -> None:
        self.vocab_size, self.runs_ahead = vocab_size, runs_ahead
        self.tokens: list[int] = []
        """Those of the last step."""
        self.num_blocks, self.block_size, self.bank = num_blocks, block_size, ToyBank(slots)
        self.cache: list[Any] = [None] * num_blocks * block_size
        self.steps: list[list[Piece]] = []
        self.passes: list[tuple[int, list[list[int]]]] = []
        """Steps before it, and texts."""
        self.delay_s = 0.0
        self.go = threading.Event()
        self.go.set()

    def run(self, pieces: list[Piece]) -> torch.Tensor:
        self.go.wait()
        time.sleep(self.delay_s)
        self.steps.append(list(pieces))
        logits = []
        for row, start, stop in pieces:
            weights = 0 if row.slot < 0 else self.bank.held[row.slot]
            places = [block * self.block_size + at for block in row.blocks for at in range(self.block_size)][:stop]
            assert self.runs_ahead or min(row.ids) >= 0
            ids = [self.tokens[-1 - id] if id < 0 else id for id in row.ids]
            for at in range(start, stop):
                self.cache[places[at]] = (ids[at], weights)
            assert [self.cache[place] for place in places] == [(id, weights) for id in ids[:stop]]
            if stop == len(ids):
                values = torch.zeros(self.vocab_size)
                values[following(ids, weights)] = 1.0
                logits.append(values)
        return torch.stack(logits) if logits else torch.zeros(0, V)

    @property
    def sampled(self) -> Callable[[torch.Tensor], None] | None:
        return self._sampled if self.runs_ahead else None

    def _sampled(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens.tolist()

    def pooled(self, prompts: list[list[int]], pooling: str, slot: int) -> list[list[float]]:
        self.passes.append((len(self.steps), prompts))
        return [[float(sum(ids)), float(slot if slot < 0 else self.bank.held[slot])] for ids in prompts]

    def answer_logprobs(self, prompts: Any, answers: Any, slot: int, *, top: int = 0) -> list[list[ScoredToken]]:
        self.passes.append((len(self.steps), prompts))
        weights = 0 if slot < 0 else self.bank.held[slot]
        scored = []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = torch.zeros(len(answer), self.vocab_size)
            for at in range(len(answer)):
                logits[at, following([*prompt, *answer[:at]], weights)] = 1.0
            scored.append(scored_tokens(logits, torch.tensor(answer), top))
        return scored

    def read_adapter(self, folder: Path) -> tuple[int, int]:
        weights = json.loads((folder / "adapter_model.safetensors").read_text())
        if weights == BROKEN_ONCE:
            (folder / "was_read").touch(exist_ok=False)
        elif weights < 0:
            raise DataError(str(folder), "doesn't fit")
        return weights, 8


def following(ids: list[int], weights: int, but: tuple[int, ...] = ()) -> int:
    """The next token; where it is one of `but`, the least other one."""
    token = 1 + (sum(id * (at + 1) for at, id in enumerate(ids)) * 31 + weights * 7) % (V - 1)
    return token if token not in but else next(other for other in range(V) if other not in but)


def answer(prompt: list[int], weights: int, tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(following(ids, weights))
    return ids[len(prompt) :]


def adapter_folder(path: Path, weights: int) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_text(json.dumps(weights))
    (path / "adapter_config.json").write_text("{}")
    return path
