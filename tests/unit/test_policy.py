"""The plan of a scheduler step: everybody moves, nobody starves, rooms are respected."""

from __future__ import annotations

import random

import pytest

from sglang_vericache.rounds.policy import Candidate, RoundPlan, plan_ahead, plan_step

HORIZON = 16


def candidate(index=0, drafts=True, drafted=0, room=HORIZON, group=0) -> Candidate:
    return Candidate(index, drafts, drafted, room, group)


@pytest.mark.parametrize(
    ("who", "step", "groups", "plain", "draft", "verify"),
    [
        pytest.param([candidate()], 0, 1, (), ((0, 16),), ((0, 16),), id="one-group"),
        pytest.param([candidate(room=3)], 5, 1, (), ((0, 3),), ((0, 3),), id="little-room"),
        pytest.param([candidate(room=0)], 0, 1, (0,), (), (), id="no-room"),
        pytest.param([candidate(room=-2)], 0, 1, (0,), (), (), id="less-than-no-room"),
        pytest.param([candidate(drafts=False)], 0, 1, (0,), (), (), id="cannot-draft"),
        pytest.param(
            [candidate(0), candidate(1, drafts=False), candidate(2, room=5)],
            0,
            1,
            (1,),
            ((0, 16), (2, 5)),
            ((0, 16), (2, 5)),
            id="mixed",
        ),
        pytest.param(
            [candidate(0, group=0), candidate(1, group=1)],
            0,
            2,
            (),
            ((0, 8), (1, 8)),
            ((0, 8),),
            id="turn-of-group-0",
        ),
        pytest.param(
            [candidate(0, group=0), candidate(1, group=1, drafted=8)],
            1,
            2,
            (),
            ((0, 8), (1, 8)),
            ((1, 16),),
            id="turn-of-group-1",
        ),
        pytest.param(
            [candidate(0, group=0, drafted=12, room=14)],
            0,
            3,
            (),
            ((0, 2),),
            ((0, 14),),
            id="rest-of-the-room",
        ),
        pytest.param(
            [candidate(0, group=1, drafted=16), candidate(1, group=1, drafted=5, room=5)],
            0,
            2,
            (),
            (),
            ((0, 16), (1, 5)),
            id="nobody-would-move",
        ),
        pytest.param(
            [candidate(0, group=1, drafted=16), candidate(1, drafts=False)],
            0,
            2,
            (1,),
            (),
            (),
            id="somebody-moves",
        ),
        pytest.param([], 0, 2, (), (), (), id="empty-batch"),
    ],
)
def test_table(who, step, groups, plain, draft, verify):
    """Catches a share that is not a group's part of the horizon, a count beyond the room, and the
    deadlock in which all wait for a turn that an empty group holds."""
    plan = plan_step(who, step, HORIZON, groups)
    assert (plan.plain, plan.draft, plan.verify) == (plain, draft, verify)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_running_batch(groups, seed):
    """Catches, over many steps with rooms that shrink: a request in two places at once, a plain
    one that sits out, one that drafts past its room, and one that waits longer than its turn."""
    rng = random.Random(seed)
    horizon = rng.choice([1, 2, 5, 16])
    requests = [
        {"drafts": rng.random() < 0.8, "left": rng.randint(1, 60), "group": rng.randrange(groups)}
        | {"drafted": 0, "verified_at": -1}
        for _ in range(rng.randint(1, 7))
    ]
    for step in range(60):
        running = [r for r in requests if r["left"] > 0]
        candidates = [
            Candidate(i, r["drafts"], r["drafted"], min(horizon, r["left"] - 1), r["group"])
            for i, r in enumerate(running)
        ]
        plan = plan_step(candidates, step, horizon, groups)
        drafting = {c.index for c in candidates if c.drafts and c.room > 0}
        draft, verify = dict(plan.draft), dict(plan.verify)
        assert sorted(plan.plain) == sorted(set(range(len(running))) - drafting)
        assert len(draft) == len(plan.draft) and len(verify) == len(plan.verify)
        assert set(draft) | set(verify) <= drafting
        assert not running or plan.plain or draft or verify, "nobody moves"
        for i, r in enumerate(running):
            if i in plan.plain:
                r["left"] -= 1
                r["verified_at"] = step
                continue
            r["drafted"] += draft.get(i, 0)
            assert draft.get(i, 1) > 0
            assert 0 < r["drafted"] <= candidates[i].room
            if i in verify:
                assert verify[i] == r["drafted"]
                r["left"] -= rng.randint(1, r["drafted"] + 1)
                r["drafted"], r["verified_at"] = 0, step
            assert step - r["verified_at"] < groups, "starves"


