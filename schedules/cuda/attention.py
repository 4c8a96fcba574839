"""What the CUDA attention kernels share: the request taken apart, and the constants of their texts.

  quern.attention, quern.attention_int8: arguments, attributes and cache layouts as schedules.attention, attention_int8

The caches lie as on a CPU. That suits a GPU, too: the 16 keys of a block have an element side by side, so a warp reads
512 consecutive bytes and a lane gets 8 keys (4 of fp32) of one element by one 128-bit load; as a matrix, such a
block is what the tensor cores take as B. Values lie by rows, 128 bits a lane again.

All kernels take the position from device memory (`span`), their grids are those of the whole capacity, and blocks with
nothing to do leave at once: a launch never changes, so that a whole step can be replayed as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd

from schedules.attention import Scores, largest_divisor, scores_of
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.source import Constant, source
from schedules.kernel import NotSuited, Request, Space, Unsupported
from schedules.vector import LOG2_E
from targets.target import Gpu

SHARED_MOST = 48 << 10  # bytes of shared memory that every device has without asking
TEXTS = {"float16": "Half", "float32": "float", "int8": "int8_t"}


@dataclass(frozen=True)
class Call:
    """An attention operator's call: m rows of `heads` query heads, `group` of them a kv head, each with d elements."""

    gpu: Gpu
    m: int
    heads: int
    kv_heads: int
    d: int
    capacity: int
    cache: str
    scores: Scores

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.heads // self.kv_heads

    @property
    def codes(self) -> bool:
        """Whether the cache is int8."""
        return self.cache == "int8"

    @property
    def padded(self) -> int:
        """Columns of an int8 value."""
        return -(-self.d // 16) * 16

    @property
    def span_argument(self) -> int:
        """Place of `span` among the operator's arguments."""
        return 5 if self.codes else 3

    @property
    def shape_name(self) -> str:
        """Part of a kernel's name."""
        shape = f"m{self.m}_h{self.heads}_kv{self.kv_heads}_d{self.d}_c{self.capacity}_{self.scores.name}"
        return f"{self.cache}_{self.gpu.arch.replace('_', '')}_{shape}"

    def text(self, name: str, constants: dict[str, Constant], *files: str) -> str:
        """Source of the files for this call, with its constants and more."""
        common: dict[str, Constant] = {
            "M": self.m,
            "HEADS": self.heads,
            "GROUP": self.group,
            "D": self.d,
            "PADDED": self.padded,
            "CAPACITY": self.capacity,
            "WINDOW": self.scores.window,
            "SOFTCAP": self.scores.softcap,
            "LOG2E_CAP": self.scores.softcap * LOG2_E,
            "QUERY_FACTOR": self.scores.query_factor,
            "Item": TEXTS[self.cache],
        }
        return source(name, common | constants, "attention_shared.cu", *files)


def call_of(request: Request) -> Call:
    """The request taken apart."""
    gpu = request.target.gpu
    assert gpu is not None, request.target.name
    heads, kv_heads, d = (int(request.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    codes = request.op.endswith("_int8")
    capacity = request.args[3 if codes else 2].shape[1]
    return Call(gpu, request.args[0].shape[0], heads, kv_heads, d, capacity, request.args[1].dtype,
                scores_of(request, d))  # fmt: skip


def tile_of(call: Call, rows: int) -> dict[str, int]:
    """What lies in a tile of up to `rows` rows: SHARED query heads of a kv head, for TOKENS tokens each."""
    shared = largest_divisor(call.group, rows)
    return {"SHARED": shared, "TOKENS": min(call.m, rows // shared)}


def prompt(
    call: Call, family: str, tile: dict[str, int], rows: int, block: int, threads: int, *files: str, **more: Constant
) -> CudaKernel:
    """A block of `threads` for every tile of tokens and group of heads; `block` positions at a time."""
    name = f"attention_{family}_{call.shape_name}_r{rows}p{block}t{threads}"
    constants: dict[str, Constant] = {**tile, "ROWS": rows, "BLOCK": block, "THREADS": threads, **more}
    entry = "attention_entry_int8.cu" if call.codes else "attention_entry.cu"
    text = call.text(name, constants, *files, f"attention_{family}.cu", entry)
    grid = (-(-call.m // tile["TOKENS"]), call.heads // tile["SHARED"], 1)
    return CudaKernel(name, text, (Launch(name, grid, (threads, 1, 1), tuple(range(call.span_argument + 2))),))


def fewest_rows(call: Call, most: int) -> int:
    """16 or a power of two above it that holds all rows of a kv head, `most` if none does."""
    rows = 16
    while rows < min(most, call.m * call.group):
        rows *= 2
    return rows


@dataclass(frozen=True)
class TensorCores:
    """A family of prompts on fp16 tensor cores, a warp for 16 rows.

    first_sm: the first compute capability; tiles: up to d, rows, positions, the default from small d to large;
    fits: whether registers and shared memory hold a tile of so many rows and positions.
    """

    name: str
    first_sm: int
    tiles: tuple[tuple[int, int, int], ...]
    swizzled: int
    fits: Callable[[Call, int, int], bool]

    def call(self, request: Request) -> Call:
        """The call, if it is one for this family. Raises NotSuited."""
        call = call_of(request)
        if call.m == 1 or call.gpu.sm < self.first_sm or call.cache == "float32" or call.d > self.tiles[-1][0]:
            raise NotSuited
        return call

    def default_knobs(self, call: Call) -> dict[str, int]:
        """The stated default."""
        _, rows, block = next(tile for tile in self.tiles if call.d <= tile[0])
        return {"rows": fewest_rows(call, rows), "block": block}

    def lower(self, request: Request) -> CudaKernel:
        """A block for every tile of tokens and group of heads. Raises NotSuited, and Unsupported for large tiles."""
        call = self.call(request)
        knobs = self.default_knobs(call) | dict(request.knobs)
        if not self.fits(call, knobs["rows"], knobs["block"]):
            raise too_large(request, knobs)
        tile = tile_of(call, knobs["rows"])
        rows = -(-tile["TOKENS"] * tile["SHARED"] // 16) * 16
        return prompt(call, self.name, tile, rows, knobs["block"], 2 * rows, "attention_stage.cu",
                      SWIZZLED=self.swizzled)  # fmt: skip

    def space(self, request: Request) -> Space:
        """What tuning may try: rows that share what is staged, and positions staged at a time."""
        call = self.call(request)

        def allowed(knobs: Mapping[str, int]) -> bool:
            needed = knobs["rows"] <= fewest_rows(call, knobs["rows"])
            return needed and self.fits(call, knobs["rows"], knobs["block"])

        tried = {"rows": (16, 32, 64, 128), "block": (16, 32, 64, 128)}
        return space_of(call, self.name, self.default_knobs(call), tried, allowed)


def too_large(request: Request, knobs: Mapping[str, int]) -> Unsupported:
    """What to raise for a tile that registers or shared memory do not hold."""
    tile = ", ".join(f"{name} {value}" for name, value in knobs.items())
    return Unsupported(f"{request.op}: heads of {request.attrs['head_dim']} elements leave no room for {tile}")


def space_of(
    call: Call, family: str, default: Mapping[str, int], tried: Mapping[str, tuple[int, ...]],
    allowed: Callable[[Mapping[str, int]], bool],
) -> Space:  # fmt: skip
    """The space of a family for a call."""
    workload: dict[str, int | str] = {"m": call.m, "heads": call.heads, "kv_heads": call.kv_heads, "head_dim": call.d}
    workload |= {"capacity": call.capacity, "cache": call.cache, "window": call.scores.window}
    schedule = f"cuda.attention_{family}.{call.gpu.arch}"
    return Space.around(default, tried, schedule=schedule, workload=workload, allowed=allowed)


def value_columns(call: Call) -> int:
    """Elements of a value that one load may have: as many as 16 bytes hold and its alignment allows."""
    item = {"float16": 2, "float32": 4, "int8": 1}[call.cache]
    return 8 if call.codes else gcd(call.d * item, 16) // item
