from __future__ import annotations

from raytune_llm.engines.native.blocks import BlockPool, digest, root


def chain(ids: list[int], size: int, adapter: str = "") -> list[bytes]:
    found = [root(adapter)]
    for at in range(0, len(ids) - size + 1, size):
        found.append(digest(ids[at : at + size], found[-1]))
    return found[1:]


def test_more_blocks_than_there_are_are_not_given_out():
    pool = BlockPool(4, 8)
    assert pool.allocate(5) is None
    assert sorted(pool.allocate(4) or []) == [0, 1, 2, 3]
    assert pool.allocate(1) is None


def test_a_prefix_is_found_after_its_row_left_and_until_its_block_is_needed():
    pool = BlockPool(3, 2)
    (first, second), digests = pool.allocate(2) or [], chain([1, 2, 3, 4], 2)
    pool.publish(first, digests[0])
    pool.publish(second, digests[1])
    pool.release([first, second])
    assert pool.cached_prefix(digests) == [first, second]
    assert pool.num_free == 1
    pool.release([first, second])
    assert pool.allocate(3) is not None
    assert pool.cached_prefix(digests) == []


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back():
    pool = BlockPool(1, 2)
    (block,), (one,) = pool.allocate(1) or [], chain([1, 2], 2)
    pool.publish(block, one)
    assert pool.cached_prefix([one]) == [block]
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_adapters_share_no_prefix():
    assert not set(chain([1, 2, 3, 4], 2, "a")) & set(chain([1, 2, 3, 4], 2, "b"))
    assert not set(chain([1, 2, 3, 4], 2)) & set(chain([1, 2, 3, 4], 2, "b"))


def test_a_digest_holds_all_that_stood_before():
    assert chain([1, 2, 3, 4], 2)[1] != chain([9, 2, 3, 4], 2)[1]
