"""Given answers, scored over the paged cache: what prompts begin with alike (the examples of a benchmark) is computed once.

Texts are computed in waves. One that begins with blocks which another text of the same wave fills waits for the next wave, and
finds them in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raytune_llm.engines.native.blocks import BlockPool, digest, root
from raytune_llm.engines.requests import ScoredToken


@dataclass
class ScoredText:
    """A prompt with an answer, or with several answers of one token."""

    ids: list[int]
    """Without the answer's last token, which is only predicted."""
    slot: int
    """Of the adapter; -1: the model alone."""
    targets: list[tuple[int, int]]
    """Positions, and the tokens that are scored there, as what follows."""
    computed: int = 0
    """Tokens whose keys and values are in the blocks."""
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the full blocks before the first target."""


def texts_of(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int, version: str, block_size: int
) -> list[ScoredText]:
    """In their order. Answers of one token to the same prompt, one after another, are one text's."""
    texts: list[ScoredText] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert prompt, "the first token has nothing to be predicted from"
        first = len(prompt) - 1
        if number > 0 and len(answer) == len(answers[number - 1]) == 1 and prompt == prompts[number - 1]:
            texts[-1].targets.append((first, answer[0]))
            continue
        text = ScoredText([*prompt, *answer[:-1]], slot, [(first + place, token) for place, token in enumerate(answer)])
        parent = root(version)
        for at in range(0, first - first % block_size, block_size):
            text.digests.append(parent := digest(text.ids[at : at + block_size], parent))
        texts.append(text)
    return texts


def over_the_cache(
    texts: Sequence[ScoredText], blocks: BlockPool, compute: Callable[[Sequence[ScoredText]], Sequence[ScoredToken]]
) -> list[ScoredToken] | None:
    """The targets of all texts, in order. compute: those of a wave. None: others hold the blocks."""
    found: dict[int, list[ScoredToken]] = {}
    left = list(texts)
    while left:
        wave = next_wave(left, blocks)
        if not wave:
            return None
        computed = False
        try:
            scored = iter(compute(wave))
            computed = True
        finally:
            end_wave(wave, blocks, computed=computed)
        for text in wave:
            found[id(text)] = [next(scored) for _ in text.targets]
        left = [text for text in left if id(text) not in found]
    return [token for text in texts for token in found[id(text)]]


def next_wave(texts: Sequence[ScoredText], blocks: BlockPool) -> list[ScoredText]:
    """Those that are computed next, with blocks that `end_wave` gives back; none where no block is free."""
    wave: list[ScoredText] = []
    filled: set[bytes] = set()
    for text in texts:
        if not filled.isdisjoint(text.digests):
            continue
        found = blocks.cached_prefix(text.digests)
        new = blocks.allocate(blocks.blocks_for(len(text.ids)) - len(found))
        if new is None:
            blocks.release(found)
            break
        text.blocks, text.computed = [*found, *new], len(found) * blocks.block_size
        filled.update(text.digests[len(found) :])
        wave.append(text)
    return wave


def end_wave(wave: Sequence[ScoredText], blocks: BlockPool, *, computed: bool) -> None:
    for text in wave:
        for block, known in zip(text.blocks, text.digests, strict=False) if computed else ():
            blocks.publish(block, known)
        blocks.release(text.blocks)
