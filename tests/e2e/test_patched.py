"""On an SGLang with the patches of patches/ the plugin needs no hook and gives the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import patched_sglang
import pytest
from breadth import ANY_END, tokens
from cases import ANYTHING, Call, Phase
from compare import judge
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

from sglang_vericache.hooks import flag_hooks, server_hooks

pytestmark = [pytest.mark.e2e, pytest.mark.long]

# Groups that take turns verifying: most steps accept nothing for somebody.
OURS = (*DRAFT_FLAGS, "--vericache-horizon", "8", "--vericache-stagger", "2")
LENGTHS, OUTPUT = (100, 350, 900), 60


def phases(base):
    """What each patch touches, beside requests that draft."""
    prompts = {n: tokens(11_000 + n, n) for n in LENGTHS}
    calls = [Call(f"patched/{n}", prompts[n], OUTPUT, ANY_END) for n in LENGTHS]
    yield Phase("drafting", calls, 3)
    yield Phase(
        "beside",
        [
            Call("patched/beside/0", tokens(11_500, 600), OUTPUT, ANY_END),
            Call("patched/beside/1", tokens(11_501, 200), OUTPUT, ANY_END),
            *(
                Call(f"patched/stream/{n}", tokens(11_510 + n, n), OUTPUT, ANY_END, STREAM)
                for n in (150, 700)
            ),
            *(
                Call(
                    f"patched/{reason}",
                    tokens(11_600 + i, 250),
                    40,
                    {**ANY_END, **params},
                    options,
                    expect=reason,
                )
                for i, (reason, params, options) in enumerate(PLAIN)
            ),
        ],
        8,
    )
    stops = []
    for n in LENGTHS[1:]:
        answer = base[f"patched/{n}"]
        token, text = answer.ids[OUTPUT // 2], answer.text[len(answer.text) // 3 :][:6]
        for kind, params in (
            ("token", {"stop_token_ids": [token]}),
            ("string", {**ANY_END, "stop": [text]}),
        ):
            name = f"patched/stop/{kind}/{n}"
            stops.append(Call(name, prompts[n], OUTPUT, params, expect=ANYTHING))
    yield Phase("stops", stops, 4)


STREAM = {"stream": True}
PLAIN = (
    ("penalty", {"frequency_penalty": 1.5}, {}),
    # Its end shows the order in which grammars advance, because ANY_END ignores the end token.
    ("grammar", {"regex": "(yes|no|maybe)( [a-z]{1,8}){3,9}"}, {}),
    ("logprob", {}, {"return_logprob": True, "top_logprobs_num": 2}),
)


def test_patched_sglang(tiny_model, logs, tmp_path):
    """Catches a patch that does less than the hooks it replaces, and a hook that stays beside
    what replaces it: the server says which functions of SGLang are wrapped."""
    reference: dict = {}
    log = logs / "patched-reference.log"
    with server(tiny_model, log, TINY_FLAGS, plugin=False, with_gaps=True) as client:
        client.run(phases, reference)
    env = patched_sglang.environment(patched_sglang.patch_sglang(tmp_path))
    check_needs_no_hook(env)
    log = logs / "patched.log"
    with server(tiny_model, log, (*TINY_FLAGS, *OURS), env) as client:
        answers = client.run(phases, reference)
        info, status = client.info(), client.status()
    assert status["hooks"] == []
    assert info["enable_vericache"] is True and info["vericache_horizon"] == "8"
    assert str(tmp_path) in log.read_text(), "the server ran another SGLang"

    verdict = judge([c for p in phases(reference) for c in p.calls], reference, answers)
    print(f"\n{verdict.summary()}\n" + "\n".join(verdict.near_ties))
    assert verdict.compared == len(reference) and not verdict.mismatches, verdict.mismatches
    assert not verdict.problems, verdict.problems
    assert verdict.accepted_per_round >= 2 and verdict.round_share >= 0.8, verdict.summary()
    assert status["requests"] == 0 and status["totals"]["draft_rows_limit_exceeded"] == 0
    for name, answer in answers.items():
        assert all(size > 0 for size in answer.chunks), f"{name}: an empty chunk"
    assert answers["patched/stream/700"].chunks


def check_needs_no_hook(env) -> None:
    command = [sys.executable, "-P", "-m", "sglang_vericache", "check"]
    variables = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"} | dict(env)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("ok ")}
    for hook in (*flag_hooks(), *server_hooks()):
        assert rows[hook.target].endswith("not needed"), rows[hook.target]
