"""Launch constants of draft attention: a table instead of autotuning, which would have to run
inside graph capture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
import triton

from sglang_vericache.kernels.pool_format import DenseFormat, Int4Format, PoolStorage

# Rows of a split below which its start and its partial result cost more than it brings.
LEAST_SPLIT_ROWS = 128
# Tensor cores take this many rows of queries at a time; fewer are padded.
TENSOR_CORE_ROWS = 16
WITHOUT_GPU = 4  # multiprocessors assumed under the interpreter


@dataclass(frozen=True)
class AttentionConfig:
    """How one kernel is launched.

    Attributes:
        block_n: rows read at a time.
        resident: programs that share a multiprocessor, as registers and shared memory allow.
        rounds: splits are counted to fill the multiprocessors this many times at most. With fewer,
            a batch of ragged lengths leaves some idle at the end; with more, starts and partial
            results are a visible share of the time.
        ahead: the slots of a block are read a block earlier, into registers, so that a block of
            rows is under way while the one before is computed. Floating-point rows only; int4 does
            so always. Where a few programs are resident; many hide each other's waits.
    """

    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    rounds: float = 2
    ahead: bool = False


# By kind of pool and head_dim rounded up to a power of two. Chosen from what the compilers of
# triton 3.6 and 3.8 report for sm_90: no spills, 35 KB or more in flight on a multiprocessor, and
# few instructions a row; those of bf16 at 64 and 128 and of int4 at 64 from an H200's times.
# `python -m benchmarks.kernels --sweep` times the alternatives.
TABLE: dict[tuple[str, int], AttentionConfig] = {
    ("half", 64): AttentionConfig(32, 2, 3, 11, rounds=1, ahead=True),
    ("half", 128): AttentionConfig(64, 4, 2, 5, ahead=True),
    ("half", 256): AttentionConfig(64, 4, 3, 3),
    ("fp8", 64): AttentionConfig(64, 2, 5, 7),
    ("fp8", 128): AttentionConfig(32, 2, 3, 6),
    ("fp8", 256): AttentionConfig(32, 4, 3, 2),
    # One warp: others would wait for each other several times a block, over scores and weights.
    ("int4", 64): AttentionConfig(32, 1, 3, 21, rounds=0.75),
    ("int4", 128): AttentionConfig(32, 1, 3, 12, rounds=1),
    ("int4", 256): AttentionConfig(32, 1, 3, 8),
    # For tests: products in float32 do not use tensor cores.
    ("float32", 64): AttentionConfig(32, 4, 2, 3),
    ("float32", 128): AttentionConfig(16, 4, 2, 2),
    ("float32", 256): AttentionConfig(16, 4, 2, 1),
}
# int4 where queries and heads of a group fill more than half a tile, by head_dim: softmax is of all
# of it then.
HALF_TILE_ROWS = TENSOR_CORE_ROWS // 2
WHOLE_TILE: dict[int, AttentionConfig] = {
    64: AttentionConfig(32, 1, 3, 15),
    128: AttentionConfig(64, 2, 3, 6),
    256: AttentionConfig(32, 2, 3, 6),
}
# Programs are long there, and few: what the last of them leave idle is a larger share.
MANY_ROWS_ROUNDS = 4
# Floating-point rows where they fill more than a tile, by rows padded to a power of two and by
# head_dim: products take as long as reading there, so the next rows have to be under way meanwhile.
MANY_ROWS: dict[tuple[int, int], AttentionConfig] = {
    (32, 64): AttentionConfig(64, 2, 3, 6),
    (32, 128): AttentionConfig(64, 4, 2, 4, ahead=True),
    (32, 256): AttentionConfig(32, 4, 2, 3, MANY_ROWS_ROUNDS, ahead=True),
    (64, 64): AttentionConfig(64, 4, 3, 3, MANY_ROWS_ROUNDS, ahead=True),
    (64, 128): AttentionConfig(64, 4, 3, 2, MANY_ROWS_ROUNDS, ahead=True),
    (64, 256): AttentionConfig(32, 4, 3, 2, MANY_ROWS_ROUNDS),
    (128, 64): AttentionConfig(64, 8, 3, 2, MANY_ROWS_ROUNDS, ahead=True),
    (128, 128): AttentionConfig(64, 8, 3, 1, MANY_ROWS_ROUNDS, ahead=True),
    (128, 256): AttentionConfig(32, 8, 2, 1, MANY_ROWS_ROUNDS),
    (256, 64): AttentionConfig(64, 8, 3, 1, MANY_ROWS_ROUNDS, ahead=True),
    (256, 128): AttentionConfig(64, 16, 2, 1, MANY_ROWS_ROUNDS, ahead=True),
}


def kind_of(storage: PoolStorage) -> str:
    """Row of the table for a pool."""
    if isinstance(storage.format, Int4Format):
        return "int4"
    if not isinstance(storage.format, DenseFormat):
        return "fp8"
    return "float32" if storage.format.dtype == torch.float32 else "half"


def config_of(storage: PoolStorage, query_rows: int) -> AttentionConfig:
    """The table's entry for a pool; head_dim below 64 and above 256 take the nearest.

    Args:
        query_rows: queries times query heads of a kv head.

    Raises:
        ValueError: more of them than registers hold.
    """
    kind = kind_of(storage)
    padded = triton.next_power_of_2(query_rows)
    width = listed_dim(storage.head_dim)
    if query_rows > TENSOR_CORE_ROWS and kind != "float32":
        if kind != "int4":
            if (padded, width) not in MANY_ROWS:
                raise ValueError(
                    f"a program holds up to {most_query_rows(storage)} rows of queries of head_dim "
                    f"{storage.head_dim}, not {query_rows}"
                )
            return MANY_ROWS[padded, width]
        # Nibble planes are narrow, so warps share out rows of queries.
        return AttentionConfig(32, min(padded // TENSOR_CORE_ROWS, 4), 3, 4)
    if kind == "int4" and query_rows > HALF_TILE_ROWS:
        return WHOLE_TILE[width]
    return TABLE[kind, width]


def most_query_rows(storage: PoolStorage) -> int | None:
    """Rows of queries that a program holds, None where any number does."""
    if kind_of(storage) not in ("half", "fp8"):
        return None
    width = listed_dim(storage.head_dim)
    return max(rows for rows, dim in MANY_ROWS if dim == width)


def listed_dim(head_dim: int) -> int:
    """The head_dim of the tables that stands for it."""
    return min(max(triton.next_power_of_2(head_dim), 64), 256)


@cache
def split_count(
    config: AttentionConfig, requests: int, heads: int, table_width: int, multiprocessors: int
) -> int:
    """Splits of every view, from what the host knows: never from the lengths on the device.

    Programs of equal length end together where each multiprocessor gets as many: 12 requests of 8
    heads took 395 us in 13 splits, 9.5 programs a multiprocessor, and 369 us in 11, which are 8.

    Args:
        heads: kv heads, each of which has programs of its own.
        table_width: slots of a row, the longest that a view can be.
    """
    requests = max(requests, 1)
    pairs = requests * heads
    rounds = min(config.rounds, requests)  # the splits of one view are equally long
    wanted = int(rounds * multiprocessors * config.resident) // pairs
    most = max(1, min(wanted, table_width // LEAST_SPLIT_ROWS))

    def full(splits: int) -> float:
        """Share of the places filled, when the last multiprocessor ends."""
        each = pairs * splits / multiprocessors
        return each / ceil(each)

    return max(range(most - most // 4, most + 1), key=lambda splits: (full(splits), splits))


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
