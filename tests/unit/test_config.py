"""VeriCacheConfig: a value that cannot work is refused where it is given, in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from sglang_vericache.config import (
    CompressorSpec,
    VeriCacheConfig,
    VeriCacheConfigError,
    parse_memory,
)

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10


def bad(flag: str, accepted: str, **fields):
    value = next(iter(fields.values()))
    return pytest.param(fields, flag, accepted, id=f"{'+'.join(fields)}={value}")


@pytest.mark.parametrize(
    ("fields", "flag", "accepted"),
    [
        bad("--vericache-keep-ratio 0", "(0, 1]", keep_ratio=0.0),
        bad("--vericache-keep-ratio -0.1 ", "(0, 1]", keep_ratio=-0.1),
        bad("--vericache-keep-ratio 1.5 ", "(0, 1]", keep_ratio=1.5),
        bad("--vericache-keep-ratio nan ", "(0, 1]", keep_ratio=float("nan")),
        bad("--vericache-keep-ratio inf ", "(0, 1]", keep_ratio=float("inf")),
        bad("--vericache-keep-tokens", "give one", keep_ratio=0.2, keep_tokens=100),
        bad("--vericache-keep-ratio", "give one", keep_ratio=None, keep_tokens=None),
        bad("--vericache-keep-tokens 0 ", "least accepted is 1", keep_tokens=0, keep_ratio=None),
        bad("--vericache-keep-tokens -5 ", "least accepted is 1", keep_tokens=-5, keep_ratio=None),
        bad("--vericache-keep-min -1 ", "least accepted is 0", keep_min_tokens=-1),
        bad("--vericache-horizon 0 ", "least accepted is 1", horizon=0),
        bad("--vericache-min-context 0 ", "least accepted is 1", min_context_tokens=0),
        bad("--vericache-stagger 0 ", "least accepted is 1", stagger_groups=0),
        bad("--vericache-fold-tail 64 ", "least accepted is 65", fold_tail_tokens=64),
        bad("--vericache-draft-memory 0 ", "least accepted is 1", draft_memory_bytes=0),
        bad("verify_chunk_rows 0 ", "least accepted is 1", verify_chunk_rows=0),
    ],
)
def test_bad_value_gives_a_sentence(fields, flag, accepted):
    """Catches a value that is taken and fails later, deep in a server, without its flag's name."""
    with pytest.raises(VeriCacheConfigError) as error:
        VeriCacheConfig(**fields)
    assert flag in str(error.value)
    assert accepted in str(error.value)
    assert str(error.value).endswith(".")


def test_views_grow_unless_a_constant_is_asked_for():
    assert VeriCacheConfig(grow_views=True).views_grow and not VeriCacheConfig().views_grow
    constant = VeriCacheConfig(keep_ratio=None, keep_tokens=300, grow_views=True)
    assert not constant.views_grow


def test_message_shows_the_ratio_that_was_given():
    """Catches rounding in the message: "1 is outside (0, 1]" contradicts itself."""
    with pytest.raises(VeriCacheConfigError, match=r"keep-ratio 1\.0000001 is outside"):
        VeriCacheConfig(keep_ratio=1.0000001)


@pytest.mark.parametrize(
    "fields",
    [
        {"keep_ratio": 1.0},
        {"keep_ratio": 1e-9},
        {"keep_ratio": None, "keep_tokens": 1},
        {"keep_min_tokens": 0},
        {"horizon": 1, "stagger_groups": 1, "min_context_tokens": 1, "fold_tail_tokens": 65},
    ],
    ids=["ratio-1", "tiny-ratio", "one-token", "no-floor", "least-of-all"],
)
def test_edges_are_accepted(fields):
    """Catches bounds that are one off."""
    config = VeriCacheConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("horizon", "fold", "offload", "width", "tail"),
    [(1, 65, "off", 2, 69), (16, 256, "off", 17, 290), (16, 256, "auto", 34, 307)],
)
def test_derived_lengths(horizon, fold, offload, width, tail):
    """Catches a verify width without the pending token, and a tail without room for a round and
    the next one that is drafted behind it."""
    config = VeriCacheConfig(horizon=horizon, fold_tail_tokens=fold, offload=offload)
    assert (config.verify_width, config.tail_capacity) == (width, tail)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", 2 * GIB),
        ("0.5", GIB // 2),
        (".25", GIB // 4),
        (3, 3 * GIB),
        (0.5, GIB // 2),
        ("512MiB", 512 * MIB),
        ("512mib", 512 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        (" 64 KiB ", 64 * KIB),
    ],
)
def test_memory_spellings(text, expected):
    """Catches a unit that is ignored or taken for another."""
    assert parse_memory("--vericache-draft-memory", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "  ", "0", "-1", "GiB", "2TB", "2 G i B", "1e3", "two", "1,5", "0x10", "nan"),
        *(None, True, "0.0000000001", "9" * 400),
    ],
    ids=lambda text: repr(text)[:14],
)
def test_memory_that_is_no_size(text):
    """Catches sizes that are misread, round to nothing or raise something without the flag."""
    with pytest.raises(VeriCacheConfigError, match=r"--vericache-draft-memory .* Accepted: .*MiB"):
        parse_memory("--vericache-draft-memory", text)


