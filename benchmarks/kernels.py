"""Times of the kernels on a GPU: ``python -m benchmarks.kernels [--op NAME] [--sweep]``.

Each line gives microseconds of a call, the rate at which it moves its own bytes, and that rate as a
share of a large copy's, measured in the same process. Calls run in a CUDA graph that goes through
the layers in turn, so that neither launches from Python nor the L2 cache are in the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.rows import Row, append
from sglang_vericache.kernels.pool_format import create_format

VERIFY = "verify attention"
FORMATS = ("bfloat16", "fp8_e4m3", "int4")
# The main pool's, which verify passes read; and their tokens of a request.
MAIN_FORMAT = "bfloat16"
VERIFY_WIDTHS = (4, 5, 8, 16, 17)
CALLS_IN_GRAPH = 24
REPLAYS = 15
COPY_BYTES = 2 << 30
# block_n, num_warps, num_stages, programs resident on a multiprocessor.
ALTERNATIVES = {
    ("bfloat16", 64): [
        *((32, 1, 3, 14), (32, 2, 3, 10), (64, 1, 3, 9), (64, 2, 2, 7), (64, 2, 3, 9)),
        *((64, 2, 5, 6), (64, 4, 2, 7), (64, 4, 3, 8), (128, 4, 3, 4), (128, 4, 5, 3)),
    ],
    ("bfloat16", 128): [
        *((32, 1, 3, 10), (32, 2, 2, 9), (32, 2, 3, 9), (32, 2, 5, 5), (64, 2, 3, 5)),
        *((64, 4, 2, 5), (64, 4, 3, 5), (64, 4, 5, 3), (128, 4, 3, 2), (128, 8, 3, 2)),
    ],
    ("fp8_e4m3", 64): [
        *((32, 1, 3, 11), (32, 1, 5, 15), (32, 2, 3, 9), (64, 1, 5, 10), (64, 2, 3, 6)),
        *((64, 2, 5, 7), (64, 4, 3, 5), (64, 4, 5, 6), (128, 4, 3, 3), (128, 4, 5, 3)),
    ],
    ("fp8_e4m3", 128): [
        *((32, 1, 5, 10), (32, 2, 2, 6), (32, 2, 3, 6), (32, 2, 5, 6), (64, 2, 3, 4)),
        *((64, 2, 5, 4), (64, 4, 3, 3), (64, 4, 5, 3), (128, 4, 3, 2), (128, 8, 3, 2)),
    ],
    ("int4", 64): [
        *((32, 1, 2, 12), (32, 1, 3, 16), (32, 1, 5, 15), (64, 1, 2, 9), (64, 1, 3, 10)),
        *((64, 1, 5, 8), (128, 1, 3, 8), (32, 2, 3, 8), (64, 2, 3, 5), (64, 2, 5, 6)),
    ],
    ("int4", 128): [
        *((32, 1, 3, 9), (32, 2, 3, 8), (32, 2, 5, 9), (64, 2, 3, 6), (64, 2, 5, 6)),
        *((64, 4, 2, 5), (64, 4, 3, 5), (64, 4, 5, 5), (128, 4, 3, 3), (128, 4, 5, 3)),
    ],
}
# block_n, num_warps, num_stages and slots read ahead, of verify passes by the draft steps' kernel.
VERIFY_ALTERNATIVES = (
    *((32, 2, 3, True), (32, 4, 3, True), (64, 2, 3, False), (64, 2, 3, True)),
    *((64, 4, 3, False), (64, 4, 2, True), (64, 4, 3, True), (64, 8, 3, True), (128, 4, 2, True)),
)
# Programs for each multiprocessor, whatever is resident.
VERIFY_PROGRAMS = (8, 16, 32)
# Programs in all, as a multiple of those resident at once.
ROUNDS = (1, 2, 4)


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call: the median over replays of a graph of many."""
    many = [calls[i % len(calls)] for i in range(CALLS_IN_GRAPH)]
    torch.cuda.synchronize()  # what they read may still be on its way
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in many:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(many))
    return statistics.median(times[3:])


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_us([lambda: target.copy_(source)]) * 1e6


