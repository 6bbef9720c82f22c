"""What the demo concludes from the records of both servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_vericache.demo.programs import Record


@dataclass(frozen=True)
class Run:
    """One server's part of the demo.

    Attributes:
        spans: the plugin's span counters over the workload; None from an unmodified server.
    """

    records: list[Record]
    peak_memory_bytes: int
    seconds: float
    spans: dict[str, int] | None = None


def difference(reference: Record, ours: Record) -> str | None:
    """Where two outputs differ, in a sentence; None when they are the same."""
    if reference.text == ours.text and reference.output_ids == ours.output_ids:
        return None
    unit, expected, got = "character", reference.text, ours.text
    if reference.output_ids is not None and ours.output_ids is not None:
        unit, expected, got = "token", reference.output_ids, ours.output_ids
    shared = 0
    while shared < min(len(expected), len(got)) and expected[shared] == got[shared]:
        shared += 1
    return (
        f"{ours.name}: the outputs differ from {unit} {shared} on\n"
        f"  reference: {expected[shared : shared + 20]!r} ... in {reference.text!r}\n"
        f"  vericache: {got[shared : shared + 20]!r} ... in {ours.text!r}"
    )


def differences(reference: Run, ours: Run) -> list[str]:
    pairs = zip(reference.records, ours.records, strict=True)
    return [text for text in (difference(a, b) for a, b in pairs) if text]


def table(reference: Run, ours: Run) -> str:
    """One line a request, as text."""
    head = ("request", "API", "prompt", "output", "identical", "tokens", "KV rows", "cached")
    head += ("seconds",)
    units = ("", "", "tokens", "tokens", "", "a round", "read", "ref/ours", "ref/ours")
    rows = [head, units]
    for a, b in zip(reference.records, ours.records, strict=True):
        counters = b.counters or {}
        rows.append(
            (
                b.name,
                b.api,
                str(b.prompt_tokens),
                str(b.output_tokens),
                "NO" if difference(a, b) else "yes",
                _number(counters.get("tokens_per_round")),
                _percent(counters.get("rows_read"), counters.get("rows_full")),
                f"{a.cached_tokens}/{b.cached_tokens}",
                f"{a.seconds:.1f}/{b.seconds:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(_align(cells, widths)).rstrip() for cells in rows]
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])


def summary(reference: Run, ours: Run) -> str:
    """Totals of the run, as text."""
    same = len(ours.records) - len(differences(reference, ours))
    totals = _totals(ours.records)
    spans = ours.spans or {}
    reasons = ", ".join(f"{reason}: {count}" for reason, count in totals["plain"].items())
    in_rounds = totals["accepted"] + totals["rounds"]
    decoded = in_rounds + sum(totals["plain"].values())
    with_ids = sum(record.output_ids is not None for record in ours.records)
    return "\n".join(
        [
            f"identical outputs   {same} of {len(ours.records)} (token ids compared in {with_ids}, "
            "text in all)",
            f"tokens a round      {_number(in_rounds / max(totals['rounds'], 1))} "
            f"({totals['accepted']} of {totals['drafted']} drafted tokens accepted)",
            f"tokens from rounds  {_percent(in_rounds, decoded)} of {decoded} decoded; the others "
            f"one by one ({reasons or 'none'})",
            f"KV rows read        {_percent(totals['rows_read'], totals['rows_full'])} of what "
            "plain decoding reads for the same tokens",
            f"compressed spans    {spans.get('built', 0)} built, {spans.get('reused', 0)} reused, "
            f"{spans.get('folded', 0)} folded",
            f"peak memory         {_gib(reference)} reference, {_gib(ours)} vericache",
            f"seconds             {reference.seconds:.0f} reference, {ours.seconds:.0f} vericache "
            "(requests only)",
        ]
    )


def as_json(reference: Run, ours: Run) -> dict[str, Any]:
    """Everything above as plain values."""
    return {
        "identical": not differences(reference, ours),
        "differences": differences(reference, ours),
        "reference": asdict(reference),
        "vericache": asdict(ours),
    }


def _totals(records: Sequence[Record]) -> dict[str, Any]:
    names = ("rounds", "drafted", "accepted", "rows_read", "rows_full")
    counters = [record.counters for record in records if record.counters]
    plain: Counter[str] = Counter()
    for counter in counters:
        plain.update(counter["plain"])
    return {name: sum(c[name] for c in counters) for name in names} | {"plain": plain}


def _align(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    texts, numbers = slice(0, 2), slice(2, None)
    return [
        *(c.ljust(w) for c, w in zip(cells[texts], widths[texts], strict=True)),
        *(c.rjust(w) for c, w in zip(cells[numbers], widths[numbers], strict=True)),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(part: int | None, whole: int | None) -> str:
    return f"{100 * part / whole:.0f} %" if part is not None and whole else "-"


def _gib(run: Run) -> str:
    return f"{run.peak_memory_bytes / (1 << 30):.1f} GiB"
