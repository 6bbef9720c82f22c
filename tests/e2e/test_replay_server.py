"""Recorded run lengths on a real server: a benchmark's counts, and no product's tokens.

There is nothing to compare with: a model without weights has no right tokens. What must be right
are the counts, what is committed, and that nobody can take such a server for a real one.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from breadth import tokens
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

from benchmarks.replay.vericache_replay import FOLDER, STATUS_KEY, VARIABLE
from benchmarks.serving import shapes
from sglang_vericache.cpu.engine import KERNEL_LIBRARY
from sglang_vericache.demo import DemoError

pytestmark = pytest.mark.e2e

RUN, WANTED, CAP = 3, 81, 32
FLAGS = (*TINY_FLAGS, *DRAFT_FLAGS, "--load-format", "dummy", "--skip-tokenizer-init")


def environment(place: str) -> dict[str, str]:
    paths = os.pathsep.join([str(KERNEL_LIBRARY), str(FOLDER)])
    return {"PYTHONPATH": paths, VARIABLE: place}


@pytest.fixture
def recording(tmp_path) -> str:
    """Every draft has RUN right tokens."""
    path = tmp_path / "even.json"
    runs = {"even": {"greedy": [[RUN] * 200]}}
    path.write_text(json.dumps({"cap": CAP, "runs": runs}))
    return f"{path}:even:greedy"


def test_counts_and_commit(tmp_path, logs, recording):
    """Catches tokens that are counted but not committed, and a server that accepts for real."""
    model = shapes.write_shape("tiny", tmp_path / "model")
    vocabulary = shapes.SHAPES["tiny"]["vocab_size"]
    prompts = [[t % vocabulary for t in tokens(7000 + n, n)] for n in (300, 500, 900)]
    greedy = {"temperature": 0, "ignore_eos": True}
    with server(model, logs / "replay.log", FLAGS, environment(recording)) as client:

        def ask(ids: list[int], count: int) -> dict:
            sampling = greedy | {"max_new_tokens": count}
            return client.post("/generate", {"input_ids": ids, "sampling_params": sampling})

        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda prompt: ask(prompt, WANTED), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer["output_ids"]) == WANTED
            counters = answer["meta_info"]["vericache"]
            rounds, accepted = counters["rounds"], counters["accepted"]
            # All rounds but the last, which the answer's end may cut.
            assert RUN * (rounds - 1) <= accepted <= RUN * rounds and rounds >= 15
            assert rounds + accepted + sum(counters["plain"].values()) + 1 == WANTED
            # The KV of all but the last token is in the tree, under just these tokens.
            again = ask(prompt + answer["output_ids"], 1)
            assert again["meta_info"]["cached_tokens"] == len(prompt) + WANTED - 1
        label = client.status()[STATUS_KEY]
        assert label == "even.json, even, greedy"
    log = (logs / "replay.log").read_text(errors="replace")
    assert "SIMULATED ACCEPTANCE" in log and label in log


def test_real_weights_are_refused(tiny_model, logs, recording):
    """Catches a server of a real model that gives wrong tokens."""
    flags = (*TINY_FLAGS, *DRAFT_FLAGS)
    log = logs / "replay-refused.log"
    with pytest.raises(DemoError), server(tiny_model, log, flags, environment(recording)):
        pytest.fail("it serves")
    assert "refused unless the weights are random" in log.read_text(errors="replace")