def lines(options: argparse.Namespace, best: float) -> Iterator[dict]:
    """Times of every operation, shape and format asked for."""
    from benchmarks.kernel_cases import SHAPES, Case, picks

    for shape in SHAPES:
        if options.shape not in (None, shape.name):
            continue
        if options.requests is not None:
            shape = replace(shape, requests=options.requests)
        for name in FORMATS:
            if options.format not in (None, name):
                continue
            case = Case(shape, create_format(name, torch.bfloat16, shape.dim), options.scattered)
            head = {"shape": shape.name, "format": name}
            if options.sweep:
                if options.op != VERIFY:
                    yield from sweep(case, head, best)
                elif name == MAIN_FORMAT:
                    del case
                    yield from sweep_verify_passes(shape, head, best)
                continue
            for op, prepare in case.operations():
                if options.op is None or op.split(",")[0] == options.op:
                    timed = prepare()
                    yield head | {"op": op} | figures(time_us(timed.calls), timed.moved_bytes, best)
            del case
            if name == MAIN_FORMAT and options.op in (None, "pick"):
                for op, timed in picks(shape):
                    yield head | {"op": op} | figures(time_us(timed.calls), timed.moved_bytes, best)
            if name == MAIN_FORMAT and options.op in (None, VERIFY):
                yield from verify_passes(shape, head, best)


def verify_passes(shape, head: dict, best: float) -> Iterator[dict]:
    from benchmarks.verify_case import RowCase, verify_attention

    for width in VERIFY_WIDTHS:
        for how, prepare in (
            ("", verify_attention),
            (" by rows", lambda shape, width: RowCase(shape, width).timed()),
        ):
            timed = prepare(shape, width)
            op = f"{VERIFY}{how}, {width} tokens"
            yield head | {"op": op} | figures(time_us(timed.calls), timed.moved_bytes, best)
            del timed