@pytest.mark.parametrize("groups", [2, 3])
def test_one_group_verifies_at_a_time(groups):
    """Catches verifies of all groups in one step, which staging memory has no room for."""
    who = [candidate(i, group=i % groups) for i in range(3 * groups)]
    for step in range(2 * groups):
        verified = {i % groups for i, _ in plan_step(who, step, HORIZON, groups).verify}
        assert verified == {step % groups}


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_a_full_horizon_is_drafted_between_turns(groups):
    """Catches shares that are rounded down, which would shorten every round."""
    drafted = 0
    for step in range(1, groups + 1):
        plan = plan_step([candidate(group=0, drafted=drafted)], step, HORIZON, groups)
        drafted += dict(plan.draft).get(0, 0)
    assert dict(plan.verify) == {0: HORIZON}


def drafted_and_verified(who, share):
    plan = plan_step(who, 0, HORIZON, 1, share)
    return dict(plan.draft), dict(plan.verify), plan.ends_round


def test_a_round_over_several_steps():
    """Catches a round that is verified before it is drafted, and who joins or ends in the middle
    of one: they verify with the others, with what they have."""
    draft, verify, ends = drafted_and_verified([candidate(0), candidate(1, room=4)], 6)
    assert (draft, verify, ends) == ({0: 6, 1: 4}, {}, False)
    who = [candidate(0, drafted=6), candidate(1, drafted=4, room=4), candidate(2)]
    draft, verify, ends = drafted_and_verified(who, 6)
    assert (draft, verify, ends) == ({0: 6, 2: 6}, {}, False)
    who = [candidate(0, drafted=12), candidate(1, drafted=4, room=4), candidate(2, drafted=6)]
    draft, verify, ends = drafted_and_verified(who, 6)
    assert (draft, verify, ends) == ({0: 4, 2: 6}, {0: 16, 1: 4, 2: 12}, True)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [1, 3, 6])
def test_a_batch_in_several_steps(share, seed):
    """Catches a request that waits longer than a round, whoever joins and leaves meanwhile."""
    rng = random.Random(seed)
    requests: list[dict] = []
    for step in range(200):
        if rng.random() < 0.2:
            requests.append({"left": rng.randint(2, 80), "drafted": 0, "since": step})
        requests = [r for r in requests if r["left"] > 0]
        candidates = [
            Candidate(i, True, r["drafted"], min(HORIZON, r["left"] - 1), 0)
            for i, r in enumerate(requests)
        ]
        plan = plan_step(candidates, step, HORIZON, 1, share)
        draft, verify = dict(plan.draft), dict(plan.verify)
        assert plan.ends_round == (bool(verify) or not draft)
        for i, r in enumerate(requests):
            if i in plan.plain:
                r["left"], r["since"] = r["left"] - 1, step
                continue
            r["drafted"] += draft.get(i, 0)
            assert draft.get(i, 0) <= share
            if i in verify:
                assert verify[i] == r["drafted"]
                r["left"] -= rng.randint(1, r["drafted"] + 1)
                r["drafted"], r["since"] = 0, step
            assert step - r["since"] <= -(-HORIZON // share), "waits longer than a round"


# Requests whose full KV is away


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(50))
def test_who_is_away_only_drafts(seed, groups):
    """Property: nothing is read that is not there; who is away drafts up to its room and no
    further, and who rotates is verified as soon as it is there with enough."""
    rng = random.Random(seed)
    who = []
    for i in range(rng.randint(1, 9)):
        room = rng.randint(0, HORIZON)
        drafted = rng.randint(0, room)
        full, rotates = rng.random() < 0.5, rng.random() < 0.6
        one = Candidate(i, rng.random() < 0.8, drafted, room, i % groups, full, rotates or not full)
        one.enough = rng.choice([1, 5, HORIZON, 1 << 30])
        who.append(one)
    plan = plan_step(who, seed, HORIZON, groups, rng.choice([None, 0, 1, 3]))
    drafts, verified = dict(plan.draft), dict(plan.verify)
    for c in who:
        drafted = c.drafted + drafts.get(c.index, 0)
        assert drafted <= max(c.room, c.drafted)
        if not c.full:
            assert c.index not in plan.plain and c.index not in verified
            assert not c.drafts or c.room == c.drafted or drafts[c.index] > 0
        elif c.rotates and c.drafts and c.room:
            enough = min(c.room, c.enough)
            assert (c.index in verified) == (drafted >= enough)
            assert drafted <= max(enough, c.drafted)
            assert c.index not in plan.plain
    assert all(tokens == who[i].drafted + drafts.get(i, 0) for i, tokens in plan.verify)


