"""Scoring given answers with the prefix cache: common beginnings of prompts (the examples of a benchmark) are computed once.

Texts are computed in waves of limited size. A text that shares its first blocks with another text of the same wave waits for the
next wave, when these are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raytune_llm.engines.native.blocks import BlockPool, digest, root
from raytune_llm.engines.native.passes import in_packs
from raytune_llm.engines.requests import ScoredToken


@dataclass
class ScoredText:
    """A prompt with an answer, or with several answers of one token."""

    ids: list[int]
    """Without the answer's last token, which is not an input."""
    targets: list[tuple[int, int]]
    """(position, the token that is scored as the next one), ..."""
    slot: int = -1
    """The adapter's slot in this wave; -1: no adapter."""
    computed: int = 0
    """The number of tokens whose keys and values are in the blocks."""
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """The digests of the full blocks before the first target."""

    def questions(self) -> Iterator[tuple[list[int], list[int]]]:
        """Each prompt with its answer."""
        tokens = [token for _, token in self.targets]
        prompt = self.ids[: self.targets[0][0] + 1] if tokens else self.ids
        shares = len(prompt) == len(self.ids) and len(tokens) > 1
        answers = [[token] for token in tokens] if shares else [tokens]
        return ((prompt, answer) for answer in answers)


class Scoring(Protocol):
    """The part of the engine's Runner that computes texts."""

    def scored(self, texts: Sequence[ScoredText]) -> Sequence[ScoredToken]: ...

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int
    ) -> list[list[ScoredToken]]: ...


def texts_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], version: str, block_size: int
) -> list[ScoredText]:
    """The texts, in order. Consecutive one-token answers to the same prompt become one text."""
    texts: list[ScoredText] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert prompt, "the first token has nothing to be predicted from"
        first = len(prompt) - 1
        if number > 0 and len(answer) == len(answers[number - 1]) == 1 and prompt == prompts[number - 1]:
            texts[-1].targets.append((first, answer[0]))
            continue
        text = ScoredText([*prompt, *answer[:-1]], [(first + place, token) for place, token in enumerate(answer)])
        parent = root(version)
        for at in range(0, first - first % block_size, block_size):
            text.digests.append(parent := digest(text.ids[at : at + block_size], parent))
        texts.append(text)
    return texts


class Waves:
    """Computes texts in waves. Between two waves, other requests may use the cache."""

    def __init__(self, texts: Sequence[ScoredText], blocks: BlockPool, runner: Scoring, *, limit: int) -> None:
        """limit: the maximum number of tokens in a wave; a single text may be longer."""
        self._texts, self._blocks, self._runner, self._limit = texts, blocks, runner, limit
        self.left = list(texts)
        self._found: dict[int, Sequence[ScoredToken]] = {}

    def scored(self) -> list[ScoredToken]:
        """The scored targets of all texts, in order. To be called after the last wave."""
        return [token for text in self._texts for token in self._found[id(text)]]

    def compute(self, slot: int) -> None:
        """The next wave, with the adapter in the slot."""
        for text in self.left:
            text.slot = slot
        wave = next_wave(self.left, self._blocks, limit=self._limit)
        if wave:
            computed = False
            try:
                scored = iter(self._runner.scored(wave))
                computed = True
            finally:
                end_wave(wave, self._blocks, computed=computed)
        else:  # others hold the blocks
            wave = self.left[in_packs([len(text.ids) for text in self.left], self._limit)[0]]
            prompts, answers = zip(*(question for text in wave for question in text.questions()), strict=True)
            scored = (token for tokens in self._runner.answer_logprobs(prompts, answers, slot) for token in tokens)
        self._found |= {id(text): [next(scored) for _ in text.targets] for text in wave}
        self.left = [text for text in self.left if id(text) not in self._found]


def next_wave(texts: Sequence[ScoredText], blocks: BlockPool, *, limit: int) -> list[ScoredText]:
    """The texts to compute next, with allocated blocks that `end_wave` releases; empty if no block is free."""
    wave: list[ScoredText] = []
    filled: set[bytes] = set()
    tokens = 0
    for text in texts:
        if not filled.isdisjoint(text.digests):
            continue
        found = blocks.cached_prefix(text.digests)
        size = len(text.ids) - len(found) * blocks.block_size
        new = None if wave and tokens + size > limit else blocks.allocate(blocks.blocks_for(len(text.ids)) - len(found))
        if new is None:
            blocks.release(found)
            break
        text.blocks, text.computed = [*found, *new], len(found) * blocks.block_size
        filled.update(text.digests[len(found) :])
        wave.append(text)
        tokens += size
    return wave


def end_wave(wave: Sequence[ScoredText], blocks: BlockPool, *, computed: bool) -> None:
    for text in wave:
        for block, known in zip(text.blocks, text.digests, strict=False) if computed else ():
            blocks.publish(block, known)
        blocks.release(text.blocks)
