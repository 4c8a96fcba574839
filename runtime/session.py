"""One conversation with a model: its caches, where it is in the context, and the calls that move it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional, Sequence, Union

from . import arrays
from .arrays import Array, np
from .bundle import Bundle
from .errors import ContextFullError, InputError
from .manifest import Manifest

Ids = Union[Sequence[int], Array]

CALL_COST_TOKENS = 4  # a call reads all weights once, which takes about as long as computing this many prompt tokens

# Of AMX. Its kernels take two tiles of rows at once: by count, 32 rows cost what 15 cost on AVX512-VNNI. Not timed.
TILE_ROWS = 16


class Chunk(NamedTuple):
    """One call of a prefill plan: a function of `tokens` rows, of which the first `valid` are used."""

    tokens: int
    valid: int


class Planner:
    """Cut a prompt into calls: fewest rows in all, padding included, plus CALL_COST_TOKENS for each call.

    `sizes` always has 1 (decode). Costs are found once for each length up to the longest asked for: plans are exact.
    counted: the tokens of a function that takes any number up to that; then no other is called, and nothing is padded.
    """

    def __init__(self, sizes: Sequence[int], call_cost: int = CALL_COST_TOKENS, counted: int = 0) -> None:
        self.sizes, self.call_cost, self.counted = sorted({1, *sizes}), call_cost, counted
        self._best: list[tuple[int, int]] = [(0, 0)]  # for each length: (cost, size of a call in a best plan)

    @classmethod
    def of(cls, manifest: Manifest) -> Planner:
        """For the functions of a bundle."""
        counted = [f.tokens for f in manifest.functions.values() if f.counted]
        sizes = [f.tokens for name, f in manifest.functions.items() if name.startswith("prefill_")]
        return cls(sizes, counted=max(counted, default=0))

    def plan(self, tokens: int) -> list[Chunk]:
        """Calls for `tokens` prompt tokens, largest first, so that only the last one is padded."""
        if self.counted and tokens > 1:
            return self._counted(tokens)
        for length in range(len(self._best), tokens + 1):
            self._best.append(
                min((self._best[max(0, length - size)][0] + size + self.call_cost, -size) for size in self.sizes)
            )
        sizes, left = [], tokens
        while left > 0:
            sizes.append(-self._best[left][1])
            left -= sizes[-1]
        sizes.sort(reverse=True)
        chunks, left = [], tokens
        for size in sizes:
            chunks.append(Chunk(size, min(size, left)))
            left -= chunks[-1].valid
        return chunks

    def _counted(self, tokens: int) -> list[Chunk]:
        """Whole calls; the last two share what is left over, so that no call reads all weights for a few tokens."""
        valid, left = [], tokens
        while left > 2 * self.counted:
            valid.append(self.counted)
            left -= self.counted
        if left > self.counted:
            valid.append(-(-left // 2))
            left //= 2
        return [Chunk(self.counted, count) for count in (*valid, left)]


class Session:
    """A model that is being run. Not for several threads at once: use it from the thread that made it.

    Logits come as read-only float32 views of the runtime's own memory, valid as long as they are held.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: Optional[int] = None,
        tiles: bool = True,
        graphs: bool = True,
        timed: bool = False,
    ) -> None:
        """`tiles` False leaves AMX alone, `graphs` False CUDA graphs; `timed` has the GPU's clock note every call.

        machine: an on_cpu.OnCpu or on_cuda.OnCuda, which has the functions and their buffers.
        """
        self.manifest = bundle.manifest
        if self.manifest.target.gpu is None:
            from .on_cpu import OnCpu

            self.machine: Any = OnCpu(bundle, threads, tiles)
        else:
            from .on_cuda import OnCuda

            self.machine = OnCuda(bundle, threads, graphs, timed)
        self.tiles: bool = self.machine.tiles  # whether prompts go through AMX
        self._span, self._calls = self.machine.span, self.machine.calls
        self._decode = self._calls["decode"]
        self._planner = Planner.of(self.manifest)
        self.position = 0

    @property
    def threads(self) -> int:
        """CPU threads that work."""
        return int(self.machine.threads)

    @property
    def context(self) -> int:
        """Positions in all."""
        return self.manifest.model.context

    @property
    def remaining(self) -> int:
        """Positions that are still free."""
        return self.context - self.position

    def reset(self) -> None:
        """Forget everything. The caches keep their bytes: nothing reads beyond the position."""
        self.position = 0

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"position {position} is outside 0..{self.position}")
        self.position = position

    def prefill(self, ids: Ids, between: Callable[[], object] = lambda: None) -> Array:
        """Take in tokens; gives the logits float32[vocab] after the last one. Nothing changes when it refuses.

        between: asked between two calls of a long prompt; what it raises ends the prefill there, and what was taken in
        by then stays.
        """
        chunk, row = self._take(self.check_ids(ids), between)
        if chunk.tokens > 1:
            head = self._calls["head_1"]
            head.buffer[:1] = row
            row = head.run()
        logits: Array = row[0]
        return logits

    def take(self, ids: Ids) -> None:
        """Take in tokens without asking what comes next: a prefill that leaves the output head out."""
        self._take(self.check_ids(ids))

    def _take(self, ids: Array, between: Callable[[], object] = lambda: None) -> tuple[Chunk, Array]:
        """The last call of the plan and the one row that it gave."""
        done = 0
        for chunk in self._planner.plan(len(ids)):
            if done:
                between()
            row = self._run(chunk, ids[done : done + chunk.valid])
            done += chunk.valid
        return chunk, row

    def step(self, token: int) -> Array:
        """Take in one token; gives the logits float32[vocab] after it."""
        if not 0 <= token < self.manifest.model.vocab_size:
            raise self._outside(token)
        if self.position >= self.context:
            raise self._full(1)
        decode = self._decode
        decode.buffer[0] = token
        self._span[0], self._span[1] = self.position, 1
        row = decode.run()[0]
        self.position += 1
        return row

    def logits(self, ids: Ids) -> Iterator[Array]:
        """Take in tokens; gives the logits after each, float32[rows, vocab] call by call, len(ids) rows in all."""
        checked = self.check_ids(ids)
        return self._logits(checked)

    def _logits(self, ids: Array) -> Iterator[Array]:
        done = 0
        for chunk in self._planner.plan(len(ids)):
            rows = self._run(chunk, ids[done : done + chunk.valid], "logits")
            done += chunk.valid
            yield rows[: chunk.valid]

    def check_ids(self, ids: Ids) -> Array:
        """The ids as int32[n]; refuses none, one outside the vocabulary, and more than the context has room for."""
        if not arrays.NUMPY:
            return self._check_list(arrays.integers(ids))
        given = np.asarray(ids)
        if given.ndim != 1 or not given.size or given.dtype.kind not in "iu":
            raise InputError(f"ids are {given.dtype}{list(given.shape)}, but a list of at least one integer is needed.")
        self._check_range(int(given.min()), int(given.max()), given.size)
        return given.astype(np.int32)

    def _check_list(self, ids: list[int]) -> Any:
        """Without numpy a list stands for int32[n]."""
        if not ids:
            raise InputError("ids are [], but a list of at least one integer is needed.")
        self._check_range(min(ids), max(ids), len(ids))
        return ids

    def _check_range(self, low: int, high: int, count: int) -> None:
        if low < 0 or high >= self.manifest.model.vocab_size:
            raise self._outside(low if low < 0 else high)
        if count > self.remaining:
            raise self._full(count)

    def _run(self, chunk: Chunk, ids: Array, kind: str = "prefill") -> Array:
        """One call of a plan: f32[1, d], the hidden state of the last token, or "logits" of each, f32[tokens, vocab].

        For one token it is decode, and its logits f32[1, vocab].
        """
        call = self._calls[f"{kind}_{chunk.tokens}"] if chunk.tokens > 1 else self._decode
        call.buffer[: chunk.valid] = ids
        if not self._planner.counted:
            call.buffer[chunk.valid :] = 0
        self._span[0], self._span[1] = self.position, chunk.valid
        plain = call.plain if self.tiles and chunk.valid < TILE_ROWS else None
        rows = (plain or call.run)()
        self.position += chunk.valid
        return rows

    def _outside(self, token: int) -> InputError:
        return InputError(f"token id {token} is outside the vocabulary 0..{self.manifest.model.vocab_size - 1}.")

    def _full(self, wanted: int) -> ContextFullError:
        what = "1 token does" if wanted == 1 else f"{wanted} tokens do"
        return ContextFullError(
            f"{what} not fit into the context of {self.context}, which holds {self.position} already. "
            "Use a shorter prompt, or rebuild the bundle with a longer context (python -m compiler build --context)."
        )
