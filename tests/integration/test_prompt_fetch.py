"""Prompts that come back from the host while others decode, on SGLang's own radix cache."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from rotation_scheduler import WIDTH, Scheduler, texts  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from test_rotation import Foreseen  # noqa: E402
from tree_world import Request, World, away, back, settings, text  # noqa: E402, F401

from sglang_vericache.loader.copy import PlainCopier  # noqa: E402
from sglang_vericache.rounds.held_prompts import HeldPrompts  # noqa: E402
from sglang_vericache.rounds.prompt_fetch import PromptFetch  # noqa: E402


class SlowCopier(PlainCopier):
    """Every copy takes several steps."""

    def arrived(self, job) -> bool:
        time.sleep(0.002)
        return super().arrived(job)


class LateCopier(PlainCopier):
    """Every copy begins late."""

    def submit(self, jobs) -> None:
        time.sleep(0.1)
        super().submit(jobs)


def on_the_host(world: World, prompts) -> None:
    """Computed once, so that the first of them have left the device."""
    for prompt in prompts:
        while (req := world.admit(prompt)) is None:  # put off
            world.settle()
        world.end(req, checkpoint=True)
        world.settle()


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("shared", [0.0, 0.8], ids=["private", "shared"])
def test_a_queue_of_known_prompts(core, shared):
    """Catches prompts that a prefill loads while everybody waits, bytes that are read before they
    are there, slots that stay locked, and a queue that never moves on."""
    world = World(device=450, host=6_000, core=core, copier=SlowCopier)
    prompts = texts(8, 16, 90, 130, shared)
    on_the_host(world, prompts)
    scheduler = Scheduler(world, watch=Foreseen(0.02), least_prompt=30)
    scheduler.waiting = [(t, 40) for t in prompts]
    scheduler.run(20_000)
    numbers = scheduler.rotation.numbers()
    assert 3 <= numbers.prompts <= 16 and numbers.detachments == 0
    assert numbers.fetches >= numbers.prompts
    assert len(scheduler.done) == 16
    world.check_idle()
    world.close()


@pytest.mark.parametrize("host", [6_000, 900], ids=["roomy host", "tight host"])
def test_many(host):
    """Sixty requests through a pool for three, some of whose prompts nobody has computed yet, with
    retraction when the tails outgrow it."""
    world = World(device=450, host=host, copier=SlowCopier)
    prompts = texts(5, 60, 40, 140, 0.5)
    on_the_host(world, prompts[::2])
    scheduler = Scheduler(world, plain=0.3, watch=Foreseen(0.02), least_prompt=20)
    scheduler.waiting = [(t, 5 + (n * 13) % 90) for n, t in enumerate(prompts)]
    scheduler.run(50_000)
    assert scheduler.rotation.numbers().prompts > 0
    assert len(scheduler.done) == 60
    world.check_idle()
    world.close()


def test_not_while_requests_rotate_nor_where_little_is_missing():
    """Catches a link that is taken from running requests, a step lost for a few tokens, and
    requests that come one by one although what that saves is less than a prefill."""
    for watch, least, prefill in (
        (None, 30, 0),
        (Foreseen(0.02), 500, 0),
        (Foreseen(0.02), 30, 500),
    ):
        world = World(device=450, host=6_000)
        prompts = texts(8, 12, 90, 130, 0.0)
        on_the_host(world, prompts)
        scheduler = Scheduler(world, watch=watch, least_prompt=least)
        scheduler.rotation.prompts.prefill_tokens = lambda tokens=prefill: tokens
        scheduler.waiting = [(t, 40) for t in prompts]
        scheduler.run(20_000)
        assert scheduler.rotation.numbers().prompts == 0
        assert len(scheduler.done) == 12
        world.check_idle()
        world.close()


def test_it_is_not_held_for_others():
    """Catches a request that waits for others to be let in with, and then for its prompt alone."""

    class Holding:
        """Lets nobody in beside others."""

        def holds(self, fitting: int, waiting: int) -> bool:
            return bool(world.requests)

    world = World(device=450, host=6_000, copier=SlowCopier)
    world.cache.admission = Holding()
    prompts = texts(8, 12, 90, 130, 0.0)
    on_the_host(world, prompts)
    scheduler = Scheduler(world, watch=Foreseen(0.02), least_prompt=30)
    scheduler.waiting = [(t, 40) for t in prompts]
    scheduler.run(20_000)
    assert scheduler.most_together > 1 and scheduler.rotation.numbers().prompts >= 3
    assert len(scheduler.done) == 12
    world.check_idle()
    world.close()


class Together:
    """Lets requests in three at a time, where so many wait."""

    def __init__(self, world: World) -> None:
        self.world, self.held = world, 0

    def holds(self, fitting: int, waiting: int) -> bool:
        holds = bool(self.world.requests) and 0 < fitting < min(3, waiting)
        self.held += holds
        return holds


@pytest.mark.parametrize("shared", [0.0, 0.5], ids=["private", "shared"])
@pytest.mark.parametrize("device", [700, 1_500], ids=["tight", "roomy"])
def test_prompts_of_held_requests(device, shared):
    """Catches prompts that come only when their requests are let in; requests let in one by one
    because their prompts have come, which takes less room than their whole; slots that stay
    locked; and a queue that never moves on."""
    world = World(device=device, host=9_000, copier=SlowCopier)
    world.cache.admission = together = Together(world)
    prompts = texts(8, 24, 90, 130, shared)
    on_the_host(world, prompts)
    held = HeldPrompts(world.residency, WIDTH, 30)
    scheduler = Scheduler(world, watch=Foreseen(0.02), least_prompt=10_000, held=held)
    scheduler.waiting = [(t, 20 + (n * 13) % 40) for n, t in enumerate(prompts)]
    scheduler.run(20_000)
    assert held.brought >= 4 and scheduler.rotation.numbers().prompts == held.brought
    assert together.held > 10 and not held.looks_on
    assert scheduler.rotation.numbers().detachments == 0
    assert len(scheduler.done) == 24
    world.check_idle()
    world.close()


def test_one_that_was_held_goes_on_with_its_prompt():
    """Catches a request that waits for others, and then for its prompt."""
    world = World(device=450, host=3_000, copier=LateCopier)
    fetch, req = waiting_prompt(world)
    fetch.held = HeldPrompts(world.residency, WIDTH, 30)
    assert fetch.concerns(req)
    fetch.held.hold(req, 1, 400)
    assert world.residency.comes(req.best_match_node) and not fetch.held.looks_on
    assert not fetch.concerns(req) and not fetch.comes_first(req, 450)
    assert fetch.brought == 1
    # Its whole prompt counts, on the way and afterwards.
    world.match(req)
    on_the_way = world.residency.tokens_on_the_way
    assert on_the_way > 100 and fetch.held.fitting(req, 390 - on_the_way, 10) == 3
    fetch.held.hold(req, 1, 400)  # the same again
    assert fetch.brought == 1
    world.settle()
    assert world.residency.tokens_on_the_way == 0 and fetch.held.fitting(req, 390, 10) == 3
    world.close()


def test_a_long_prompt_of_one_that_was_held_comes_first():
    """Catches a prefill that waits for a long load, and nobody decodes, because the request had
    waited for others before."""
    world = World(device=450, host=3_000, copier=LateCopier)
    fetch, req = waiting_prompt(world)
    fetch.held = HeldPrompts(world.residency, WIDTH, 30, lambda: 100)
    fetch.held.hold(req, 1, 400)
    world.match(req)
    assert fetch.brought == 1 and req not in fetch.held
    assert fetch.concerns(req) and fetch.comes_first(req, 450)
    world.settle()
    assert not fetch.concerns(req) and not fetch.comes_first(req, 450)
    world.close()


def test_not_while_somebody_is_away():
    """Catches prompts that take the room which detached requests need, and another first one of
    the queue that is taken for the same."""
    world = World(device=450, host=3_000)
    _, req = waiting_prompt(world)
    away(world, running := world.admit(text(4, 40)))
    held = HeldPrompts(world.residency, WIDTH, 30)
    held.hold(req, 1, 400)
    assert held.brought == 0 and not held.looks_on
    back(world, running)
    held.hold(req, 1, 400)
    assert held.brought == 1
    held.begin_pass()
    held.hold(req, 1, 400)
    assert not held.looks_on
    other = Request("another", text(5, 20))
    world.match(other)
    held.hold(other, 2, 400)
    assert held.looks_on
    world.settle()
    world.end(running, False)
    world.close()


def test_no_more_is_brought_than_fits():
    """Catches a load that takes what the running requests are about to need."""
    world = World(device=450, host=3_000)
    _, req = waiting_prompt(world)
    held = HeldPrompts(world.residency, WIDTH, 30)
    held.hold(req, 3, req.host_hit_length + 2 * WIDTH - 1)
    assert held.brought == 0 and not held.looks_on
    held.let_go()
    held.hold(req, 3, req.host_hit_length + 2 * WIDTH)
    assert held.brought == 1 and held.looks_on and req in held
    held.begin_pass()
    assert not held.looks_on
    world.settle()
    world.close()


def waiting_prompt(world: World) -> tuple[PromptFetch, Request]:
    """Whose prompt has left the device."""
    known = text(1, 120)
    on_the_host(world, [known, text(2, 390)])
    req = Request("waiting", known)
    world.match(req)
    assert req.host_hit_length > 100
    return PromptFetch(world.residency, 50), req


def test_it_is_put_off_until_its_prompt_is_there():
    world = World(device=450, host=3_000, copier=SlowCopier)
    fetch, req = waiting_prompt(world)
    assert fetch.comes_first(req, 450)
    world.check_ledger()
    world.match(req)
    assert req.host_hit_length == 0 and req.prefix_len == 0
    for _ in range(200):
        if not fetch.comes_first(req, 450):
            break
        world.arrive(0.01)
        world.match(req)
    else:
        raise AssertionError("it never came")
    assert fetch.brought == 1 and not world.cache.ongoing_load_back
    running = world.admit(req.text)
    world.check_row(running)
    world.end(running, checkpoint=True)
    world.check_idle()
    world.close()


def test_its_prefill_brings_it_the_second_time():
    """Catches a request that is brought again and again while others take its place."""
    world = World(device=450, host=3_000)
    fetch, req = waiting_prompt(world)
    assert fetch.comes_first(req, 450)
    world.settle()
    world.end(world.admit(text(3, 400)), checkpoint=False)
    world.match(req)
    assert req.host_hit_length > 100
    assert not fetch.comes_first(req, 450) and fetch.brought == 1
    world.check_idle()
    world.close()


@pytest.mark.parametrize("core", ["rust", "python"])
def test_a_checkpoint_of_tokens_that_are_under_way(core):
    """A prefill computes the last token of a prompt that is on the host to its end, and somebody
    else's prompt brings that token meanwhile. Catches a running request whose row names slots that
    hold nothing yet."""
    world = World(device=450, host=3_000, core=core, copier=LateCopier)
    known = text(1, 120)
    on_the_host(world, [known, text(2, 390)])
    longer, fetch = Request("longer", [*known, *text(4, 30)]), PromptFetch(world.residency, 1)
    check_row, ordered = world.check_row, []

    def before_the_checkpoint(req) -> None:
        world.check_row = check_row
        world.match(longer)
        ordered.append(fetch.comes_first(longer, 450))

    req = None
    while req is None:  # put off
        world.settle()
        world.check_row = before_the_checkpoint
        req = world.admit(known)
    assert ordered == [True] and fetch.brought == 1
    world.check_row(req)
    assert not fetch.residency.comes(req.last_node)
    world.end(req, checkpoint=True)
    world.check_idle()
    world.close()


@pytest.mark.parametrize("why", ["no room", "little", "a dead loader", "a session"])
def test_reasons_to_leave_it_to_the_prefill(why):
    world = World(device=450, host=3_000)
    fetch, req = waiting_prompt(world)
    if why == "little":
        fetch.least_tokens = 200
    elif why == "a dead loader":
        fetch.residency.loader._given_up = True
    elif why == "a session":
        req.last_node = SimpleNamespace()
    assert not fetch.comes_first(req, 60 if why == "no room" else 450)
    assert fetch.brought == 0
    world.residency.loader._given_up = False
    world.check_idle()
    world.close()


def test_a_request_of_sglang_is_asked_about():
    """Catches an attribute that only our stand-in for SGLang's request has."""
    world = World(device=450, host=3_000)
    fetch, _ = waiting_prompt(world)
    req = Req("r", "", array("q", text(1, 120)), SamplingParams(max_new_tokens=10))
    req.init_next_round_input(world.cache)
    assert req.host_hit_length > 100
    assert fetch.comes_first(req, 450 - WIDTH)
    world.check_idle()
    world.close()