def test_who_is_away_drafts_on_while_it_waits():
    """Catches a link that is the limit and brings no more tokens a fetch than rounds have."""
    here, away = (
        Candidate(i, True, 15, 31, 0, full, True, enough=15) for i, full in ((0, 1), (1, 0))
    )
    short = Candidate(2, True, 13, 31, 0, True, True, enough=15)
    plan = plan_step([here, away, short], 0, 15, 1, 4)
    assert plan.verify == ((0, 15), (2, 15)) and plan.draft == ((1, 4), (2, 2))


@pytest.mark.parametrize(
    ("draft", "verify", "first", "behind"),
    [
        pytest.param(((0, 4),), (), (), ((0, 4),), id="nobody-verifies"),
        pytest.param(((0, 4), (1, 2)), ((2, 15),), (), ((0, 4), (1, 2)), id="others-verify"),
        pytest.param(((0, 4), (1, 2)), ((1, 15),), ((0, 4), (1, 2)), (), id="one-verifies-at-once"),
    ],
)
def test_what_is_drafted_behind_a_verification(draft, verify, first, behind):
    """Catches a device that waits for the host after a verification, and drafts that are verified
    before they are made."""
    assert RoundPlan((), draft, verify).drafts == (first, behind)


def test_rotation_does_not_end_the_others_round():
    """Catches a round of those who stay that is timed as over because somebody rotating was
    verified."""
    stays = Candidate(0, True, 2, HORIZON, 0)
    rotates = Candidate(1, True, HORIZON, HORIZON, 0, True, True)
    plan = plan_step([stays, rotates], 0, HORIZON, 1, 2)
    assert plan.verify == ((1, HORIZON),) and not plan.ends_round
    assert plan_step([rotates], 0, HORIZON, 1, 2).ends_round


def test_nobody_can_do_anything():
    """Everybody has drafted all it may, and is away."""
    away = Candidate(0, True, HORIZON, HORIZON, 0, False, True)
    plan = plan_step([away], 0, HORIZON, 1)
    assert (plan.plain, plan.draft, plan.verify) == ((), (), ())


def ahead(index=0, drafted=0, room=HORIZON, ahead=HORIZON, drafts=True) -> Candidate:
    return Candidate(index, drafts, drafted, room, 0, ahead=ahead)


