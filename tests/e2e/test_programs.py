"""Programs that users write, run with the flag and without: the same in every reply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from breadth import BY_RATIO
from cases import ANYTHING, DRAFTS
from conftest import REAL_FLAGS
from programs import PROGRAMS
from servers import server
from steps import Step, differences

pytestmark = pytest.mark.e2e

TOOL_FLAGS = (
    *("--chat-template", str(Path(__file__).with_name("tool_chat.jinja"))),
    *("--tool-call-parser", "qwen25", "--enable-cache-report"),
)
OUR_FLAGS = (
    *("--enable-vericache", "--vericache-min-context", "128", *BY_RATIO),
    *("--vericache-horizon", "4", "--vericache-keep-ratio", "0.4"),
)

Runs = dict[str, dict[str, Step]]


def run_all(model: Path, log: Path, flags: tuple[str, ...], plugin: bool) -> Runs:
    runs: Runs = {}
    with server(model, log, (*REAL_FLAGS, *TOOL_FLAGS, *flags), plugin=plugin) as client:
        for name, (program, on_empty_cache) in PROGRAMS.items():
            if on_empty_cache:
                client.flush()
            runs[name] = {step.name: step for step in program(client.url)}
    return runs


@pytest.fixture(scope="module")
def expected(real_model, logs) -> Runs:
    return run_all(real_model, logs / "programs-reference.log", (), plugin=False)


@pytest.fixture(scope="module")
def ours(real_model, logs) -> Runs:
    return run_all(real_model, logs / "programs.log", OUR_FLAGS, plugin=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_same_answers(expected, ours, program):
    """Texts, tokens, tool calls, choices, scores and counts, request by request."""
    assert expected[program].keys() == ours[program].keys()
    found = [
        f"{name}{line}"
        for name, step in expected[program].items()
        for line in differences(step.answer, ours[program][name].answer)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("program", PROGRAMS)
def test_same_cached_tokens(expected, ours, program):
    """Catches spans that keep a prefix from being found, and prompts that are computed again."""
    cached = {name: step.cached_tokens for name, step in expected[program].items()}
    assert cached == {name: step.cached_tokens for name, step in ours[program].items()}
    assert sum(count or 0 for count in cached.values()) > 500


@pytest.mark.parametrize("program", PROGRAMS)
def test_drafted(ours, program):
    """Every request that may draft did, and the others say why not."""
    drafting = 0
    for name, step in ours[program].items():
        if step.expect == DRAFTS:
            assert step.counters.drafted > 0 and step.counters.rounds > 0, (name, step.counters)
            drafting += 1
        elif step.expect != ANYTHING:
            assert set(step.counters.plain) == {step.expect}, (name, step.counters)
    assert drafting >= 2
    assert sum(step.counters.accepted for step in ours[program].values() if step.counters) > 10


@pytest.mark.parametrize(
    ("program", "topics"),
    [("agent", ["while", "return", "assert"]), ("streaming agent", ["while"])],
)
def test_agent_used_its_tools(expected, program, topics):
    """Catches an agent whose tool calls nobody parsed, or that never got a result back."""
    answers = [step.answer[0] for step in expected[program].values()]
    called = [call for _, _, calls in answers for call in calls]
    assert called == [("look_up", json.dumps({"topic": topic})) for topic in topics]
    assert all(reason == "tool_calls" for _, reason, calls in answers if calls)
    assert any(not calls and text for text, _, calls in answers), "the agent never answered"
