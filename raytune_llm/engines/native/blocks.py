"""Blocks of the paged cache: who holds which, and which hold a beginning that another row has as well.

A block holds the keys and values of `block_size` tokens of one row. A full block is known by a digest of its tokens, of all that
came before them, and of the adapter that computed them. A row that begins with the same tokens under the same adapter takes the
block over instead of computing it again (automatic prefix caching). The adapter is in the digest by its content, so a folder that
was replaced under the same name shares nothing with what was there before.

Blocks that nobody holds stay findable until they are needed, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


class BlockPool:
    """Free and held blocks, by number. Not thread-safe: the engine's loop owns it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._prefix_cache = prefix_cache
        self._holders = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """The next to be given out first: blocks without content, then the least recently used."""

    @property
    def num_free(self) -> int:
        """Blocks that can be given out, those that still hold a findable prefix among them."""
        return len(self._free)

    @property
    def shares(self) -> bool:
        """Prefixes can be found."""
        return self._prefix_cache

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, number: int) -> list[int] | None:
        """So many empty blocks, or None where there are not as many free ones."""
        if number > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            self._forget(block)
            self._holders[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Given back by one holder. A row's last blocks are reused first: its beginning is likelier to be asked for again."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if not self._holders[block]:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def cached_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The longest run of blocks, from the first digest on, whose content is here; held by the caller from now on."""
        found: list[int] = []
        for digest in digests if self._prefix_cache else ():
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._free.pop(block, None)
            self._holders[block] += 1
        return found

    def publish(self, block: int, digest: bytes) -> None:
        """The block is full and computed: others may find it. The first block with a digest stays the one that is found."""
        if self._prefix_cache and digest not in self._block_of and self._digest_of[block] is None:
            self._digest_of[block] = digest
            self._block_of[digest] = block

    def _forget(self, block: int) -> None:
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None


def root(adapter: str) -> bytes:
    """The hash before the first block: the adapter's digest, or "" for the base model."""
    return blake2b(adapter.encode(), digest_size=16).digest()


def digest(ids: Sequence[int], parent: bytes) -> bytes:
    """The digest of a full block of tokens after the blocks with the digest `parent`."""
    return blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16, key=parent).digest()
