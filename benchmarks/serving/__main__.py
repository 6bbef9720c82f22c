"""``python -m benchmarks.serving``: unmodified SGLang and vericache, one after the other."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from benchmarks.registry import SMOL, Case, UnknownCaseError, serving_case
from benchmarks.rows import Row, append
from benchmarks.serving.measure import LONG_TOKENS, Speed, measure
from benchmarks.serving.prompts import Prompts, repetition
from benchmarks.serving.server import ServingServer
from sglang_vericache.demo.model import default_cache_dir, prepare_model

MOST_REPETITION = 0.3
FLAGS = (
    "--attention-backend flashinfer --sampling-backend pytorch --grammar-backend none "
    "--skip-server-warmup --disable-prefill-cuda-graph --mem-fraction-static 0.85 "
    "--dtype bfloat16 --cuda-graph-max-bs-decode 256"
)
OURS = tuple(f"--enable-vericache --vericache-draft-dtype {name}" for name in ("int4", "bfloat16"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; by default the demo's SmolLM2-135M")
    parser.add_argument(
        "--case",
        action="append",
        required=True,
        metavar="NAME|NAME:CONTEXT:REQUESTS",
        help="registered (python -m benchmarks list) or ad hoc",
    )
    parser.add_argument("--flags", default=FLAGS, help="of both servers (default: %(default)s)")
    parser.add_argument(
        "--ours",
        action="append",
        help=f"flags of one server with the plugin (default: one each of {', '.join(OURS)})",
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--out",
        type=Path,
        default=default_cache_dir() / "serving",
        help="logs and answers (default: %(default)s)",
    )
    parser.add_argument("--no-plain", action="store_true", help="reuse the answers of a run before")
    parser.add_argument(
        "--chosen", type=Path, help="plain.json of an earlier run: take its choice of prompts"
    )
    arguments = parser.parse_args()
    try:
        cases = [serving_case(text) for text in arguments.case]
    except UnknownCaseError as unknown:
        parser.error(str(unknown))
    if arguments.model is None:
        if any(case.model not in ("", SMOL) for case in cases):
            parser.error(f"only {SMOL} comes by itself: say --model")
        arguments.model = str(prepare_model(default_cache_dir()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = Prompts(arguments.model)
    saved = arguments.out / "plain.json"
    if not arguments.no_plain:
        with _server(arguments, "plain", []) as server:
            plain = {case.name: _plain(server, prompts, case, arguments) for case in cases}
        saved.write_text(json.dumps(plain))
    plain = json.loads(saved.read_text())
    failed = 0
    for i, ours in enumerate(arguments.ours or OURS):
        try:
            with _server(arguments, f"ours{i}", shlex.split(ours)) as server:
                print(f"started in {server.start_seconds:.0f} s with {ours}", flush=True)
                for case in cases:
                    _ours(server, prompts, case, ours, plain[case.name], arguments)
        except Exception as error:
            print(f"FAILED {ours}: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


def _server(arguments, name: str, ours: list[str]) -> ServingServer:
    flags = [*shlex.split(arguments.flags), *ours]
    log = arguments.out / f"{name}.log"
    return ServingServer(arguments.model, log, flags, plugin=bool(ours))


def _plain(server: ServingServer, prompts: Prompts, case: Case, arguments) -> dict:
    """Chooses the prompts whose answers repeat little, and measures them."""
    earlier = json.loads(arguments.chosen.read_text()) if arguments.chosen else {}
    if case.name in earlier:
        candidates = prompts.make(case.context, earlier[case.name]["candidates"])
        chosen = earlier[case.name]["chosen"]
    else:
        candidates = prompts.make(case.context, case.requests + case.requests // 2 + 16)
        chosen = _least_repetitive(server, candidates, case.requests)
        server.flush()
    speed = measure(server, [candidates[i] for i in chosen], arguments.repetitions)
    repeats = [repetition(output) for output in speed.outputs]
    within = sum(share <= MOST_REPETITION for share in repeats)
    again = server.generate([candidates[i] for i in chosen[: max(1, case.requests // 2)]], 272)
    itself = sum(a["output_ids"] != b for a, b in zip(again, speed.outputs, strict=False)) / len(
        again
    )
    server.flush()
    print(
        f"{case.name}: plain {speed.rate:.0f} tok/s {_spread(speed)}, "
        f"whole {max(speed.whole):.0f}; "
        f"{within}/{case.requests} prompts repeat at most {MOST_REPETITION}; "
        f"{itself:.1%} differ from itself at half the concurrency",
        flush=True,
    )
    return {
        "candidates": len(candidates),
        "chosen": chosen,
        "repetition": repeats,
        "rates": speed.rates,
        "whole": speed.whole,
        "outputs": speed.outputs,
        "itself": itself,
    }


def _least_repetitive(server: ServingServer, candidates, count: int) -> list[int]:
    repeats: list[float] = []
    for at in range(0, len(candidates), count):
        for answer in server.generate(candidates[at : at + count], LONG_TOKENS):
            repeats.append(repetition(answer["output_ids"]))
    return sorted(range(len(candidates)), key=repeats.__getitem__)[:count]


def _ours(server, prompts: Prompts, case: Case, ours: str, plain: dict, arguments) -> None:
    candidates = prompts.make(case.context, plain["candidates"])
    speed = measure(server, [candidates[i] for i in plain["chosen"]], arguments.repetitions)
    server.flush()
    differ = sum(a != b for a, b in zip(speed.outputs, plain["outputs"], strict=True))
    baseline = statistics.median(plain["rates"])
    per_round = speed.tokens_per_round
    print(
        f"{case.name}: {speed.rate:.0f} tok/s {_spread(speed)} = {speed.rate / baseline:.2f}x "
        f"({'nothing' if case.least_factor is None else case.least_factor} wanted), "
        f"whole {max(speed.whole) / max(plain['whole']):.2f}x, "
        f"{per_round and round(per_round, 2)} tokens a round, {differ}/{case.requests} outputs "
        f"differ, phases { {k: round(v, 2) for k, v in speed.phases.items()} }",
        flush=True,
    )
    within = sum(r <= MOST_REPETITION for r in plain["repetition"])
    append(
        "serving.jsonl",
        Row(
            case=case.name,
            metric="decode_rate",
            value=round(speed.rate, 1),
            baseline=round(baseline, 1),
            unit="tokens/s",
            model=Path(arguments.model).name,
            flags=f"{arguments.flags} {ours}",
            tokens_per_round=per_round and round(per_round, 3),
            note=f"{len(speed.rates)} repetitions {_spread(speed)}, baseline "
            f"{min(plain['rates']):.0f}-{max(plain['rates']):.0f}; {within} of {case.requests} "
            f"outputs repeat at most {MOST_REPETITION:.0%}; {differ} outputs differ from the "
            f"baseline's, whose own differ by {plain['itself']:.1%} at half the concurrency",
        ),
    )


def _spread(speed: Speed) -> str:
    return f"({min(speed.rates):.0f}-{max(speed.rates):.0f})"


if __name__ == "__main__":
    sys.exit(main())
