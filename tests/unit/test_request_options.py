"""What a request may ask for, and the sentence it gets for anything else."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.request_options import (
    RequestOptions,
    RequestOptionsError,
    check_room,
    options_of,
    read_options,
)

CONFIG = VeriCacheConfig(horizon=8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, RequestOptions()),
        ({"enabled": True}, RequestOptions()),
        ({"enabled": False}, RequestOptions(enabled=False)),
        ({"keep_ratio": 1}, RequestOptions(keep_ratio=1)),
        ({"keep_ratio": 0.05}, RequestOptions(keep_ratio=0.05)),
        ({"horizon": 1}, RequestOptions(horizon=1)),
        ({"horizon": 8}, RequestOptions(horizon=8)),
        (
            {"enabled": True, "keep_ratio": 0.5, "horizon": 3},
            RequestOptions(True, 0.5, 3),
        ),
    ],
)
def test_accepted(value, expected):
    """Catches bounds that are one off, and a key that is dropped."""
    assert read_options({"vericache": value, "other": 1}, CONFIG) == expected


@pytest.mark.parametrize("params", [None, {}, {"thinking_budget": 5}, "x", 3])
def test_not_given(params):
    """Catches other users of custom_params that are refused."""
    assert read_options(params, CONFIG) == RequestOptions()


# The e2e suite sends each of these to a server.
REFUSED = [
    (None, "vericache is null: accepted is an object"),
    (True, "vericache is true: accepted is an object"),
    ("off", 'vericache is "off": accepted is an object'),
    ([], "vericache is []: accepted is an object"),
    ({"enable": False}, "key 'enable' is not known. Did you mean enabled?"),
    ({"keep-ratio": 0.5}, "Did you mean keep_ratio?"),
    ({"temperature": 1}, "Known: enabled, keep_ratio, horizon."),
    ({"enabled": 1}, "vericache.enabled is 1: accepted is true or false"),
    ({"enabled": "false"}, 'vericache.enabled is "false": accepted'),
    ({"enabled": None}, "vericache.enabled is null: accepted"),
    ({"keep_ratio": 0}, "vericache.keep_ratio is 0: accepted is a number in (0, 1]"),
    ({"keep_ratio": 1.01}, "vericache.keep_ratio is 1.01: accepted"),
    ({"keep_ratio": -0.2}, "vericache.keep_ratio is -0.2: accepted"),
    ({"keep_ratio": "0.2"}, 'vericache.keep_ratio is "0.2": accepted'),
    ({"keep_ratio": True}, "vericache.keep_ratio is true: accepted"),
    ({"keep_ratio": None}, "vericache.keep_ratio is null: accepted"),
    ({"keep_ratio": [0.2]}, "vericache.keep_ratio is [0.2]: accepted"),
    ({"keep_ratio": {"a": {"b": 1}}}, 'vericache.keep_ratio is {"a": {"b": 1}}: accepted'),
    ({"horizon": 9}, "from 1 to 8, the server's --vericache-horizon"),
    ({"horizon": 0}, "vericache.horizon is 0: accepted is a whole number from 1 to 8"),
    ({"horizon": 4.0}, "vericache.horizon is 4.0: accepted"),
    ({"horizon": "4"}, 'vericache.horizon is "4": accepted'),
    ({"horizon": True}, "vericache.horizon is true: accepted"),
    ({"enabled": False, "horizon": 99}, "vericache.horizon is 99: accepted"),
]


@pytest.mark.parametrize(("value", "sentence"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(value, sentence):
    """Catches a value that is taken and fails, or does nothing, in the scheduler."""
    with pytest.raises(RequestOptionsError) as error:
        read_options({"vericache": value}, CONFIG)
    assert sentence in str(error.value)
    assert isinstance(error.value, ValueError), "SGLang answers HTTP 400 for these"


def test_not_a_number():
    """Catches a comparison that is false both ways."""
    with pytest.raises(RequestOptionsError, match="keep_ratio is NaN"):
        read_options({"vericache": {"keep_ratio": float("nan")}}, CONFIG)


def test_long_values_are_cut():
    """Catches a megabyte of someone's prompt in an error message."""
    with pytest.raises(RequestOptionsError) as error:
        read_options({"vericache": {"horizon": "x" * 10_000}}, CONFIG)
    assert len(str(error.value)) < 250


def test_unchecked_options_do_not_stop_the_scheduler(caplog):
    """Catches a front end that does not validate and takes the server down."""
    params = SimpleNamespace(custom_params={"vericache": {"horizon": 99}})
    with caplog.at_level(logging.WARNING):
        options = options_of(SimpleNamespace(rid="a", sampling_params=params), CONFIG)
    assert options == RequestOptions(enabled=False)
    assert "vericache.horizon is 99" in caplog.text


def test_room_in_a_draft_row():
    """Catches a ratio that is trimmed in silence: 0.2 of 1000 tokens are 200 rows."""
    config = VeriCacheConfig(keep_ratio=0.2, keep_min_tokens=0)
    for ratio, prompt in ((0.2, 1000), (0.5, 400), (1.0, 200), (None, 1000)):
        check_room(RequestOptions(keep_ratio=ratio), config, prompt, 1000)
    with pytest.raises(RequestOptionsError, match=r"0.5: of 800 tokens .* 400, .* 200.* 0.250;"):
        check_room(RequestOptions(keep_ratio=0.5), config, 800, 1000)