def sweep_verify_passes(shape, head: dict, best: float) -> Iterator[dict]:
    """The kernel of draft steps over the full KV in every alternative, the table's own first."""
    from benchmarks.verify_case import RowCase
    from sglang_vericache.config import VeriCacheConfig
    from sglang_vericache.kernels.draft_attention.config import (
        AttentionConfig,
        config_of,
        multiprocessors,
    )
    from sglang_vericache.rounds.pace import horizons_up_to

    horizons = horizons_up_to(VeriCacheConfig().horizon, shape.query_heads // shape.heads)
    for width in [horizon + 1 for horizon in horizons if horizon]:
        case = RowCase(shape, width)
        table = config_of(case.storage, case.query_rows)
        processors = multiprocessors(torch.device("cuda"))
        splits = {max(1, n * processors // case.pairs) for n in VERIFY_PROGRAMS}
        tried = [(table, case.splits_of(table))]
        beside = head | {"best of": f"{width} tokens"}
        for block_n, warps, stages, ahead in VERIFY_ALTERNATIVES:
            config = AttentionConfig(block_n, warps, stages, resident=1, ahead=ahead)
            tried += [(config, count) for count in sorted(splits)]
        for config, count in tried:
            op = (
                f"{width} tokens BLOCK_N {config.block_n} warps {config.num_warps} stages "
                f"{config.num_stages}{' ahead' if config.ahead else ''} splits {count}"
                + (" (table)" if config == table else "")
            )
            try:
                timed = case.timed(config, count)
                us = time_us(timed.calls)
            except Exception as failure:  # as in `sweep`
                yield beside | {"op": op, "failed": f"{type(failure).__name__}: {failure}"[:60]}
                continue
            yield beside | {"op": op} | figures(us, timed.moved_bytes, best)
        del case


def figures(us: float, moved_bytes: int, best: float) -> dict:
    rate = moved_bytes / us * 1e6
    return {"us": round(us, 1), "GB/s": round(rate / 1e9), "share": round(rate / best, 3)}


def sweep(case, head: dict, best: float) -> Iterator[dict]:
    """Draft attention in every alternative, the table's own first."""
    from sglang_vericache.kernels.draft_attention.config import (
        LEAST_SPLIT_ROWS,
        AttentionConfig,
        config_of,
        multiprocessors,
    )
    from sglang_vericache.kernels.draft_attention.workspace import Workspace

    shape = case.shape
    pairs, group = shape.requests * shape.heads, shape.query_heads // shape.heads
    most_splits = shape.rows // LEAST_SPLIT_ROWS
    workspace = Workspace(pairs, pairs * most_splits * group, shape.dim, "cuda")
    table = config_of(case.storage, group)
    others = [AttentionConfig(*numbers) for numbers in ALTERNATIVES[head["format"], shape.dim]]
    for config in [table, *(other for other in others if other != table)]:
        tried = set()
        for rounds in ROUNDS:
            programs = rounds * multiprocessors(torch.device("cuda")) * config.resident
            splits = min(max(1, programs // pairs), most_splits)
            if splits in tried:
                continue
            tried.add(splits)
            op = (
                f"BLOCK_N {config.block_n} warps {config.num_warps} stages {config.num_stages} "
                f"splits {splits}" + (" (table)" if config == table else "")
            )
            try:
                timed = case.attention(workspace=workspace, config=config, num_splits=splits)
                us = time_us(timed.calls)
            except (
                Exception
            ) as failure:  # too much shared memory, and whatever else a compiler says
                yield head | {"op": op, "failed": f"{type(failure).__name__}: {failure}"[:60]}
                break
            yield head | {"op": op} | figures(us, timed.moved_bytes, best)


def report(line: dict) -> str:
    start = f"{line['shape']:5} {line['format']:9} {line['op']:48}"
    if "failed" in line:
        return f"{start} {line['failed']}"
    return f"{start} {line['us']:9.1f} us {line['GB/s']:6} GB/s {line['share']:6.1%} of copy"


def _compared(line: dict) -> tuple[str, str, str]:
    """The same for alternatives of each other."""
    return line["shape"], line["format"], line.get("best of", "")


def row_of(line: dict, scattered: bool, requests: int | None) -> Row:
    slots = "scattered" if scattered else "in runs"
    batch = "" if requests is None else f", {requests} requests"
    return Row(
        case="kernels",
        metric=line["op"],
        value=line["us"],
        unit="us",
        model=f"shapes of {line['shape']}",
        flags=f"{line['format']}, slots {slots}{batch}",
        note=f"{line['GB/s']} GB/s, {line['share']:.1%} of a large copy",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only this one: attention, append, commit, gather, ...")
    parser.add_argument("--requests", type=int, help="in place of the shape's")
    parser.add_argument("--shape", help="only this one: 135M or 8B")
    parser.add_argument("--format", choices=FORMATS, help="only this one")
    parser.add_argument("--sweep", action="store_true", help="attention in alternative configs")
    parser.add_argument("--scattered", action="store_true", help="slots in random order")
    parser.add_argument("--json", type=Path, help="write the lines there as well")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels needs a CUDA device: times on a CPU say nothing about kernels")
    import triton

    best = copy_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"copy {best / 1e9:.0f} GB/s, read and written; "
        f"slots {'scattered' if options.scattered else 'in runs'}"
    )
    made = []
    for line in lines(options, best):
        made.append(line)
        print(report(line), flush=True)
        # A sweep compares alternatives that nobody runs: nothing to keep.
        if not (options.sweep or options.no_rows):
            append("kernels.jsonl", row_of(line, options.scattered, options.requests))
    if options.sweep:
        print("\nbest of each")
        timed = [line for line in made if "us" in line]
        for key in dict.fromkeys(_compared(line) for line in timed):
            same = [line for line in timed if _compared(line) == key]
            for line in sorted(same, key=lambda line: line["us"])[:3]:
                print(report(line))
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in made))


if __name__ == "__main__":
    main()