@pytest.mark.parametrize(
    ("who", "share", "plain", "draft", "verify", "behind"),
    [
        pytest.param([ahead()], 16, (), ((0, 16),), (), (), id="first"),
        pytest.param([ahead(drafted=16)], 16, (), (), ((0, 16),), ((0, 16),), id="steady"),
        pytest.param([ahead(drafted=8)], 8, (), ((0, 8),), (), (), id="second-part"),
        pytest.param([ahead(drafted=16)], 8, (), (), ((0, 16),), ((0, 8),), id="first-part"),
        pytest.param(
            [ahead(0, 16), ahead(1)], 8, (), (), ((0, 16),), ((0, 8), (1, 8)), id="who-joins"
        ),
        pytest.param(
            [ahead(0, 16), ahead(1, 8)],
            8,
            (),
            (),
            ((0, 16), (1, 8)),
            ((0, 8), (1, 8)),
            id="less-far",
        ),
        pytest.param([ahead(drafted=16, room=3)], 16, (), (), ((0, 3),), ((0, 16),), id="clipped"),
        pytest.param([ahead(drafted=16, ahead=0)], 16, (), (), ((0, 16),), (), id="none-ahead"),
        pytest.param(
            [ahead(drafted=16, ahead=-3)], 16, (), (), ((0, 16),), (), id="less-than-none"
        ),
        pytest.param([ahead(drafted=9, room=0)], 16, (0,), (), (), (), id="at-its-end"),
        pytest.param(
            [ahead(0, 16), ahead(1, drafts=False)], 16, (1,), (), ((0, 16),), ((0, 16),), id="mixed"
        ),
        pytest.param([ahead(drafts=False)], 16, (0,), (), (), (), id="only-plain"),
        pytest.param([], 16, (), (), (), (), id="empty-batch"),
    ],
)
def test_ahead(who, share, plain, draft, verify, behind):
    """Catches a verification of what nothing was drafted for, and one that waits for ever."""
    plan = plan_ahead(who, share)
    assert (plan.plain, plan.draft, plan.verify, plan.ahead) == (plain, draft, verify, behind)
    assert plan.ends_round == (not draft)


def test_few_behind_a_verification():
    """Catches a step that verifies and drafts as much behind that as a step that only drafts."""
    drafted, steps = 15, []
    for _ in range(8):
        plan = plan_ahead([ahead(0, drafted, 15, 15), ahead(1, drafted, 15, 15)], 5, 1)
        steps.append((dict(plan.verify).get(0), dict(plan.draft).get(0), dict(plan.ahead).get(0)))
        drafted = (0 if plan.verify else drafted) + dict(plan.draft or plan.ahead)[0]
    assert steps == 2 * [(15, None, 1), (None, 5, None), (None, 5, None), (None, 4, None)]


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_that_drafts_ahead(seed):
    """Catches, over many steps with arrivals and outputs that end: a request that does nothing in
    two steps, and more drafted than a row has room for."""
    rng = random.Random(seed)
    horizon, share = rng.choice([(1, 1), (5, 3), (16, 16), (16, 8), (16, 4)])
    few = rng.choice([None, 1])
    requests: list[dict] = []
    for step in range(200):
        if rng.random() < 0.3:
            requests.append({"left": rng.randint(1, 60), "drafted": 0, "moved": step})
        requests = [r for r in requests if r["left"] > 0]
        candidates = [
            Candidate(
                *(i, True, r["drafted"], min(horizon, r["left"] - 1), 0),
                ahead=min(horizon, r["left"] - 2),
            )
            for i, r in enumerate(requests)
        ]
        plan = plan_ahead(candidates, share, few)
        behind, verify = dict(plan.ahead), dict(plan.verify)
        assert not (plan.draft and plan.verify)
        for i, r in enumerate(requests):
            if i in plan.plain:
                r["left"], r["drafted"], r["moved"] = r["left"] - 1, 0, step
                continue
            r["drafted"] += dict(plan.draft).get(i, 0)
            if i in verify:
                assert 0 < verify[i] <= min(r["drafted"], r["left"] - 1)
                r["left"] -= rng.randint(1, verify[i] + 1)
                r["drafted"], r["moved"] = 0, step
            r["drafted"] += behind.get(i, 0)
            assert r["drafted"] <= horizon and (i not in behind or i in verify or r["drafted"] > 0)
            assert step - r["moved"] <= 2 * -(-horizon // share) + 1, "it waits for ever"
