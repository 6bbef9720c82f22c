"""``python -m sglang_vericache.demo``: the same requests with and without the flag, on a CPU."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from sglang_vericache.demo import DemoError
from sglang_vericache.demo.comparison import Run, as_json, problems, summary, table
from sglang_vericache.demo.model import default_cache_dir, prepare_model
from sglang_vericache.demo.programs import REQUESTS, Record, run_workload
from sglang_vericache.demo.server import Server, reach_directly
from sglang_vericache.import_path import leave_checkouts

# Both servers get the same pool, so that cached tokens and evictions can be compared.
POOL_TOKENS = 16000
_VERICACHE = "vericache"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_vericache demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records to FILE")
    arguments = parser.parse_args(argv)
    leave_checkouts()  # before the tokenizer is loaded
    # SIGTERM as an exception, so that a terminated demo stops its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(arguments.json)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(json_file: Path | None) -> int:
    started = time.monotonic()
    if json_file is not None:
        try:
            json_file.touch()  # minutes later would be a bad time to find out
        except OSError as error:
            raise DemoError(f"--json {json_file} cannot be written: {error.strerror}.") from error
    cache = default_cache_dir()
    model = prepare_model(cache)
    reach_directly()
    tokenizer = _tokenizer(model)
    pool = ("--max-total-tokens", str(POOL_TOKENS))
    reference = Server(
        "reference",
        model,
        cache / "demo-reference.log",
        pool,
        {"SGLANG_PLUGINS": "none"},  # not even loaded: an unmodified SGLang
    )
    reference_run = _measure(reference, tokenizer)
    # Its contexts are short; what it shows is drafts over a compressed cache.
    flags = (*pool, "--enable-vericache", "--vericache-keep-min", "0")
    ours = Server(_VERICACHE, model, cache / "demo-vericache.log", flags)
    our_run = _measure(ours, tokenizer)

    if json_file is not None:
        content = as_json(reference_run, our_run)
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(reference_run, our_run))
    print()
    print(summary(reference_run, our_run))
    print(f"{'whole demo':18}  {time.monotonic() - started:.0f} s")
    found = problems(reference_run, our_run)
    for problem in found:
        print(f"\n{problem}")
    print(
        "\nA CPU run shows that the outputs are the same and how much of the KV cache is read; "
        "its seconds say nothing about speed on a GPU."
    )
    return 1 if found else 0


def _measure(server: Server, tokenizer) -> Run:
    records: list[Record] = []
    with server:
        before = _spans(server)
        started = time.monotonic()
        with tqdm(total=REQUESTS, desc=f"asking the {server.name} server", unit="request") as bar:

            def on_record(record: Record) -> None:
                records.append(record)
                bar.update()

            try:
                run_workload(server.url, tokenizer, on_record)
            except Exception as error:  # three client libraries, each with its own
                raise DemoError(
                    f"Request {len(records) + 1} failed on the {server.name} server "
                    f"({type(error).__name__}: {error}). {server.log_tail()}"
                ) from error
        seconds = time.monotonic() - started
        after = _spans(server)
    spans = after and {name: value - (before or {}).get(name, 0) for name, value in after.items()}
    return Run(records, server.peak_memory_bytes, seconds, spans)


def _spans(server: Server) -> dict[str, int] | None:
    """The plugin's span counters; none before its first batch, or without it."""
    return server.info().get(_VERICACHE, {}).get("spans")


def _tokenizer(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


if __name__ == "__main__":
    sys.exit(main())
