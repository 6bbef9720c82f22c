"""What the demo concludes from the records of both servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_vericache.demo.programs import Record
from sglang_vericache.metrics import DraftCounters

_NGRAM_WORDS = 8


@dataclass(frozen=True)
class Run:
    """One server's part of the demo.

    Attributes:
        seconds: of the workload, without starting and stopping.
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
    unit = "character"
    expected: Sequence[Any] = reference.text
    got: Sequence[Any] = ours.text
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


def problems(reference: Run, ours: Run) -> list[str]:
    """Everything that makes the demo fail; outputs that nothing drafted prove nothing."""
    pairs = zip(reference.records, ours.records, strict=True)
    found = [text for text in (difference(a, b) for a, b in pairs) if text]
    if not _totals(ours.records).rounds:
        found.append("The vericache server did not draft at all.")
    return found


def table(reference: Run, ours: Run) -> str:
    """One line a request, as text."""
    head = (
        *("request", "API", "prompt", "output", "identical", "tokens", "KV rows", "cached"),
        "seconds",
    )
    units = ("", "", "tokens", "tokens", "", "a round", "read", "ref/ours", "ref/ours")
    rows: list[tuple[str, ...]] = [head, units]
    for a, b in zip(reference.records, ours.records, strict=True):
        draft = drafting(b)
        rows.append(
            (
                b.name,
                b.api,
                str(b.prompt_tokens),
                str(b.output_tokens),
                "NO" if difference(a, b) else "yes",
                _number(draft.tokens_per_round),
                _percent(draft.rows_read, draft.rows_full),
                f"{a.cached_tokens}/{b.cached_tokens}",
                f"{a.seconds:.1f}/{b.seconds:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(_align(cells, widths)).rstrip() for cells in rows]
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])


def summary(reference: Run, ours: Run) -> str:
    """Totals of the run, as text."""
    pairs = list(zip(reference.records, ours.records, strict=True))
    same = sum(difference(a, b) is None for a, b in pairs)
    with_ids = sum(a.output_ids is not None and b.output_ids is not None for a, b in pairs)
    total = _totals(ours.records)
    reasons = ", ".join(f"{reason} {count}" for reason, count in total.plain.items())
    share = _percent(total.round_tokens, total.tokens)
    spans = ours.spans or {}
    lines = {
        "identical outputs": f"{same} of {len(pairs)} (text of all, token ids of {with_ids})",
        "tokens a round": f"{_number(total.tokens_per_round)} ({total.accepted} of {total.drafted} "
        "drafted tokens accepted)",
        "tokens from rounds": f"{share} of {total.tokens} decoded; one by one: {reasons or 'none'}",
        "KV rows read": f"{_percent(total.rows_read, total.rows_full)} of what plain decoding "
        "reads for the same tokens",
        "compressed spans": f"{spans.get('built', 0)} built, {spans.get('reused', 0)} reused, "
        f"{spans.get('folded', 0)} folded",
        "repetition": f"{_repetition(ours.records)} of the {_NGRAM_WORDS}-word sequences occur "
        "earlier in their answer (loops are easy to draft)",
        "peak memory": f"{_gib(reference)} reference, {_gib(ours)} vericache",
        "seconds": f"{reference.seconds:.0f} reference, {ours.seconds:.0f} vericache (requests)",
    }
    return "\n".join(f"{name:18}  {text}" for name, text in lines.items())


def as_json(reference: Run, ours: Run) -> dict[str, Any]:
    """Everything above as plain values."""
    return {
        "problems": problems(reference, ours),
        "reference": asdict(reference),
        "vericache": asdict(ours),
        "drafting": {record.name: record.counters for record in ours.records},
    }


def drafting(record: Record) -> DraftCounters:
    """What the server reported of one request; all zero from an unmodified server."""
    return DraftCounters.parse(record.counters or {})


def _totals(records: Sequence[Record]) -> DraftCounters:
    total = DraftCounters()
    for record in records:
        total.add(drafting(record))
    return total


def _repetition(records: Sequence[Record]) -> str:
    repeated = whole = 0
    for record in records:
        words = record.text.split()
        grams = [tuple(words[i : i + _NGRAM_WORDS]) for i in range(len(words) - _NGRAM_WORDS + 1)]
        whole += len(grams)
        repeated += len(grams) - len(set(grams))
    return _percent(repeated, whole)


def _align(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    texts, numbers = slice(0, 2), slice(2, None)
    return [
        *(c.ljust(w) for c, w in zip(cells[texts], widths[texts], strict=True)),
        *(c.rjust(w) for c, w in zip(cells[numbers], widths[numbers], strict=True)),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _gib(run: Run) -> str:
    return f"{run.peak_memory_bytes / (1 << 30):.1f} GiB"
