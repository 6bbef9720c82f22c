"""``python -m sglang_vericache bench``: unmodified SGLang and vericache, one after the other, or by
turns.

Both get the same requests on the same machine. What each server found is saved as soon as a case
is done, so a comparison may be split over several calls with the same --out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from benchmarks import registry, rows
from benchmarks.serving.case_prompts import CHOSEN, model_name
from benchmarks.serving.figures import WARM_TOKENS
from benchmarks.serving.join import Comparison, summary
from benchmarks.serving.pools import pools, row_bytes, shape_for
from benchmarks.serving.progress import spent_lines
from benchmarks.serving.queue import host_flags, offload_flags, shared_set_up
from benchmarks.serving.selection import read_selections, write_selections
from benchmarks.serving.side import (
    Options,
    Side,
    SideError,
    SideRun,
    check_order,
    common_flags,
    default_model,
    next_number,
    read_runs,
)
from benchmarks.serving.traffic import CAPACITY_REQUESTS
from benchmarks.serving.turns import Turns
from sglang_vericache.demo.model import default_cache_dir

OURS = "--enable-vericache --vericache-draft-dtype int4"
ORDER, QUEUE_ORDER = "plain,ours", "plain,ours,ours1"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m sglang_vericache bench", description=__doc__)
    add = made.add_argument
    add(
        *("--case",),
        action="append",
        default=[],
        metavar="NAME|NAME:CONTEXT:REQUESTS[:POOL_TOKENS:HOST_GB]",
        help="registered (python -m benchmarks list) or ad hoc, with a pool and a host tier a "
        "queue of more requests than fit; several of one model share starts",
    )
    add("--model", help="checkpoint folder, or shape:8b for random weights; default by the cases")
    add("--flags", help="of every server (default: what a GPU wants)")
    add(
        *("--plain",),
        action="append",
        metavar="FLAGS",
        help="more flags of an unmodified server; repeated: several, of which the best counts; of "
        "queued cases with the case's host tier, unless they set one",
    )
    add(
        *("--ours",),
        action="append",
        metavar="FLAGS",
        help=f"more flags of a server with the plugin (default: {OURS}); may be "
        "repeated; of queued cases with --vericache-offload auto, unless they set it",
    )
    add(
        *("--order",),
        metavar="SIDE,...",
        help="servers one after the other: plain, ours, and plain1, ours1, ... where those flags "
        f"were repeated (default: {ORDER}; of queued cases {QUEUE_ORDER}, where ours1 has SGLang's "
        "host tier and no offloading); empty only joins what lies in --out",
    )
    add(
        *("--out",),
        type=Path,
        default=default_cache_dir() / "bench",
        help="figures, prompts and logs (default: %(default)s)",
    )
    add("--chosen", type=Path, help=f"{CHOSEN} of an earlier run: take its choice of prompts")
    add("--tokens", type=int, help="of each answer (default: the case's)")
    add("--repeats", type=int, help="of each timed fixed set (default: the case's)")
    add(
        *("--seconds",),
        type=float,
        default=0.0,
        help="of a closed loop after the fixed sets of several requests, which gives a row of its "
        "own (default: 0, none)",
    )
    add("--select-seconds", type=float, default=90.0, help="for finding prompts (default: 90)")
    add(
        *("--capacity-requests",),
        type=int,
        default=CAPACITY_REQUESTS,
        help="that wait at once to find what the unmodified server can take (default: %(default)s)",
    )
    add("--traffic-seconds", type=float, default=15.0, help="of each run of arrivals (default: 15)")
    add(
        *("--together",),
        action="store_true",
        help="start all servers at once, and measure each case on one after the other: the device "
        "needs room for all of them (--max-total-tokens in --plain and --ours, where the cases do "
        "not size the pools)",
    )
    add("--rescore", action="store_true", help="plain servers rescore what ours answered before")
    add("--replay", default=registry.REPLAY, help="run lengths for models without weights")
    add("--no-rows", action="store_true", help="figures only, nothing into benchmarks/results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    least = {"repeats": 1, "tokens": WARM_TOKENS + 1, "capacity_requests": 1, "seconds": 0}
    for name, smallest in (least | {"select_seconds": 0, "traffic_seconds": 0}).items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            made.error(f"--{name.replace('_', '-')} {value} is too small: at least {smallest}")
    try:
        cases = [registry.serving_case(text) for text in arguments.case]
        if arguments.tokens is not None:
            cases = [replace(case, tokens=arguments.tokens) for case in cases]
        queued = shared_set_up(cases)
        sides, failed = _sides(arguments, cases, queued), 0
        if sides and not cases:
            raise SideError("say which --case")
        if sides:
            rows.require_commit()
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, _end)
            failed = _measure(arguments, cases, sides)
        return _join(arguments) or failed
    except registry.UnknownCaseError as unknown:
        made.error(str(unknown))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (RuntimeError, ValueError, OSError) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 1


def _end(number: int, _: object) -> None:
    """With the default action the server would outlive a command that is told to end."""
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)  # once is enough, and stopping takes its time
    sys.exit(128 + number)


def _sides(
    arguments: argparse.Namespace,
    cases: Sequence[registry.Case],
    queued: registry.Case | None,
) -> list[Side]:
    plain, ours, order = [""], [OURS], ORDER
    if queued is not None:
        order, ours = QUEUE_ORDER, [OURS, f"{OURS} {host_flags(queued)}"]
    if arguments.order is not None:
        order = arguments.order
    known = {}
    for kind, flags in (("plain", arguments.plain or plain), ("ours", arguments.ours or ours)):
        for i, text in enumerate(flags):
            known[kind + (str(i) if i else "")] = text
    model = arguments.model
    if queued is not None:
        known = {name: _with_host(text, queued) for name, text in known.items()}
    if queued is not None and queued.pool_tokens and order:
        model = model or default_model(cases)
        known = {name: _with_pools(text, queued, model) for name, text in known.items()}
    sides = []
    for name in filter(None, order.split(",")):
        if name not in known:
            raise SideError(f"--order: no side is called {name!r}; there are {', '.join(known)}")
        sides.append(Side(name, known[name]))
    return sides


def _with_host(flags: str, case: registry.Case) -> str:
    """The case's host tier for every server, unless the flags say otherwise themselves: without
    one, a queue that is to rotate would be measured standing."""
    if "--vericache-offload" in flags or "--enable-hierarchical-cache" in flags:
        return flags
    own = offload_flags(case) if "--enable-vericache" in flags else host_flags(case)
    return f"{flags} {own}".strip()


def _with_pools(flags: str, case: registry.Case, model: str | None) -> str:
    """The same KV memory for every server, unless the flags say otherwise themselves."""
    if "--max-total-tokens" in flags:
        return flags
    if "--enable-vericache" not in flags or "--vericache-draft-memory" in flags or model is None:
        return f"{flags} --max-total-tokens {case.pool_tokens}".strip()
    weights = shape_for(model).weight_bytes
    split = pools(case, row_bytes(model), "--vericache-offload" in flags, weights)
    return f"{flags} {split.flags}"


def _measure(
    arguments: argparse.Namespace, cases: Sequence[registry.Case], sides: Sequence[Side]
) -> int:
    """1 when a case failed."""
    model = arguments.model or default_model(cases)
    if model is None:
        raise SideError("an ad-hoc case needs --model")
    if Path(model).exists():  # servers run in another directory
        model = str(Path(model).absolute())
    folder = arguments.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.chosen is not None:
        _take(arguments.chosen, folder / CHOSEN, model_name(model))
    options = Options(
        folder=folder,
        model=model,
        flags=common_flags(model) if arguments.flags is None else arguments.flags,
        replay=arguments.replay,
        repeats=arguments.repeats,
        closed_seconds=arguments.seconds,
        select_seconds=arguments.select_seconds,
        traffic_seconds=arguments.traffic_seconds,
        capacity_requests=arguments.capacity_requests,
        rescores=arguments.rescore,
    )
    check_order(sides, cases, options)
    if arguments.together:
        return _measure_together(sides, cases, options)
    failed = 0
    for side in sides:
        run = SideRun(side, options)
        failed += bool(run.measure(cases))
        print(f"{side.name}: {run.path}", flush=True)
    return min(failed, 1)


def _measure_together(
    sides: Sequence[Side], cases: Sequence[registry.Case], options: Options
) -> int:
    """A thread for each side; ends when all have. 1 when a case failed."""
    names = [side.name for side in sides]
    if len(set(names)) < len(names):
        raise SideError("--together: a side can take part once")
    turns, first = Turns(names), next_number(options.folder)
    runs = [SideRun(side, options, first + i, turns) for i, side in enumerate(sides)]

    def measure(run: SideRun) -> dict[str, str]:
        try:
            return run.measure(cases)
        finally:
            turns.leave(run.side.name)

    with ThreadPoolExecutor(len(runs)) as pool:
        found = [pool.submit(measure, run) for run in runs]
        try:
            wait(found)
        except BaseException:  # an interruption: no server outlives this command
            for run in runs:  # before the others' turns come
                run.stopped = True
            for run in runs:
                run.stop()
            raise
    for run in runs:
        print(f"{run.side.name}: {run.path}", flush=True)
    return int(any([future.result() for future in found]))


def _take(source: Path, target: Path, model: str) -> None:
    """The choices in ``source`` count before those already in ``target``."""
    if not source.exists():
        raise SideError(f"--chosen: there is no {source}")
    taken = read_selections(source, model)
    write_selections(target, read_selections(target, model) | taken)


def _join(arguments: argparse.Namespace) -> int:
    comparison = Comparison(arguments.out.absolute())
    found = list(comparison.rows())
    for _, record in read_runs(arguments.out.absolute()):
        for line in spent_lines(record):
            print(line)
    print(summary(found) if found else f"nothing to compare in {arguments.out} yet")
    for failure in comparison.failures:
        print(f"FAILED {failure}")
    if arguments.no_rows or not found:
        return 0
    for file, row in found:
        if row not in rows.read(file):  # the folder may have been joined before
            rows.append(file, row)
    from benchmarks.render import render_all

    return render_all(check=False, plots=True)


if __name__ == "__main__":
    sys.exit(main())
