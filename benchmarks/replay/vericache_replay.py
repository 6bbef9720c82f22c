"""An SGLang plugin that imposes recorded run lengths on a model without weights.

Random weights say nothing about how far a compressed cache drafts correctly, but a step of such a
model costs what a step of a real one does. Here only the number of accepted tokens is replaced:
all draft steps, the verify pass with its logits and the commit run as always. What is emitted are
the drafted tokens as far as they are taken to stand, then the verify pass's own.

It is no flag of the product, and no part of its wheel: outputs are wrong by construction. A server
runs it only with this folder on its PYTHONPATH, VERICACHE_REPLAY set and ``--load-format dummy``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: the bench command only reads recordings
    import torch

FOLDER = Path(__file__).resolve().parent
# Holds FILE:CONFIG:MODE; a relative FILE lies in this folder.
VARIABLE = "VERICACHE_REPLAY"
STATUS_KEY = "simulated_acceptance"
SEED = 0

logger = logging.getLogger(__name__)


class ReplayError(ValueError):
    """A recording that cannot be replayed, or a server on which it must not."""


@dataclass(frozen=True)
class Recording:
    """Run lengths of some outputs.

    Attributes:
        label: file, config and mode.
        outputs: of a draft that starts at each place of an output, how many tokens are right.
        cap: where the recording stopped counting.
    """

    label: str
    outputs: tuple[tuple[int, ...], ...]
    cap: int

    @classmethod
    def load(cls, place: str) -> Recording:
        """Read ``FILE:CONFIG:MODE``.

        The last ``cap`` places of each output are left out: the output's end cuts their runs.

        Raises:
            ReplayError: with what is there instead.
        """
        parts = place.split(":")
        if len(parts) != 3:
            raise ReplayError(f"{VARIABLE} {place!r} is not FILE:CONFIG:MODE.")
        name, config, mode = parts
        path = FOLDER / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReplayError(f"{VARIABLE}: {path} cannot be read: {error}.") from None
        known = [f"{c}:{m}" for c, modes in content["runs"].items() for m in modes]
        if f"{config}:{mode}" not in known:
            raise ReplayError(
                f"{VARIABLE}: {path.name} has no {config}:{mode}. Accepted: {', '.join(known)}."
            )
        cap = content["cap"]
        outputs = tuple(tuple(o[: len(o) - cap]) for o in content["runs"][config][mode])
        return cls(f"{path.name}, {config}, {mode}", outputs, cap)


class RunReplay:
    """How many tokens each verification yields.

    Every row of the request table walks through the recording from a place of its own, from the
    end of an output to the beginning of the next, and a request goes on where the one before it in
    its row ended: independent of each other and the same in every run. Touches the host nowhere.

    Args:
        rows: of the request table.
    """

    def __init__(
        self, recording: Recording, rows: int, device: Any = "cpu", seed: int = SEED
    ) -> None:
        import torch

        self.recording = recording
        generator = torch.Generator().manual_seed(seed)
        runs = [run for output in recording.outputs for run in output]
        ends = list(accumulate(map(len, recording.outputs)))
        end_of = [end for end, output in zip(ends, recording.outputs, strict=True) for _ in output]
        self.place = torch.randint(len(runs), (rows,), generator=generator).to(device)
        self.runs = torch.tensor(runs, dtype=torch.int64, device=device)
        self.end_of = torch.tensor(end_of, dtype=torch.int64, device=device)

    def yields(self, requests: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Accepted tokens and one more, and the walk goes on by as many.

        Args:
            requests: ``[n]`` rows, each at most once.
            lengths: ``[n]`` int64 drafted tokens: no more can stand.

        Returns:
            ``[n]`` int64 in [1, lengths + 1].
        """
        places = self.place[requests]
        yields = self.runs[places].minimum(lengths) + 1
        after = (places + yields).minimum(self.end_of[places])
        self.place[requests] = after % self.runs.numel()
        return yields


def imposed(verified: Any, drafts: torch.Tensor, yields: torch.Tensor) -> Any:
    """``verified`` as if ``yields`` tokens of each request stood.

    Args:
        verified: verify.verifier.Verified of n requests at width w.
        drafts: ``[n, w - 1]``.

    The tokens are the drafted ones, whose KV the pools hold, and at the last place the verify
    pass's own.
    """
    import torch

    column = torch.arange(drafts.shape[1], device=drafts.device)
    tokens = verified.tokens.clone()
    stands = column < yields[:, None] - 1
    tokens[:, :-1] = torch.where(stands, drafts, tokens[:, :-1])
    return replace(verified, tokens=tokens, yields=yields)


def banner(label: str) -> str:
    line = "!" * 78
    return (
        f"\n{line}\n"
        "!! SIMULATED ACCEPTANCE: outputs of this server are wrong by construction.\n"
        f"!! Run lengths from {label}.\n"
        f"{line}"
    )


def activate() -> None:
    """Called by SGLang in every process; only a scheduler that uses our flag runs our worker."""
    if not os.environ.get("_SGLANG_VERICACHE_ARMED") or VARIABLE not in os.environ:
        return
    try:
        install(Recording.load(os.environ[VARIABLE]))
    except Exception as error:
        # An exception would only be logged, and the server would accept for real.
        sys.exit(f"error: {error}")


def install(recording: Recording) -> None:
    """Stand between the verify pass and what is done with its outcome."""
    from sglang_vericache.verify.verifier import Verifier
    from sglang_vericache.worker import VeriCacheWorker

    run, start, status = Verifier.run, VeriCacheWorker.__init__, VeriCacheWorker.status

    def replaying_run(self, prepared):
        verified = run(self, prepared)
        if not hasattr(self, "replay"):
            self.replay = RunReplay(recording, self.drafts.shape[0], self.drafts.device)
        yields = self.replay.yields(prepared.requests, prepared.lengths)
        drafts = self.drafts[prepared.requests, : verified.tokens.shape[1] - 1]
        return imposed(verified, drafts, yields)

    def announced_start(self, server_args, *arguments, **keywords):
        if server_args.load_format != "dummy":
            raise ReplayError(
                f"{VARIABLE} makes outputs wrong: it is refused unless the weights are random "
                f"(--load-format dummy), and this server loads {server_args.model_path}."
            )
        start(self, server_args, *arguments, **keywords)
        if self.config.horizon > recording.cap:
            raise ReplayError(
                f"--vericache-horizon {self.config.horizon} is longer than what {recording.label} "
                f"counted: at most {recording.cap}."
            )
        logger.warning(banner(recording.label))

    def labelled_status(self):
        return status(self) | {STATUS_KEY: recording.label}

    for owner, name, function in (
        (Verifier, "run", replaying_run),
        (VeriCacheWorker, "__init__", announced_start),
        (VeriCacheWorker, "status", labelled_status),
    ):
        setattr(owner, name, function)
