"""What rotation costs and brings: told to the step watch, and foreseen from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_vericache.loader.planner import Costs, Memory, Runner, how_many_fit
from sglang_vericache.rounds.agreement import mean_yields
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.rounds.step_watch import StepWatch


def tell(
    watch: StepWatch,
    reqs: Sequence[Any],
    states: Sequence[RequestState],
    committed: Sequence[int],
    plan: RoundPlan,
    waiting: bool,
) -> None:
    """What the step that begins does.

    Args:
        waiting: a request wants memory that is not there.
    """
    steady = {i for i, s in enumerate(states) if s.steady}
    # Who is decoded plainly beside others that draft says nothing of these.
    drafting = any(i in steady for i, _ in (*plan.draft, *plan.verify))
    turns = [i for i, _ in plan.verify] if drafting else plan.plain
    whole = [reqs[i].rid for i, drafted in plan.verify if drafted >= states[i].horizon]
    forwards = plan.most_drafted + bool(plan.verify) + bool(plan.plain)
    lengths = {req.rid: n for req, n in zip(reqs, committed, strict=True)}
    rotating = True if len(steady) < len(states) else False if waiting else None
    watch.step(lengths, [reqs[i].rid for i in turns if i in steady], whole, forwards, rotating)


def foresee(
    watch: StepWatch,
    copies: Any,
    runners: Sequence[Runner],
    memory: Memory,
    states: Sequence[RequestState],
) -> Costs | None:
    """None as long as too little is known.

    Args:
        copies: counters of the loader.
    """
    if watch.round_s is None or not runners:
        return None
    rate = copies.tokens / copies.seconds if copies.seconds > 0 else watch.link_rate
    longest = max(max(runner.tokens for runner in runners), 1)
    known = [s for s in states if s.agreement.shown]
    whole = mean_yields((s.agreement.value, s.horizon) for s in known)
    deep = mean_yields((s.agreement.value, s.deepest) for s in known)
    return Costs(
        how_many_fit(runners, memory),
        watch.round_s,
        watch.step_s,
        watch.forward_s,
        longest / rate,
        watch.round_tokens or 1.0,
        watch.whole_tokens if whole is None else whole,
        deep,
    )
