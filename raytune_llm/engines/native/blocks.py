"""The blocks of the paged cache: allocation and automatic prefix caching.

A block has the keys and values of `block_size` tokens. A full block is identified by a digest of its tokens, all tokens before
them, and the adapter's content. A row that begins with the same tokens and the same adapter shares the block instead of computing
it again. An adapter that was replaced under the same name has another digest, so it shares nothing with the old one.

Blocks that no row uses stay in the prefix cache until they are needed. The least recently used are reused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


class BlockPool:
    """Free and used blocks, by number. Not thread-safe: the engine's loop owns it."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._prefix_cache = prefix_cache
        self._holders = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """The free blocks in the order of reuse: those without content, then the least recently used."""

    @property
    def num_free(self) -> int:
        """The number of blocks that can be allocated, including unused ones of the prefix cache."""
        return len(self._free)

    @property
    def shares(self) -> bool:
        """Whether the prefix cache is on."""
        return self._prefix_cache

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, number: int) -> list[int] | None:
        """`number` empty blocks, or None if fewer are free."""
        if number > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(number)]
        for block in taken:
            self._forget(block)
            self._holders[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Release a row's blocks. Its last blocks will be reused first, since other requests more likely share its beginning."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if not self._holders[block]:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def cached_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The cached blocks for the longest prefix of these digests. The caller must release them."""
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
        """Add a full, computed block to the prefix cache. Of several blocks with one digest, the first is used."""
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
