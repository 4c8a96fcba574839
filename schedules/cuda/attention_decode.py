"""Attention of one token, split over the context: parts of `chunk` positions, then a merge (flash decoding).

A block has one part of one kv head, for `rows` of its query heads, so keys and values are read once for all of them.
  scores   a warp takes 16 keys at a time; each lane sums every 16th element of 8 keys for all rows, then log2(8)
           exchanges give each lane one key: 8 shuffles a row instead of 32
  softmax  over the whole part at once: a part's scores fit shared memory, so nothing is ever rescaled
  values   a lane has 8 columns, lanes go through positions; groups of lanes are summed in shared memory at the end
The merge (`NAME_merge`, a block a query head) reads only the parts that were computed. With one part there is none.

int8 follows schedules.attention_int8 to the operation: queries rounded to 16 bits, weights times v_scale to 32767
levels of the part's largest, products of pairs by dp2a (sm_61 on, two multiply-adds elsewhere). |sum| <= 32767 * 127
* chunk < 2^31 for chunk <= 512. Sums of codes are exact; what differs from the CPU is 2^x and the order of fp32 sums.

Traffic: 4 d bytes a position and kv head (int8: 2 d + 8), each read once, by 128-bit loads. Instructions a warp
issues for 512 bytes of fp16 keys (256 products a row): 1 load, 8 conversions, rows * (8 multiply-adds + 1 read of
the query): 82 with 8 rows. Nano reads 512 bytes in 28 cycles of 4 issues (16.5 GB/s at 921 MHz), Xavier NX in 57 of
4 (59.7 GB/s, 6 SMs, but 64 lanes: 2 issues of fp32), Orin Nano in 38 of 4 and an H100 in 40 of 4: the memory is the
ceiling everywhere with up to 8 rows. 512 bytes of int8 keys are 64 dp2a with 8 rows, as much as fp16's multiply-adds
for twice the products; on Nano 128 multiply-adds, so that arithmetic is the limit there with more than 6 rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from schedules.attention import largest_divisor
from schedules.cuda.attention import Call, call_of, space_of, value_columns
from schedules.cuda.kernel import CudaKernel, Launch
from schedules.cuda.source import Constant
from schedules.kernel import NotSuited, Request, Space, TensorSpec

RANK = 10  # first of all for one token
CHUNKS = (256, 128, 64)  # positions of a part
MOST_ROWS = 8  # 8 sums each: 64 accumulators
BLOCKS_WANTED = 16  # parts a multiprocessor over the whole capacity, so that a context a quarter full still fills it
MERGE_THREADS = 128


def default_knobs(call: Call) -> dict[str, int]:
    """The stated default: the longest parts that still fill the chip."""
    rows = largest_divisor(call.group, MOST_ROWS)
    wanted = BLOCKS_WANTED * call.gpu.multiprocessors
    filling = (c for c in CHUNKS if -(-call.capacity // c) * (call.heads // rows) >= wanted)
    return {"chunk": next(filling, CHUNKS[-1]), "rows": rows, "threads": 128}


def _row_threads(call: Call) -> int:
    """Whole warps that read a position's value at once."""
    return -(-call.padded // value_columns(call) // 32) * 32


def lower(request: Request) -> CudaKernel:
    """The parts, and the merge where there is more than one."""
    call = call_of(request)
    if call.m > 1:
        raise NotSuited
    columns = value_columns(call)
    knobs = default_knobs(call) | dict(request.knobs)
    threads = max(knobs["threads"], _row_threads(call))
    parts = -(-call.capacity // knobs["chunk"])
    name = f"attention_decode_{call.shape_name}_p{knobs['chunk']}r{knobs['rows']}t{threads}"
    levels = float(min(32767, ((1 << 31) - 1) // (127 * call.d)))
    constants: dict[str, Constant] = {
        "ROWS": knobs["rows"],
        "CHUNK": knobs["chunk"],
        "PARTS": parts,
        "COLUMNS": columns,
        "LEVELS": levels,
    }
    file = "attention_decode_int8.cu" if call.codes else "attention_decode.cu"
    files = [file] if parts == 1 else [file, "attention_merge.cu"]
    source = call.text(name, constants | {"THREADS": threads, "MERGE_THREADS": MERGE_THREADS}, *files)
    span = call.span_argument
    out, sums, stats = span + 1, span + 2, span + 3
    grid = (parts, call.heads // knobs["rows"], 1)
    given = tuple(range(span + 1))
    if parts == 1:
        launches: tuple[Launch, ...] = (Launch(name, grid, (threads, 1, 1), (*given, out, out)),)
        return CudaKernel(name, source, launches)
    launches = (
        Launch(name, grid, (threads, 1, 1), (*given, sums, stats)),
        Launch(f"{name}_merge", (call.heads, 1, 1), (MERGE_THREADS, 1, 1), (sums, stats, span, out)),
    )
    temporaries = (
        TensorSpec((parts, call.heads, call.d), "float32"),
        TensorSpec((parts, call.heads, 2), "float32"),
    )
    return CudaKernel(name, source, launches, temporaries=temporaries)


LOWERS = {"quern.attention": lower, "quern.attention_int8": lower}


def space(request: Request) -> Space:
    """What tuning may try: how long parts are, how many heads share a read, how many threads share a part."""
    call = call_of(request)
    if call.m > 1:
        raise NotSuited

    def allowed(knobs: Mapping[str, int]) -> bool:
        return knobs["chunk"] * knobs["rows"] * (6 if call.codes else 4) <= 24 << 10

    tried = {
        "chunk": (32, *CHUNKS, 512),
        "rows": tuple(r for r in (1, 2, 4, 8) if call.group % r == 0),
        "threads": tuple(t for t in (64, 128, 256) if t >= _row_threads(call)),
    }
    return space_of(call, "decode", default_knobs(call), tried, allowed)


SPACES = dict.fromkeys(LOWERS, space)
