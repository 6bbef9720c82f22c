"""Commands beside the server: check, compressors, cpu-env, demo, plan, bench."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any, cast

from sglang_vericache import PINNED_SGLANG, __version__


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_vericache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, help in (
        ("check", check, "say whether the plugin can work in this installation"),
        ("compressors", compressors, "list what --vericache-compressor accepts"),
        ("cpu-env", cpu_env, "print the environment that SGLang's CPU engine needs"),
    ):
        commands.add_parser(name, help=help).set_defaults(run=function)
    command = commands.add_parser("demo", help="compare a small model with and without the flag")
    command.add_argument("--json", metavar="FILE", help="write all records to FILE")
    command.set_defaults(run=demo)
    from sglang_vericache.forecast import report

    command = commands.add_parser("plan", help=report.HELP)
    report.add_arguments(command)
    command.set_defaults(run=report.run)
    commands.add_parser("bench", help="compare speed with and without the flag, from a checkout")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # whose options are the benchmark's own
        return bench(argv[1:])
    arguments = vars(parser.parse_args(argv))
    del arguments["command"]
    return arguments.pop("run")(**arguments)


def check() -> int:
    """A table of what the flag needs; exit code 0 when all of it is there."""
    from sglang_vericache import plugin

    found = plugin.installed_sglang()
    rows: list[tuple[str, str, str | None]] = [("sglang-vericache", __version__, None)]
    wanted = f"sglang=={PINNED_SGLANG}"
    rows.append((wanted, found or "-", None if found == PINNED_SGLANG else "another release"))
    if found == PINNED_SGLANG:
        rows += _plugin_rows()
    width = max(len(name) for name, _, _ in rows)
    for name, value, problem in rows:
        print(f"{'FAIL' if problem else 'ok':4}  {name:{width}}  {value}  {problem or ''}".rstrip())
    failed = sum(problem is not None for _, _, problem in rows)
    print(f"{failed} of {len(rows)} failed" if failed else "all good")
    return 1 if failed else 0


def _plugin_rows() -> list[tuple[str, str, str | None]]:
    from importlib.metadata import entry_points

    from sglang_vericache import plugin
    from sglang_vericache.hooks import flag_hooks, missing_target, server_hooks

    plugin.activate()
    entries = [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "vericache"]
    rows = [
        ("entry point", ", ".join(entries) or "-", None if entries else "package not installed")
    ]
    rows += [(failure.what, "registration", failure.why) for failure in plugin.failures()]
    for hook in (*flag_hooks(), *server_hooks()):
        if plugin.applies(hook):
            rows.append((hook.target, hook.kind, missing_target(hook.target)))
        elif plugin.is_relevant(hook):
            rows.append((hook.target, "not needed", None))
    return rows


def compressors() -> int:
    """The registered scorers with their declarations."""
    from dataclasses import fields

    from sglang_vericache.compressors.registry import SCORERS

    table = [("name", "scope", "needs", "granularity", "parameters (default)", "source")]
    for name, scorer in SCORERS.items():
        parameters = ", ".join(f"{f.name} ({f.default})" for f in fields(cast(Any, scorer))) or "-"
        needs = "+".join(sorted(scorer.needs)) or "-"
        table.append((name, scorer.scope, needs, scorer.granularity, parameters, scorer.paper))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def cpu_env() -> int:
    """Shell assignments for both servers of a comparison on a machine without a GPU."""
    import os

    from sglang_vericache.cpu import engine

    before = dict(os.environ)
    for key, value in engine.environment(before).items():
        if before.get(key) != value:
            print(f"export {key}={shlex.quote(value)}")
    return 0


def demo(json: str | None) -> int:
    """The same requests to two CPU servers, with and without the flag."""
    from sglang_vericache.demo.__main__ import main

    return main(["--json", json] if json else [])


def bench(argv: list[str]) -> int:
    """Both servers one after the other, by benchmarks/ of the checkout."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not (folder / "serving").is_dir() or spec is None or spec.loader is None:
        print(
            "error: bench runs from a checkout, and this is an installed package: clone the "
            "repository and install it with pip install -e .",
            file=sys.stderr,
        )
        return 2
    # By its place, for the checkout must not be on the path (import_path.py); where the current
    # directory has put it there, benchmarks takes it off.
    if "benchmarks" not in sys.modules:
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    from benchmarks.serving.__main__ import main as run

    return run(argv)
