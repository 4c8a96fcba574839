"""Sizes of the cache."""

from __future__ import annotations

from compiler.graph.kv_cache import BLOCK, KvCache


def test_shapes_by_hand() -> None:  # 40 positions take 3 blocks of 16
    cache = KvCache.for_context(4, 32, 40, "float16")
    assert (cache.capacity, cache.dtype) == (48, "float16")
    assert cache.key_shape == (4, 3, 32, 16)
    assert cache.value_shape == (4, 48, 32)


def test_int8_shapes_by_hand() -> None:  # keys in pairs of elements, values in pairs of tokens, 20 elements take 32
    cache = KvCache.for_context(4, 20, 40, "int8")
    assert [(a.name, a.dtype, a.shape) for a in cache.arrays] == [
        ("k", "int8", (4, 3, 10, 32)),
        ("v", "int8", (4, 24, 64)),
        ("k_scale", "float32", (4, 48)),
        ("v_scale", "float32", (4, 48)),
    ]


def test_capacity_is_the_next_multiple_of_a_block() -> None:
    for context in range(1, 4 * BLOCK):
        capacity = KvCache.for_context(1, 2, context, "float32").capacity
        assert capacity % BLOCK == 0
        assert context <= capacity < context + BLOCK
