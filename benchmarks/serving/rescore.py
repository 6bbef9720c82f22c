"""Is each token of an output what the full model says, or as good as?

Level E1: in bfloat16 two passes of different shape differ in their last bits, so that outputs may
part where two tokens are nearly equally likely. The unmodified server reads prompt and output in
one prefill and says how far each token lies below its own best one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.serving.rates import Record, share_prompts

# Logits of about 20 in bfloat16 are multiples of 1/8; two such steps are still a tie.
MARGIN = 0.25
# Log-probabilities are float32: a difference of two steps comes out a little above or below them.
ROUNDING = 1e-5
BATCH = 8
Records = Mapping[Path, Record]
# Whose outputs the control is of.
SAME_START, ANOTHER = "the same start", "another start"
TIMEOUT_S = 600


@dataclass
class Rescored:
    """Outcome over all outputs.

    Attributes:
        tokens: how many were looked at.
        near_ties: not the best, but at most the margin below it.
        mismatches: (output, place in it, distance to the best) of the others.
        worst, furthest: largest distance to the best, among the near ties and of all.
    """

    tokens: int = 0
    near_ties: int = 0
    mismatches: list[tuple[int, int, float]] = field(default_factory=list)
    worst: float = 0.0
    furthest: float = 0.0

    def add(self, output: int, below: Sequence[float], margin: float) -> None:
        """``below``: distance of each token of an output to the best one, in log-probability."""
        self.tokens += len(below)
        for place, distance in enumerate(below):
            self.furthest = max(self.furthest, distance)
            if distance > margin + ROUNDING:
                self.mismatches.append((output, place, distance))
            elif distance > 0:
                self.near_ties += 1
                self.worst = max(self.worst, distance)

    def describe(self, outputs: int, margin: float = MARGIN) -> dict[str, Any]:
        """For the file of figures."""
        return {"margin": margin, "outputs": outputs, **asdict(self)}

    def summary(self) -> str:
        return (
            f"{self.tokens} tokens rescored, {self.near_ties} near ties (worst {self.worst:.3f}), "
            f"{len(self.mismatches)} mismatches"
        )


def rescore(
    url: str,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    margin: float = MARGIN,
) -> Rescored:
    """Rescore greedy ``outputs`` by the server at ``url``, which must not draft."""
    result = Rescored()
    for at in range(0, len(prompts), BATCH):
        pairs = list(zip(prompts[at : at + BATCH], outputs[at : at + BATCH], strict=True))
        body: dict[str, Any] = {
            "input_ids": [[*prompt, *output] for prompt, output in pairs],
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": [len(prompt) - 1 for prompt, _ in pairs],
            "top_logprobs_num": 1,
        }
        response = requests.post(url + "/generate", json=body, timeout=TIMEOUT_S)
        response.raise_for_status()
        for i, (answer, (_, output)) in enumerate(zip(response.json(), pairs, strict=True)):
            result.add(at + i, distances(answer["meta_info"], output), margin)
    return result


def distances(meta: dict[str, Any], output: Sequence[int]) -> list[float]:
    """Of each token of ``output`` to the best one at its place.

    Args:
        meta: ``meta_info`` whose log-probabilities begin at the prompt's last token, for which
            there is none.
    """
    chosen, best = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
    if [entry[1] for entry in chosen] != list(output):
        raise ValueError("the server's log-probabilities belong to other tokens")
    return [max(0.0, top[0][0] - entry[0]) for entry, top in zip(chosen, best, strict=True)]


def unscored(records: Records, case: str, like: Record) -> dict[str, list[list[int]]]:
    """Outputs of ours that no earlier plain server has scored, by the name of their file.

    Args:
        like: figures of the server that is to score them.
    """
    found = {path.name: record["cases"].get(case) for path, record in records.items()}
    known = {name for figures in found.values() if figures for name in figures.get("rescored", ())}
    return {
        path.name: figures["outputs"]
        for path, record in records.items()
        if is_ours(record) and (figures := found[path.name]) and path.name not in known
        if share_prompts(figures, like)
    }


def earlier_own(records: Records, case: str, flags: str, like: Record) -> list[list[int]] | None:
    """Outputs of another start of the unmodified server, to be held against ours: what scores them
    has computed their prompts anew, as it has for ours. A server's own come from the very keys and
    values that it scores them by, and lie nearer to its best tokens than any other's.

    Args:
        flags: of the plain side.
        like: figures of the server that is to score them.
    """
    for record in records.values():
        figures = record["cases"].get(case)
        if is_ours(record) or record["side"]["flags"] != flags or not figures:
            continue
        if share_prompts(figures, like):
            return figures["outputs"]
    return None


def is_ours(record: Record) -> bool:
    return record["side"]["name"].startswith("ours")
