"""Decode speed of one server for one case, prefixes cached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.server import ServingServer

# Two runs of different length: what they share (reading the request, matching prefixes, one
# extend step each) drops out of the difference.
SHORT_TOKENS, LONG_TOKENS = 16, 272


@dataclass
class Speed:
    """What was measured.

    Attributes:
        rates: decoded tokens a second, one per repetition; the shared part has dropped out.
        whole: tokens a second of the long runs as a client sees them.
        outputs: of the last long run.
    """

    rates: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    infos: list[dict[str, Any] | None] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def tokens_per_round(self) -> float | None:
        infos = [info for info in self.infos if info]
        rounds = sum(info["rounds"] for info in infos)
        return 1 + sum(info["accepted"] for info in infos) / rounds if rounds else None


def measure(server: ServingServer, prompts: Sequence[Sequence[int]], repetitions: int) -> Speed:
    speed = Speed()
    server.generate(prompts, 1)  # prefill
    server.generate(prompts, SHORT_TOKENS)  # spans
    for _ in range(repetitions):
        short, _ = _timed(server, prompts, SHORT_TOKENS)
        before = server.status()
        long, answers = _timed(server, prompts, LONG_TOKENS)
        after = server.status()
        count = len(prompts)
        speed.rates.append(count * (LONG_TOKENS - SHORT_TOKENS) / max(long - short, 1e-9))
        speed.whole.append(count * LONG_TOKENS / long)
        speed.outputs = [answer["output_ids"] for answer in answers]
        speed.infos = [answer["meta_info"].get("vericache") for answer in answers]
        if after is not None:
            seconds = {k: v - before["phase_seconds"][k] for k, v in after["phase_seconds"].items()}
            speed.phases = seconds | {"wall": long}
    return speed


def _timed(server: ServingServer, prompts, tokens: int) -> tuple[float, list[dict[str, Any]]]:
    started = time.perf_counter()
    answers = server.generate(prompts, tokens)
    return time.perf_counter() - started, answers
