"""Sizes of the cache."""

from __future__ import annotations

from compiler.graph.kv_cache import BLOCK, KvCache


def test_shapes_by_hand() -> None:  # 40 positions take 3 blocks of 16
    cache = KvCache.for_context(4, 32, 40, "float16")
    assert (cache.capacity, cache.dtype) == (48, "float16")
    assert cache.key_shape == (4, 3, 32, 16)
    assert cache.value_shape == (4, 48, 32)


def test_capacity_is_the_next_multiple_of_a_block() -> None:
    for context in range(1, 4 * BLOCK):
        capacity = KvCache.for_context(1, 2, context, "float32").capacity
        assert capacity % BLOCK == 0
        assert context <= capacity < context + BLOCK
