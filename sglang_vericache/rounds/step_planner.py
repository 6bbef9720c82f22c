"""What each request does in a scheduler step, from its state and the chosen pace. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.policy import Candidate, RoundPlan, plan_ahead, plan_step
from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.support import END_OF_OUTPUT

# A step costs the host some 50 us for each of its requests (profiled), and launching one more token
# of all of them a few ms: from so many on, several tokens share the former, behind a prefill too.
# Where prompts keep coming, most steps are behind one.
REQUESTS_OF_A_TOKEN = 64
# Prompts keep coming where more than this share of the last steps were behind a prefill.
MANY_BEHIND_PREFILLS, LAST_STEPS = 0.25, 8


class StepPlanner:
    """
    Args:
        max_position: last position that the model's rotary embedding knows.
        ahead: rounds are drafted in the step that verifies the one before, as long as the full KV
            of all requests is on the device and stays there.

    Attributes:
        rounds_ahead: steps that did so.
    """

    def __init__(self, config: VeriCacheConfig, max_position: int, ahead: bool) -> None:
        self.config, self.max_position, self.ahead = config, max_position, ahead
        self._step = self.rounds_ahead = 0
        self._follows_prefill, self._behind_prefills = False, 0.0

    @property
    def prompts_keep_coming(self) -> bool:
        return self._behind_prefills > MANY_BEHIND_PREFILLS

    def prefill(self) -> None:
        """The next step follows a prefill, whose first tokens are sent once that step is launched:
        they are not to wait for many tokens of others."""
        self._follows_prefill = True

    def plan(
        self,
        states: Sequence[RequestState],
        reasons: list[str | None],
        committed: Sequence[int],
        remaining: Sequence[int],
        choice: Choice,
    ) -> RoundPlan:
        """Args:
        reasons: why a request does not draft; where its output ends, that is written here.
        committed: tokens of each request whose KV is computed.
        remaining: tokens that each request may still make. With none it does nothing: under overlap
            scheduling its end is found in a result that is still on its way.
        """
        self._step += 1
        if None not in reasons:  # nobody drafts, often hundreds of requests
            reads = (i for i, state in enumerate(states) if state.full and remaining[i] > 0)
            return RoundPlan(tuple(reads), (), ())
        ahead = self.ahead and all(state.steady for state in states)
        candidates = []
        for i, state in enumerate(states):
            if remaining[i] <= 0:
                reasons[i] = END_OF_OUTPUT
                continue
            room = min(
                self._most(state, choice), remaining[i] - 1, self.max_position - committed[i]
            )
            if reasons[i] is None and room <= 0:
                reasons[i] = END_OF_OUTPUT
            drafts, full, rotates = reasons[i] is None, state.full, state.rotates
            one = Candidate(i, drafts, state.drafted, room, state.group, full, rotates)
            one.enough = state.horizon
            if ahead and drafts and state.drafted:
                one.ahead = self._room_ahead(state, room, committed[i], remaining[i], choice)
            candidates.append(one)
        if ahead:
            plan = plan_ahead(candidates, choice.share, choice.behind)
            self.rounds_ahead += bool(plan.ahead)
            return plan
        groups = self.config.stagger_groups
        return plan_step(candidates, self._step, choice.horizon, groups, choice.share)

    def plain_steps(
        self,
        plan: RoundPlan,
        states: Sequence[RequestState],
        committed: Sequence[int],
        remaining: Sequence[int],
        choice: Choice,
    ) -> int:
        """Tokens to decode plainly in this step, one after the other; asked once a step.

        What outputs do not need any more would be computed in vain, and who comes next would wait
        for it. Arguments as those of `plan`.
        """
        follows_prefill, self._follows_prefill = self._follows_prefill, False
        self._behind_prefills += (follows_prefill - self._behind_prefills) / LAST_STEPS
        if not plan.only_plain or any(states[i].token_by_token for i in plan.plain):
            return 1
        most = min(choice.plain_steps, self.config.verify_width)
        most = min(most, max(remaining[i] for i in plan.plain))
        if follows_prefill:
            others = sum(committed[i] > states[i].prompt_tokens for i in plan.plain)
            most = min(most, 1 + others // REQUESTS_OF_A_TOKEN)
        # The rotary embedding and the row end with the context.
        room = self.max_position + 1 - max(committed[i] for i in plan.plain)
        return max(min(most, room), 1)

    def _most(self, state: RequestState, choice: Choice) -> int:
        """Tokens that it may have drafted before its next verification."""
        if state.rotates:
            return state.deepest
        # What was drafted ahead when a longer horizon was the choice, or while the request waited
        # for its full KV, is there.
        return max(min(state.horizon, choice.horizon), min(state.drafted, state.deepest))

    def _room_ahead(
        self, state: RequestState, room: int, committed: int, remaining: int, choice: Choice
    ) -> int:
        """Behind a verification that may accept nothing of what is drafted, or all of it. What lies
        behind the end of an output in the latter case is not drafted: it is likely in vain, and who
        comes next would wait for it."""
        if state.released or state.grows_next:
            return 0
        longest = committed + state.drafted + 1
        most = min(state.horizon, choice.horizon)
        left = remaining - min(state.drafted, room) - 1  # of the output
        return min(most, left - 1, self.max_position - longest)
