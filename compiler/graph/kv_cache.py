"""Keys and values of all past tokens: static, updated in place, one pair of arrays a layer."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 16  # tokens whose keys lie side by side, so that one vector load serves 16 scores


@dataclass(frozen=True)
class CacheArray:
    """One array of a layer's cache; `name` follows "layers.N."."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class KvCache:
    """Room for `capacity` tokens, a multiple of BLOCK. dtype float16, float32, or int8 with scales."""

    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str

    @classmethod
    def for_context(cls, kv_heads: int, head_dim: int, context: int, dtype: str) -> KvCache:
        """The smallest cache that holds `context` tokens."""
        return cls(kv_heads, head_dim, -(-context // BLOCK) * BLOCK, dtype)

    @property
    def integer(self) -> bool:
        """Codes and scales instead of numbers."""
        return self.dtype == "int8"

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """Element d of key (h, t): [kv_heads, capacity / 16, head_dim, 16] at [h, t // 16, d, t % 16].

        Codes: [kv_heads, capacity / 16, head_dim / 2, 32] at [h, t // 16, d // 2, 2 * (t % 16) + d % 2].
        """
        blocks, pair = self.capacity // BLOCK, 2 if self.integer else 1
        return (self.kv_heads, blocks, self.head_dim // pair, BLOCK * pair)

    @property
    def value_shape(self) -> tuple[int, int, int]:
        """[kv_heads, capacity, head_dim]. Codes: element d of value (h, t) at [h, t // 2, 2 * d + t % 2], in

        [kv_heads, capacity / 2, 2 * head_dim rounded up to 32].
        """
        if self.integer:
            return (self.kv_heads, self.capacity // 2, 2 * -(-self.head_dim // BLOCK) * BLOCK)
        return (self.kv_heads, self.capacity, self.head_dim)

    @property
    def arrays(self) -> tuple[CacheArray, ...]:
        """In the order in which operators take them: keys, values, and the scales f32[kv_heads, capacity] of codes."""
        found = (CacheArray("k", self.dtype, self.key_shape), CacheArray("v", self.dtype, self.value_shape))
        if not self.integer:
            return found
        return (*found, *(CacheArray(f"{side}_scale", "float32", (self.kv_heads, self.capacity)) for side in "kv"))
