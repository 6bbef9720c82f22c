"""``python -m benchmarks list | run CASE... [-- ARGUMENT...] | render``."""

from __future__ import annotations

import argparse
import sys

from benchmarks import registry


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    # What follows -- belongs to the measure, whose options are its own.
    ours, passed_on = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        ours, passed_on = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the registered cases")
    run = commands.add_parser(
        "run", help="run the tests, then measure", epilog="what follows -- goes to the measure"
    )
    run.add_argument("cases", nargs="+", metavar="CASE")
    run.add_argument(
        "--tests-passed-at",
        metavar="COMMIT",
        help="do not run the tests: they passed at this commit, which must be the one here, "
        "without changes",
    )
    render = commands.add_parser("render", help="tables and plots out of benchmarks/results")
    render.add_argument("--check", action="store_true", help="write nothing; fail if tables differ")
    render.add_argument("--no-plots", action="store_true", help="tables only, without matplotlib")
    options = parser.parse_args(ours)
    if passed_on and options.command != "run":
        parser.error("only run takes arguments after --")
    if options.command == "list":
        print(listing())
        return 0
    if options.command == "render":
        from benchmarks.render import render_all

        return render_all(check=options.check, plots=not (options.no_plots or options.check))
    from benchmarks.runner import RefusedError, measure

    try:
        return 1 if measure(options.cases, passed_on, options.tests_passed_at) else 0
    except (RefusedError, registry.UnknownCaseError) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def listing() -> str:
    lines = [("case", "measure", "model", "context", "requests", "wanted", "shows")]
    for case in registry.CASES.values():
        wanted = "-" if case.least_factor is None else f"{case.least_factor}x"
        size = (str(case.context or "-"), str(case.requests or "-"))
        lines.append((case.name, case.measure, case.model, *size, wanted, case.shows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
