"""Both sides of a comparison -> rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.registry import CASES
from benchmarks.rows import Row
from benchmarks.serving.decode_notes import decode_notes
from benchmarks.serving.figures import Divergence
from benchmarks.serving.pools import pool_note
from benchmarks.serving.queue_notes import median_queue_run, queue_notes, queue_rates
from benchmarks.serving.rates import (
    ALL_RUN,
    CLOSED,
    WHOLE,
    Basis,
    Record,
    basis_of,
    share,
    share_prompts,
)
from benchmarks.serving.rescore import SAME_START
from benchmarks.serving.side import read_runs
from benchmarks.serving.wording import servers, spread


@dataclass
class Measured:
    """All runs of one side with the same flags, model and device.

    Attributes:
        records: in the order of their beginning, by the names of their files.
    """

    name: str
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def last(self) -> Record:
        return list(self.records.values())[-1]

    def of(self, case: str) -> list[Record]:
        """Figures of the case, one for each start of the server that has them."""
        return [r["cases"][case] for r in self.records.values() if case in r["cases"]]

    def like(self, other: Measured, case: str) -> bool:
        """Whether it has measured the same: equal requests to the same model on the same device."""
        if not self.of(case) or not share(self.last, other.last, "model", "gpu"):
            return False
        one, another = self.of(case)[-1], other.of(case)[-1]
        return share(one, another, "context", "rate") and share_prompts(one, another)

    def rates(self, case: str, basis: Basis) -> list[float]:
        return basis.among(self.of(case))

    @property
    def starts_s(self) -> list[float]:
        """Without those that were the first on a machine, which compile kernels for the others,
        and those that shared it with others that started."""
        return [
            r["start_s"]
            for r in self.records.values()
            if not r["first_start"] and not r.get("together")
        ]


class Comparison:
    """What lies in a folder of figures.

    Attributes:
        order: names of the sides as their servers ran.
        together: some of them ran at the same time.
        failures: cases without figures, and why.
    """

    def __init__(self, folder: Path) -> None:
        sides: dict[tuple[str, ...], Measured] = {}
        self.order: list[str] = []
        self.together = False
        self.failures: list[str] = []
        for i, (path, record) in enumerate(read_runs(folder)):
            record.setdefault("first_start", i == 0)  # older ones do not say
            name = record["side"]["name"]
            # Rates of other flags, or of ours at another commit, are not those of one thing.
            key = (name, record["flags"], record["model"], record["gpu"])
            key += (record["commit"],) if name.startswith("ours") else ()
            sides.setdefault(key, Measured(name)).records[path.name] = record
            self.order.append(name)
            self.together |= record.get("together", False)
            self.failures += [f"{name}: {case}: {why}" for case, why in record["failed"].items()]
        self.plain = [side for side in sides.values() if side.name.startswith("plain")]
        self.ours = [side for side in sides.values() if side.name.startswith("ours")]

    def rows(self) -> Iterator[tuple[str, Row]]:
        """(results file, row) of every case that both sides have measured."""
        for ours in self.ours:
            names = dict.fromkeys(name for r in ours.records.values() for name in r["cases"])
            for name in names:
                plains = [side for side in self.plain if side.like(ours, name)]
                if not plains:
                    yield from self._attached(name, ours)
                    if any(side.of(name) for side in self.plain):
                        self.failures.append(
                            f"{ours.name}: {name}: the unmodified server got other requests or "
                            "another model, or ran on another device: nothing to compare with"
                        )
                    continue
                if "rate" in ours.of(name)[0]:
                    yield from self._traffic(name, ours, plains)
                elif "levels" in ours.of(name)[0]:
                    yield from self._queue(name, ours, plains)
                    yield from self._exactness(name, ours, plains)
                else:
                    yield from self._decode(name, ours, plains)
                    yield from self._exactness(name, ours, plains)
            same = [s for s in self.plain if share(s.last, ours.last, "model", "gpu")]
            if same and same[0].starts_s and ours.starts_s:
                yield "serving.jsonl", self._start_up(ours, same[0])

    def _row(self, case: str, ours: Measured, **values: Any) -> Row:
        record = next(r for r in ours.records.values() if case in r["cases"] or case == START_UP)
        kept = ("gpu", "commit", "command", "sglang", "date", "model")
        return Row(
            case=case,
            flags=record["flags"],
            simulated_acceptance=record["simulated"],
            **{key: record[key] for key in kept},
            **values,
        )

    def _decode(
        self, case: str, ours: Measured, plains: Sequence[Measured]
    ) -> Iterator[tuple[str, Row]]:
        basis = basis_of([side.of(case) for side in (ours, *plains)])
        yield self._decode_row("decode_rate", basis, case, ours, plains)
        if basis is ALL_RUN:
            # Its stretch may be a small part of the answers, so it does not stand alone.
            yield self._decode_row("fixed_set_rate", WHOLE, case, ours, plains)
        looped = [side for side in plains if side.rates(case, CLOSED)]
        if looped and ours.rates(case, CLOSED):
            yield self._decode_row("closed_loop_rate", CLOSED, case, ours, looped)

    def _decode_row(
        self, metric: str, basis: Basis, case: str, ours: Measured, plains: Sequence[Measured]
    ) -> tuple[str, Row]:
        """Against the fastest of ``plains``; all have the basis."""
        best = max(plains, key=lambda side: statistics.median(side.rates(case, basis)))
        mine = basis.last(ours.of(case))
        rates, baseline = ours.rates(case, basis), best.rates(case, basis)
        parts = [
            f"{mine['requests']} x {mine['context']} + {mine['tokens']} tokens, greedy, prefixes "
            f"cached; {basis.told(mine)}",
            f"{len(rates)} {basis.unit} {spread(rates)}, baseline {len(baseline)} {basis.unit} "
            f"{spread(baseline)}; {servers(self.order, self.together)}",
            *self._baseline_note(best, plains, case, basis),
            *_machines(ours, best),
            *decode_notes(basis, ours.of(case), best.of(case)),
        ]
        per_round = basis.run(mine)["tokens_per_round"]
        return "serving.jsonl", self._rate_row(
            *(case, ours, metric, rates, baseline, per_round, parts)
        )

    def _rate_row(
        self,
        case: str,
        ours: Measured,
        metric: str,
        rates: Sequence[float],
        baseline: Sequence[float],
        per_round: float | None,
        notes: Iterable[str],
    ) -> Row:
        return self._row(
            case,
            ours,
            metric=metric,
            value=round(statistics.median(rates), 1),
            baseline=round(statistics.median(baseline), 1),
            unit="tokens/s",
            tokens_per_round=per_round and round(per_round, 3),
            note="; ".join(notes),
        )

    def _baseline_note(
        self, best: Measured, plains: Sequence[Measured], case: str, basis: Basis
    ) -> Iterator[str]:
        if len(plains) > 1:
            flags = best.last["side"]["flags"] or "the same flags"
            rates = {s.name: statistics.median(s.rates(case, basis)) for s in plains}
            others = ", ".join(
                f"{rates[s.name]:.0f} with {s.last['side']['flags'] or 'the same flags'}"
                for s in plains
                if s is not best
            )
            yield f"baseline with {flags}, the best ({others})"

    def _traffic(self, case: str, ours: Measured, plains: Sequence[Measured]) -> Iterator:
        mine, theirs = ours.of(case), plains[0].of(case)
        rate, count = mine[0]["rate"], mine[0]["requests"]
        note = (
            f"sglang.bench_serving random-ids, {count} Poisson arrivals at {rate:.1f} a second "
            f"of {mine[0]['capacity']:.1f} that the unmodified server can take; "
            f"{servers(self.order, self.together)}"
        )
        for metric, unit, key in (
            ("output_throughput", "tokens/s", "output_throughput"),
            ("between_tokens_p99", "ms", "p99_itl_ms"),
            ("first_token_p99", "ms", "p99_ttft_ms"),
        ):
            values, baseline = (
                [run[key] for figures in side for run in figures["runs"]] for side in (mine, theirs)
            )
            row = self._row(
                case,
                ours,
                metric=metric,
                value=round(statistics.median(values), 3),
                baseline=round(statistics.median(baseline), 3),
                unit=unit,
                note=f"{note}; {len(values)} runs {spread(values)}, baseline {spread(baseline)}",
            )
            yield "serving.jsonl", row

    def _queue(
        self, case: str, ours: Measured, plains: Sequence[Measured]
    ) -> Iterator[tuple[str, Row]]:
        """Against the unmodified server at its best concurrency, and against the flag without
        offloading."""
        best = max(plains, key=lambda side: max(queue_rates(side.of(case))))
        yield self._queue_row(case, ours, best, "queue_rate")
        yield from self._attached(case, ours)

    def _attached(self, case: str, ours: Measured) -> Iterator[tuple[str, Row]]:
        """A queue with offloading against the flag without."""
        offloads = "--vericache-offload"
        if "levels" not in ours.of(case)[0] or offloads not in ours.last["flags"]:
            return
        for side in self.ours:
            if side.of(case) and offloads not in side.last["flags"]:
                yield self._queue_row(case, ours, side, "queue_rate_of_attached")
                return

    def _queue_row(
        self, case: str, ours: Measured, other: Measured, metric: str
    ) -> tuple[str, Row]:
        mine, theirs = ours.of(case), other.of(case)
        rates, baseline = queue_rates(mine), queue_rates(theirs)
        per_round = median_queue_run(mine[-1])["tokens_per_round"]
        notes = queue_notes(
            mine[-1], theirs[-1], rates, baseline, servers(self.order, self.together)
        )
        pools = filter(None, [pool_note(ours.last["flags"], other.last["flags"])])
        return "offload.jsonl", self._rate_row(
            *(case, ours, metric, rates, baseline, per_round, (*pools, *notes))
        )

    def _exactness(self, case: str, ours: Measured, plains: Sequence[Measured]) -> Iterator:
        """How often outputs part, beside how often the unmodified server's own do."""
        if ours.last["simulated"]:
            return
        theirs = [f for side in plains for f in side.of(case)]
        itself = [Divergence(**f["itself"]) for f in theirs if "itself" in f]
        rescored = {run: found for f in theirs for run, found in f.get("rescored", {}).items()}
        mine = [run for run, r in ours.records.items() if case in r["cases"] and run in rescored]
        if not itself or not mine:
            return
        figures = ours.records[mine[-1]]["cases"][case]
        parted = Divergence.between(figures["outputs"], theirs[0]["outputs"])
        last, own = rescored[mine[-1]], itself[0]
        controls = [f["own_rescored"] for f in theirs if "own_rescored" in f]
        note = (
            f"in 1000 tokens; {parted.parted} of {parted.outputs} outputs part from the "
            f"unmodified server's, of whose own {own.parted} of {own.outputs} do "
            f"{_otherwise(theirs[0])}; {last['tokens']} tokens of {last['outputs']} outputs "
            f"rescored: near ties are at most {last['margin']} below the best "
            f"(worst {last['worst']:.3f})" + "".join(_control(one) for one in controls[-1:])
        )
        row = self._row(
            case,
            ours,
            metric="first_differences",
            value=round(parted.per_1000_tokens, 3),
            baseline=round(own.per_1000_tokens, 3),
            unit="in 1000 tokens",
            mismatches=len(last["mismatches"]),
            near_ties=last["near_ties"],
            note=note,
        )
        yield "exactness.jsonl", row

    def _start_up(self, ours: Measured, plain: Measured) -> Row:
        times, baseline = ours.starts_s, plain.starts_s
        return self._row(
            START_UP,
            ours,
            metric="start_up",
            value=round(statistics.median(times), 1),
            baseline=round(statistics.median(baseline), 1),
            unit="s",
            note=f"until the server answers; {len(times)} starts {spread(times)}, baseline "
            f"{len(baseline)} {spread(baseline)}; none the first on the machine",
        )


