"""What checksums of host copies cost: ``python -m benchmarks.checksums``.

One fetch of some tokens in the shape of a model, all layers, by the loader's own copier of this
machine: from the host pool to rows of the device pool, without a check and with one. Beside it the
checksum alone, as it is made when a node has been written to the host. On a CPU both pools are
ordinary memory, and a check takes as long as it reads; on a GPU it runs on a stream of its own, and
what counts is how much later the fetch is over.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.rows import Row, append
from benchmarks.serving.shapes import SHAPES
from sglang_vericache.loader.checksums import Checksums
from sglang_vericache.loader.copy import PlainCopier, StreamCopier
from sglang_vericache.loader.job import Job

SHAPE, TOKENS, REPEATS = "8b", 1024, 7
PLACES: dict[str, Callable[[int], torch.Tensor]] = {
    "one run": torch.arange,
    "scattered": torch.randperm,
}


class Bench:
    """Pools of ``tokens`` rows on both sides."""

    def __init__(self, tokens: int) -> None:
        shape = SHAPES[SHAPE]
        size = (tokens, shape["num_key_value_heads"], shape["head_dim"])
        buffers = 2 * shape["num_hidden_layers"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        pinned = self.device == "cuda"
        host = [torch.randn(size).to(torch.bfloat16) for _ in range(buffers)]
        self.host = [layer.pin_memory() for layer in host] if pinned else host
        self.pool = [torch.empty_like(layer, device=self.device) for layer in host]
        self.bytes = sum(layer.nbytes for layer in host)
        self.checksums = Checksums(self.host, self.pool)
        kind = StreamCopier if pinned else PlainCopier
        self.copiers = {
            checked: kind(self.host, self.pool, checksums=self.checksums if checked else None)
            for checked in (False, True)
        }
        for copier in self.copiers.values():
            copier.enter()

    def fetch(self, places: torch.Tensor, checked: bool) -> int:
        """Tokens that came back changed."""
        slots = torch.arange(len(places)).to(self.device)
        job = Job(1, places, slots, places=self.checksums.places_of(places))
        copier = self.copiers[checked]
        copier.submit([job])
        while not copier.arrived(job):
            pass
        return job.changed

    def seal(self, places: torch.Tensor) -> None:
        self.checksums.seal(places, torch.arange(len(places)).to(self.device))
        if self.device == "cuda":
            torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)  # others use the machine as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the loader copies beside everything else
    bench = Bench(TOKENS)
    for name, make in PLACES.items():
        places = make(TOKENS)
        bench.fetch(places, False)
        bench.seal(places)
        assert bench.fetch(places, True) == 0, "an intact copy was called corrupt"
        calls: dict[str, Callable[[], object]] = {
            "fetch": partial(bench.fetch, places, False),
            "fetch_with_check": partial(bench.fetch, places, True),
            "checksum": partial(bench.seal, places),
        }
        rates = {metric: bench.bytes / seconds(call) / 1e9 for metric, call in calls.items()}
        for metric, rate in rates.items():
            print(f"{name:10} {metric:18} {rate:6.2f} GB/s, fetch alone {rates['fetch']:.2f}")
            if not options.no_rows:
                append(
                    "checksums.jsonl",
                    Row(
                        case=f"checksums, {name}",
                        metric=metric,
                        value=round(rate, 3),
                        baseline=round(rates["fetch"], 3),
                        unit="GB/s",
                        model=f"shape:{SHAPE}",
                        flags="--vericache-offload-checksums on",
                        note=f"{TOKENS} tokens, 1 thread, fastest of {REPEATS}; baseline: the same "
                        "fetch without a check; no server",
                    ),
                )


if __name__ == "__main__":
    main()
