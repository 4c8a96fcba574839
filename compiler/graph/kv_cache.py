"""Keys and values of all past tokens: static, updated in place, one pair of arrays a layer."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 16  # tokens whose keys lie side by side, so that one vector load serves 16 scores


@dataclass(frozen=True)
class KvCache:
    """Room for `capacity` tokens, a multiple of BLOCK. dtype float16 or float32."""

    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str

    @classmethod
    def for_context(cls, kv_heads: int, head_dim: int, context: int, dtype: str) -> KvCache:
        """The smallest cache that holds `context` tokens."""
        return cls(kv_heads, head_dim, -(-context // BLOCK) * BLOCK, dtype)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """[kv_heads, capacity / 16, head_dim, 16]: element (h, t, d) lies at [h, t // 16, d, t % 16]."""
        return (self.kv_heads, self.capacity // BLOCK, self.head_dim, BLOCK)

    @property
    def value_shape(self) -> tuple[int, int, int]:
        """[kv_heads, capacity, head_dim]."""
        return (self.kv_heads, self.capacity, self.head_dim)
