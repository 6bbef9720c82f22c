"""From states and a choice to the plan of a step; above all what may be drafted ahead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.rounds.pace import Choice
from sglang_vericache.rounds.policy import RoundPlan
from sglang_vericache.rounds.step_planner import StepPlanner
from sglang_vericache.support import END_OF_OUTPUT, PLAIN_IS_FASTER

CONFIG = VeriCacheConfig(horizon=15, fold_tail_tokens=100)
LAST = 4095
CHOICE = Choice(15, True, 15)


def state(drafted: int = 0, tail_from: int = 1000, **more: Any) -> Any:
    view = SimpleNamespace(tail_tokens=lambda committed: committed - tail_from)
    known = dict(full=True, rotates=False, group=0, horizon=15, released=False, view=view)
    known |= dict(grows_next=False, token_by_token=False, prompt_tokens=tail_from) | more
    known["steady"] = known["full"] and not known["rotates"]
    return SimpleNamespace(drafted=drafted, **({"deepest": known["horizon"]} | known))


def plan(
    states, committed=1010, remaining=400, choice=CHOICE, ahead=True, reasons=None, config=CONFIG
):
    planner = StepPlanner(config, LAST, ahead)
    count = len(states)
    reasons = reasons or [None] * count
    made = planner.plan(states, reasons, [committed] * count, [remaining] * count, choice)
    return made, reasons


def test_both_orders():
    """Without drafting ahead a step drafts and verifies; with it, the other way round."""
    made, _ = plan([state()], ahead=False)
    assert (made.draft, made.verify, made.ahead) == (((0, 15),), ((0, 15),), ())
    made, _ = plan([state()])
    assert (made.draft, made.verify, made.ahead) == (((0, 15),), (), ())
    made, _ = plan([state(15)])
    assert (made.draft, made.verify, made.ahead) == ((), ((0, 15),), ((0, 15),))
    made, _ = plan([state(1)], choice=Choice(15, True, 5, behind=1))
    assert made.draft == ((0, 5),) and not made.verify


@pytest.mark.parametrize(
    ("what", "verified", "ahead"),
    [
        pytest.param({"remaining": 400}, 15, 15, id="far-from-any-end"),
        # All may be accepted, and the last token needs no draft: more would be in vain.
        pytest.param({"remaining": 9}, 8, 0, id="end-of-output"),
        pytest.param({"remaining": 20}, 15, 3, id="near-the-end-of-output"),
        pytest.param({"remaining": 17}, 15, 0, id="one-token-behind"),
        pytest.param({"remaining": 2}, 1, 0, id="last-token-but-one"),
        # All may be accepted: 16 tokens from 4070 on, and rotary positions end at 4095.
        pytest.param({"committed": 4070, "states": [state(15, 4000)]}, 15, 9, id="end-of-context"),
        pytest.param({"committed": 4090, "states": [state(15, 4000)]}, 5, 0, id="at-that-end"),
        # A tail of more than 100 is folded with what is drafted behind it.
        pytest.param({"committed": 1085}, 15, 15, id="tail-is-folded-next"),
        pytest.param({"states": [state(15, released=True)]}, 15, 0, id="ended"),
        pytest.param({"states": [state(15, grows_next=True)]}, 15, 0, id="its-view-grows-next"),
        pytest.param({"choice": Choice(7, True, 7)}, 15, 7, id="shorter-horizon-chosen"),
        pytest.param({"choice": Choice(15, True, 8)}, 15, 8, id="in-parts"),
        pytest.param({"choice": Choice(15, True, 5, behind=1)}, 15, 1, id="in-unlike-parts"),
        pytest.param({"states": [state(15, horizon=3)]}, 3, 3, id="own-horizon"),
    ],
)
def test_room_ahead(what, verified, ahead):
    """Catches positions without rotary embedding, and drafts thrown away because the choice has
    changed since."""
    made, _ = plan(**({"states": [state(15)]} | what))
    assert made.verify == ((0, verified),)
    assert made.ahead == (((0, ahead),) if ahead else ())


OFFLOADING = VeriCacheConfig(horizon=15, fold_tail_tokens=100, offload="auto")


def away(drafted: int, **more: Any) -> Any:
    return state(drafted, **({"full": False, "rotates": True, "deepest": 31} | more))


@pytest.mark.parametrize(
    ("states", "draft", "verify", "ahead"),
    [
        # Nobody drafts ahead beside one that is away; what was drafted ahead is verified.
        pytest.param([state(15), away(15)], ((1, 15),), ((0, 15),), (), id="one-has-just-gone"),
        pytest.param([state(), away(30)], ((0, 15), (1, 1)), ((0, 15),), (), id="one-waits"),
        pytest.param([state(), away(31, full=True)], ((0, 15),), ((0, 15), (1, 31)), (), id="came"),
        # All that was drafted on the way is verified, but no more than a horizon ahead.
        pytest.param(
            [state(15), away(31, full=True, rotates=False)],
            *((), ((0, 15), (1, 31)), ((0, 15), (1, 15))),
            id="it-came-to-stay",
        ),
    ],
)
def test_while_somebody_is_away(states, draft, verify, ahead):
    made, _ = plan(states, config=OFFLOADING)
    assert (made.draft, made.verify, made.ahead) == (draft, verify, ahead)


def test_drafted_ahead_beyond_the_end_of_an_output():
    """Catches more tokens than were asked for: the verification before accepted so many that what
    was drafted behind it is too much, and the next step does not draft ahead."""
    made, _ = plan([state(15), away(15)], remaining=9, config=OFFLOADING)
    assert made.verify == ((0, 8),) and not made.draft
    made, _ = plan([state(15), away(15, full=True)], remaining=9, config=OFFLOADING)
    assert made.verify == ((0, 8), (1, 8)) and not made.draft


def test_the_end_of_an_output():
    made, reasons = plan([state(15), state(15)], remaining=1)
    assert made.plain == (0, 1) and reasons == [END_OF_OUTPUT] * 2


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("reason", [None, PLAIN_IS_FASTER])
def test_behind_the_end_of_an_output(ahead, reason):
    """Catches a step for nobody, in which its last result is still on its way to the host: who
    comes next would wait for it."""
    made, reasons = plan([state(15)], remaining=0, ahead=ahead, reasons=[reason])
    assert made == RoundPlan((), (), ()) and reasons == [END_OF_OUTPUT if not reason else reason]
    planner, states = StepPlanner(CONFIG, LAST, ahead), [state(15), state(15)]
    made = planner.plan(states, [reason] * 2, [1010] * 2, [0, 400], CHOICE)
    at = {i for i, _ in (*made.verify, *made.ahead, *made.draft)}
    assert at | set(made.plain) == {1}


def test_plain_decoding_drops_what_was_drafted():
    made, _ = plan([state(15)], choice=Choice(0, False, 0, 8), reasons=[PLAIN_IS_FASTER])
    assert made.only_plain and made.ends_round
    assert (
        StepPlanner(CONFIG, LAST, True).plain_steps(
            made, [state(15)], [1010], [100], Choice(0, False, 0, 8)
        )
        == 8
    )


def test_first_tokens_do_not_wait_for_several_plain_steps():
    """Catches a time to first token that includes launching the step behind the prefill."""
    planner, choice = StepPlanner(CONFIG, LAST, True), Choice(0, False, 0, 8)
    made, _ = plan([state()], choice=choice, reasons=[PLAIN_IS_FASTER])
    planner.prefill()
    steps = [planner.plain_steps(made, [state()], [1010], [100], choice) for _ in range(3)]
    assert steps == [1, 8, 8]


@pytest.mark.parametrize(
    ("old", "new", "token_by_token", "tokens"),
    [
        (0, 300, False, 1),
        (63, 1, False, 1),
        (64, 1, False, 2),
        (200, 1, False, 4),
        (200, 40, False, 4),
        (900, 1, False, 8),
        (200, 1, True, 1),
    ],
)
def test_many_others_do_not_wait_for_each_first_token(old, new, token_by_token, tokens):
    """Catches a step of hundreds that yields one token each time a prompt comes, as most do where
    prompts keep coming; and new requests counted among those that wait for more."""
    planner, choice = StepPlanner(CONFIG, LAST, True), Choice(0, False, 0, 8)
    states = [state() for _ in range(old)] + [state(token_by_token=token_by_token)] * new
    committed = [1010] * old + [1000] * new
    made, _ = plan(states, choice=choice, reasons=[PLAIN_IS_FASTER] * len(states))
    planner.prefill()
    assert planner.plain_steps(made, states, committed, [100] * len(states), choice) == tokens


def test_plain_steps_end_with_the_context():
    planner = StepPlanner(CONFIG, LAST, True)
    made, _ = plan([state()], choice=Choice(0, False, 0, 8), reasons=[PLAIN_IS_FASTER])
    for committed, expected in ((4000, 8), (4093, 3), (4095, 1)):
        steps = planner.plain_steps(made, [state()], [committed], [100], Choice(0, False, 0, 8))
        assert steps == expected
    one = [state(token_by_token=True)]
    assert planner.plain_steps(made, one, [1010], [100], Choice(0, False, 0, 8)) == 1


@pytest.mark.parametrize(
    ("remaining", "expected"), [([9], 8), ([3], 3), ([1], 1), ([0], 1), ([2, 30], 8), ([2, 5], 5)]
)
def test_plain_steps_end_with_the_outputs(remaining, expected):
    """Catches tokens behind the end of the last output, which whoever comes next would wait for,
    and an output that is cut where another one ends."""
    planner, choice = StepPlanner(CONFIG, LAST, True), Choice(0, False, 0, 8)
    states = [state() for _ in remaining]
    made, _ = plan(states, choice=choice, reasons=[PLAIN_IS_FASTER] * len(states))
    assert planner.plain_steps(made, states, [1010] * len(states), remaining, choice) == expected


@pytest.mark.parametrize(
    ("behind", "come"),
    [
        ("1000000", False),
        ("11000000", False),
        ("111", True),
        ("10101010", True),
        ("1000" * 8, False),
        ("100" * 12, True),
        ("1111" + "0" * 16, False),
    ],
)
def test_prompts_keep_coming(behind, come):
    """Catches a batch that begins together, or one prompt in a while, taken for a stream of them;
    and a stream that is still seen long after it ended."""
    planner, choice = StepPlanner(CONFIG, LAST, True), Choice(0, False, 0, 8)
    made, _ = plan([state()], choice=choice, reasons=[PLAIN_IS_FASTER])
    for follows in behind:
        if follows == "1":
            planner.prefill()
        planner.plain_steps(made, [state()], [1010], [100], choice)
    assert planner.prompts_keep_coming == come
