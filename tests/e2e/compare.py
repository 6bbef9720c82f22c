"""Are these the same answers, and was drafting real?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cases import ANYTHING, DRAFTS, Answer, Answers, Call

# In float32 the same logits from differently shaped passes agree to about 1e-5; where the two
# best tokens are closer than this, either may win. Such places are counted and shown.
TIE_GAP = 1e-4
# Fewer tokens than this may fit into one plain step or an empty draft.
DRAFTING_TOKENS = 32


@dataclass
class Verdict:
    """Outcome of a comparison over many calls.

    Attributes:
        round_tokens, tokens: of calls that expect drafting, decoded tokens by rounds and in all.
    """

    compared: int = 0
    mismatches: list[str] = field(default_factory=list)
    near_ties: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    round_tokens: int = 0
    tokens: int = 0

    @property
    def round_share(self) -> float:
        return self.round_tokens / max(self.tokens, 1)

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / max(self.rounds, 1)

    def summary(self) -> str:
        return (
            f"{self.compared} compared, {len(self.mismatches)} mismatches, "
            f"{len(self.near_ties)} near ties, {self.round_share:.0%} of tokens from rounds, "
            f"{self.accepted_per_round:.2f} accepted a round"
        )


def judge(calls: Iterable[Call], reference: Answers, ours: Answers) -> Verdict:
    verdict = Verdict()
    for call in calls:
        answer = ours[call.name]
        if call.compared:
            _compare(call, reference[call.name], answer, verdict)
        _check_drafting(call, answer, verdict)
    return verdict


def _compare(call: Call, expected: Answer, answer: Answer, verdict: Verdict) -> None:
    verdict.compared += 1
    if expected.prompt_tokens != answer.prompt_tokens:
        verdict.problems.append(f"{call.name}: another prompt")
    where = first_difference(expected.ids, answer.ids)
    if where is None:
        if (expected.text, expected.finish) != (answer.text, answer.finish):
            verdict.mismatches.append(
                f"{call.name}: same tokens, but {expected.finish} {expected.text!r} "
                f"became {answer.finish} {answer.text!r}"
            )
        return
    gap = expected.gaps[where] if where < len(expected.gaps) else float("inf")
    line = (
        f"{call.name}: token {where} of {len(expected.ids)}: {expected.ids[where : where + 4]} "
        f"became {answer.ids[where : where + 4]} (gap of the two best {gap:.2e})"
    )
    (verdict.near_ties if gap < TIE_GAP else verdict.mismatches).append(line)


def first_difference(a: list[int], b: list[int]) -> int | None:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _check_drafting(call: Call, answer: Answer, verdict: Verdict) -> None:
    if call.expect == ANYTHING:
        return
    info = answer.info
    if info is None:
        verdict.problems.append(f"{call.name}: the response has no vericache field")
        return
    if call.expect == DRAFTS:
        round_tokens = info["accepted"] + info["rounds"]
        verdict.rounds += info["rounds"]
        verdict.drafted += info["drafted"]
        verdict.accepted += info["accepted"]
        verdict.round_tokens += round_tokens
        verdict.tokens += round_tokens + sum(info["plain"].values())
        if len(answer.ids) >= DRAFTING_TOKENS and not info["rounds"]:
            verdict.problems.append(f"{call.name}: never drafted: {info}")
    elif set(info["plain"]) != {call.expect} or info["rounds"]:
        verdict.problems.append(f"{call.name}: expected plain by {call.expect}, got {info}")
