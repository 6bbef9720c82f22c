"""Sampling without a seed: other draws, the same distribution."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from breadth import ANY_END, tokens
from cases import Call
from conftest import DRAFT_FLAGS, TINY_FLAGS
from servers import server

pytestmark = pytest.mark.e2e

DRAWS = 400
# Each draw has three candidates; a chi-square of 2 degrees of freedom above this has a
# probability of 1e-5.
LARGEST_CHI_SQUARE = 23.0
# The second and third tokens are decoded; the first comes from the prefill.
SAMPLED = Call(
    "sampled", tokens(55, 300), 3, {**ANY_END, "temperature": 2.0, "top_k": 3}, expect="sampling"
)
GREEDY = Call("greedy", tokens(56, 400), 400, ANY_END)


def draw(client) -> tuple[Counter, dict]:
    """Counts of (second, third) token given the most frequent first, beside a drafting request."""
    with ThreadPoolExecutor(9) as pool:
        greedy = pool.submit(client.call, GREEDY)
        answers = list(pool.map(lambda _: client.call(SAMPLED), range(DRAWS)))
        greedy.result()
    return Counter(answer.ids[1] for answer in answers), answers[0].info


def test_distribution(tiny_model, logs):
    """Catches a plain decode that samples from draft logits, another temperature or top-k."""
    with server(tiny_model, logs / "sampling-reference.log", TINY_FLAGS, plugin=False) as client:
        expected, _ = draw(client)
    with server(tiny_model, logs / "sampling.log", (*TINY_FLAGS, *DRAFT_FLAGS)) as client:
        found, info = draw(client)
    assert set(info["plain"]) == {"sampling"}
    # Two samples of the same size: sum of (a - b)^2 / (a + b) is chi-square distributed.
    common = [token for token, count in (expected + found).items() if count >= 20]
    assert len(common) >= 2, (expected, found)
    chi = sum((expected[t] - found[t]) ** 2 / (expected[t] + found[t]) for t in common)
    freedom = len(common) - 1
    assert chi < LARGEST_CHI_SQUARE + 3 * freedom, (chi, freedom, expected, found)
