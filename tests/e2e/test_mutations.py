"""Would the suite notice? A broken draft costs only acceptance, a broken accept is seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

from sglang_vericache.cpu.engine import KERNEL_LIBRARY

pytestmark = pytest.mark.e2e

MUTATIONS = Path(__file__).parent / "mutations"
NAMES = ("none", "random draft kv", "nan draft kv", "accept all", "yield one more")
# Random keys and values agree with the model now and then; the real cache more than this.
MOST_ACCEPTED_BY_CHANCE, LEAST_ACCEPTED = 0.6, 1.5


@pytest.fixture(scope="module")
def verdicts(tiny_references, logs, tmp_path_factory):
    """Mutation -> verdict, all from one mutated server."""
    reference = tiny_references["mutations"]
    switch = tmp_path_factory.mktemp("mutation") / "name"
    switch.write_text("none")
    env = {
        "VERICACHE_MUTATION": str(switch),
        "PYTHONPATH": os.pathsep.join([str(KERNEL_LIBRARY), str(MUTATIONS)]),
    }
    found = {}
    flags = (*TINY_FLAGS, *DRAFT_FLAGS, "--vericache-horizon", "8")
    with server(reference.model, logs / "mutated.log", flags, env) as client:
        for name in NAMES:
            switch.write_text(name)
            answers = client.run(reference.phases, reference.answers)
            found[name] = judge(reference.calls, reference.answers, answers)
            print(f"{name}: {found[name].summary()}")
    return found


def test_unmutated_is_green(verdicts):
    assert not verdicts["none"].mismatches and not verdicts["none"].problems
    assert verdicts["none"].accepted_per_round >= LEAST_ACCEPTED


@pytest.mark.parametrize("name", ["random draft kv", "nan draft kv"])
def test_a_broken_draft_costs_only_acceptance(verdicts, name):
    """Tokens come from the full KV; if these differ, something of the draft leaked into them."""
    assert not verdicts[name].mismatches, verdicts[name].mismatches
    assert verdicts[name].rounds > 0
    assert verdicts[name].accepted_per_round < MOST_ACCEPTED_BY_CHANCE


@pytest.mark.parametrize("name", ["accept all", "yield one more"])
def test_a_broken_accept_turns_the_suite_red(verdicts, name):
    """An identity suite that stays green here compares nothing."""
    assert len(verdicts[name].mismatches) >= 3, verdicts[name].summary()