def _otherwise(figures: Record) -> str:
    """How a plain server decoded once more, to be compared with itself."""
    levels = list(figures.get("levels", ()))
    return f"sent {levels[-1]} at a time" if levels else "at half the concurrency"


def _control(own: Record) -> str:
    """What rescoring finds where nothing was drafted."""
    whose = own.get("of", SAME_START)
    return (
        f"; of the unmodified server's own {own['tokens']} tokens ({whose}) {own['near_ties']} are "
        f"near ties and {len(own['mismatches'])} further below (furthest {own['furthest']:.3f})"
    )


START_UP = "start-up"


def _machines(ours: Measured, plain: Measured) -> Iterator[str]:
    one, other = ({r.get("machine") for r in side.records.values()} for side in (ours, plain))
    if one != other:
        yield "NOT ON THE SAME MACHINE as the baseline, though of the same kind"


def summary(rows: Sequence[tuple[str, Row]]) -> str:
    """A line for each row."""
    lines = []
    for _, row in rows:
        case = CASES.get(row.case)
        wanted = f", {case.least_factor} wanted" if case and case.least_factor else ""
        per_round = f", {row.tokens_per_round:.1f} tokens a round" if row.tokens_per_round else ""
        simulated = " SIMULATED ACCEPTANCE" if row.simulated_acceptance else ""
        lines.append(
            f"{row.case} {row.metric}: {row.value:g} against {row.baseline:g} {row.unit}{wanted}"
            f"{per_round}{simulated}\n  {row.note}"
        )
    return "\n".join(lines)
