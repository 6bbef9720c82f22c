"""How often drafted tokens stand, on made-up and recorded rounds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from sglang_vericache.rounds.agreement import (
    Agreement,
    SharedAgreement,
    expected_yields,
    mean_yields,
)
from sglang_vericache.rounds.batch import Batch

RECORDED = Path(__file__).parents[2] / "benchmarks" / "replay" / "run-lengths.json"
HORIZONS = (4, 8, 16)


def rounds_of(run: list[int], horizon: int) -> list[int]:
    """Tokens accepted in each round over an output; see the file's own words."""
    accepted, position = [], 0
    while position < len(run):
        accepted.append(min(run[position], horizon))
        position += accepted[-1] + 1
    return accepted


@pytest.mark.parametrize("mode", ["greedy", "pen", "sample"])
@pytest.mark.parametrize("drafted", HORIZONS)
def test_recorded_yields_are_predicted(mode, drafted):
    """Catches a form that clumped agreement breaks: what is seen in rounds of one horizon predicts
    the mean yield of the others."""
    outputs = json.loads(RECORDED.read_text())["runs"]["snapkv+int4had 0.2"][mode]
    shared, predicted = SharedAgreement(), {h: [] for h in HORIZONS}
    for run in outputs:
        agreement = Agreement(shared)
        for accepted in rounds_of(run, drafted):
            for h in HORIZONS:
                if agreement.shown:
                    predicted[h].append(float(expected_yields(agreement.value, h)))
            agreement.add(drafted, accepted)
    for h in HORIZONS:
        made = [1 + accepted for run in outputs for accepted in rounds_of(run, h)]
        assert np.mean(predicted[h]) == pytest.approx(np.mean(made), rel=0.12)


@pytest.mark.parametrize("truth", [0.4, 0.7, 0.95])
def test_a_request_shows_its_own(truth):
    rng, agreement = random.Random(0), Agreement()
    seen = []
    for _ in range(400):
        stood = 0
        while stood < 8 and rng.random() < truth:
            stood += 1
        agreement.add(8, stood)
        seen.append(agreement.value)
    assert np.mean(seen[50:]) == pytest.approx(truth, abs=0.03)


def test_a_text_that_changes_is_followed():
    agreement = Agreement()
    for _ in range(50):
        agreement.add(8, 8)
    assert agreement.value > 0.97
    for _ in range(60):
        agreement.add(8, 1)
    assert agreement.value < 0.7


def test_tokens_behind_the_first_miss_say_nothing():
    one, other = Agreement(), Agreement()
    one.add(4, 2)
    other.add(16, 2)
    assert one.value == other.value
    one.add(0, 0)
    assert one.value == other.value


def test_a_new_request_is_like_any_of_the_others():
    """Catches the yield of a mean agreement, of which there is perhaps none."""
    shared = SharedAgreement()
    for stands in [True, False] * 4:
        agreement = Agreement(shared)
        for _ in range(60):
            agreement.add(16, 16 if stands else 1)
    batch = Batch([100], [100], range(1), np.array([]), np.array(shared.values()))
    assert batch.mean_agreement == pytest.approx(sum(shared.values()) / len(shared.values()))
    each = [float(expected_yields(value, 16)) for value in shared.values()]
    assert batch.tokens(16) == pytest.approx(len(each) / sum(1 / y for y in each))
    assert batch.tokens(16, hoped=0.95) == pytest.approx(float(expected_yields(0.95, 16)))


def test_those_that_agree_well_end_soon():
    """Catches a batch judged by its quickest requests: of two places that always have one of
    either kind, equally often, and outputs of 480 tokens, the mean rate over a long time counts."""
    agreements = np.array([0.99, 0.5])
    batch = Batch([100] * 2, [480] * 2, range(2), agreements, agreements)
    yields = expected_yields(agreements, 16)
    rounds = 480 / yields  # that an output takes
    assert batch.tokens(16) == pytest.approx(2 * 480 / rounds.mean())
    beside = Batch([100] * 3, [480] * 3, range(2), agreements, agreements)
    rounds = np.append(rounds, 480)  # one that cannot draft gets a token a round
    assert beside.tokens(16) == pytest.approx(3 * 480 / rounds.mean())


def test_an_agreement_never_reaches_one():
    agreement = Agreement()
    for _ in range(1000):
        agreement.add(16, 16)
    assert 15 < expected_yields(agreement.value, 16) < 17


def test_mean_yields():
    found = mean_yields([(0.5, 1), (0.5, 2)])
    assert found == pytest.approx((1.5 + 1.75) / 2) and mean_yields([]) is None