@pytest.mark.parametrize(
    ("text", "name", "params", "shown"),
    [
        ("snapkv", "snapkv", {}, "snapkv"),
        (" SnapKV ", "snapkv", {}, "snapkv"),
        ("snapkv:", "snapkv", {}, "snapkv"),
        ("snapkv:window=32", "snapkv", {"window": "32"}, "snapkv:window=32"),
        (
            "snapkv: window = 32 , kernel=7,",
            "snapkv",
            {"window": "32", "kernel": "7"},
            "snapkv:window=32,kernel=7",
        ),
        ("", "", {}, ""),
    ],
)
def test_compressor_spec(text, name, params, shown):
    """Catches spellings that lose a parameter, and a log line that shows another compressor."""
    spec = CompressorSpec.parse(text)
    assert (spec.name, dict(spec.params), str(spec)) == (name, params, shown)


@pytest.mark.parametrize("text", ["snapkv:window", "snapkv:=3", "snapkv:window=", "snapkv:a=1,b"])
def test_compressor_parameter_without_value(text):
    """Catches a parameter that is silently dropped."""
    with pytest.raises(VeriCacheConfigError, match=r"--vericache-compressor.*NAME:key=value"):
        CompressorSpec.parse(text)


@pytest.mark.parametrize("travel", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy])
def test_travels_to_another_process(travel):
    """Catches a record that cannot be pickled to the scheduler process, or arrives changed."""
    config = VeriCacheConfig(
        compressor=CompressorSpec.parse("snapkv:window=32"), horizon=7, draft_memory_bytes=MIB
    )
    arrived = travel(config)
    assert arrived == config
    with pytest.raises(TypeError):
        arrived.compressor.params["window"] = "1"


def test_is_frozen():
    """Catches a layer that adjusts the configuration under the others."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        VeriCacheConfig().horizon = 3


def test_describe_is_plain():
    """Catches values that the info endpoint cannot turn into JSON, and fields left out."""
    config = VeriCacheConfig(compressor=CompressorSpec.parse("snapkv:window=32"))
    described = json.loads(json.dumps(config.describe()))
    assert described["compressor"] == "snapkv:window=32"
    assert described["keep_ratio"] == 0.2
    assert described.keys() == {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"host_memory_bytes": 1 << 30}, "--vericache-host-memory has no effect without"),
        ({"offload_checksums": True}, "--vericache-offload-checksums has no effect without"),
        ({"loader_watch": "ipc:///run/x"}, "--vericache-loader-watch has no effect without"),
        ({"offload": "auto", "loader_watch": "tcp://*:5"}, "is not an address of this machine"),
        ({"offload": "auto", "host_memory_bytes": 0}, "the least accepted is 1"),
    ],
)
def test_offloading_that_cannot_be(settings, sentence):
    with pytest.raises(VeriCacheConfigError, match=sentence):
        VeriCacheConfig(**settings)


@pytest.mark.parametrize(
    ("fields", "host_runs_ahead", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"stagger_groups": 2}, True, False),
        ({"offload": "auto"}, True, True),
        ({"draft_ahead": "on"}, False, True),
        ({"draft_ahead": "off"}, True, False),
    ],
)
def test_drafting_ahead(fields, host_runs_ahead, expected):
    assert VeriCacheConfig(**fields).drafts_ahead(host_runs_ahead) is expected


def test_drafting_ahead_of_some():
    """Catches a setting that would be ignored."""
    with pytest.raises(VeriCacheConfigError, match="--vericache-draft-ahead on"):
        VeriCacheConfig(draft_ahead="on", stagger_groups=2)


@pytest.mark.parametrize(
    ("choice", "preferred", "deterministic", "expected"),
    [
        ("auto", True, False, True),
        ("auto", False, False, False),
        ("auto", True, True, False),
        ("triton", False, True, True),
        ("backend", True, False, False),
    ],
)
def test_what_verifies(choice, preferred, deterministic, expected):
    """Catches another kernel than the server's where its tokens have to be that kernel's."""
    config = VeriCacheConfig(verify_attention=choice)
    assert config.verifies_with_kernel(preferred, deterministic) is expected
