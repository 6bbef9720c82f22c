"""Flags and Engine keywords: the same table, the same errors, nothing half applied."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

from sglang_vericache.config import DRAFT_DTYPES, VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.flags import (
    FLAGS,
    RECORD_ATTRIBUTE,
    add_arguments,
    config_from,
    config_of,
    take_keywords,
)
from sglang_vericache.kernels.pool_format import FORMATS

GIB = 1 << 30


def from_command_line(*arguments: str) -> VeriCacheConfig | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config_from(vars(parser.parse_args(arguments)))


def test_every_setting_has_a_flag():
    """Catches a new field that no flag sets, and a flag whose field is misspelt."""
    internal = {"verify_chunk_rows", "sources"}
    settable = {field.name for field in fields(VeriCacheConfig)} - internal
    assert {flag.config_field for flag in FLAGS} == settable
    assert len({flag.name for flag in FLAGS}) == len(FLAGS) == len(settable)


def test_switch_alone_gives_the_defaults():
    """Catches a parser default that overrides the configuration's."""
    assert from_command_line("--enable-vericache") == VeriCacheConfig()
    assert from_command_line() is None


def test_all_flags_reach_their_fields():
    """Catches two flags that set one field, or a value that stays a string."""
    config = from_command_line(
        "--enable-vericache",
        "--vericache-compressor=keydiff",
        "--vericache-keep-tokens=300",
        "--vericache-horizon=5",
        "--vericache-draft-memory=2",
        "--vericache-min-context=100",
        "--vericache-stagger=3",
        "--vericache-fold-tail=128",
        "--vericache-grow-views=on",
    )
    assert config.compressor.name == "keydiff"
    assert (config.keep_ratio, config.keep_tokens) == (None, 300)
    assert (config.horizon, config.draft_memory_bytes) == (5, 2 * GIB)
    assert (config.min_context_tokens, config.stagger_groups) == (100, 3)
    assert (config.fold_tail_tokens, config.grow_views) == (128, True)


def test_least_tokens_kept():
    """Catches a floor beside a number of tokens, which says all there is to say."""
    assert from_command_line("--enable-vericache", "--vericache-keep-min=0").keep_min_tokens == 0
    tokens = ("--enable-vericache", "--vericache-keep-tokens=300")
    assert from_command_line(*tokens).keep_min_tokens == 0
    assert from_command_line(*tokens, "--vericache-keep-min=0").keep_tokens == 300
    with pytest.raises(VeriCacheConfigError, match=r"keep-min has no effect with .*-tokens"):
        from_command_line(*tokens, "--vericache-keep-min=500")


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if "(default" in flag.help], ids=lambda f: f.name
)
def test_help_tells_the_real_default(flag):
    """Catches a help text that keeps an old default."""
    shown = re.search(r"\(default ([^):]+)", flag.help)[1]
    default = getattr(VeriCacheConfig(), flag.config_field)
    if isinstance(default, bool):
        default = "on" if default else "off"
    assert shown == str(default)


@pytest.mark.parametrize("value", ["on", "ON", True])
def test_switches(value):
    """Catches a YAML file's `on`, which is a truth value, and words that mean something else."""
    with_offload = {"enable_vericache": True, "vericache_offload": "auto"}
    found = config_from(with_offload | {"vericache_offload_checksums": value}, {})
    assert found.offload_checksums is True
    off = config_from(with_offload | {"vericache_offload_checksums": False}, {})
    assert off.offload_checksums is False
    with pytest.raises(VeriCacheConfigError, match="'maybe' is unknown"):
        config_from(with_offload | {"vericache_offload_checksums": "maybe"}, {})


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--vericache-keep-ratio", "0", r"\(0, 1\]"),
        ("--vericache-keep-ratio", "1.01", r"\(0, 1\]"),
        ("--vericache-keep-ratio", "nan", r"\(0, 1\]"),
        ("--vericache-keep-ratio", "a fifth", "not a number"),
        ("--vericache-keep-tokens", "0", "least accepted is 1"),
        ("--vericache-keep-tokens", "0.2", "not a whole number"),
        ("--vericache-keep-min", "-1", "least accepted is 0"),
        ("--vericache-keep-min", "all", "not a whole number"),
        ("--vericache-horizon", "sixteen", "not a whole number"),
        ("--vericache-horizon", "0", "least accepted is 1"),
        ("--vericache-draft-memory", "2TB", "Accepted: a number of GiB"),
        ("--vericache-min-context", "-1", "least accepted is 1"),
        ("--vericache-stagger", "", "not a whole number"),
        ("--vericache-fold-tail", "10", "least accepted is 65"),
        (
            "--vericache-compressor",
            "h2o",
            "Known: snapkv, expected_attention, keydiff, knorm, streamingllm",
        ),
        (
            "--vericache-compressor",
            "",
            "Known: snapkv, expected_attention, keydiff, knorm, streamingllm",
        ),
        ("--vericache-compressor", "snapkv:size=3", "Known: window"),
        ("--vericache-compressor", "snapkv:window=many", "not a whole number"),
        ("--vericache-compressor", "snapkv:window", "key=value"),
    ],
)
def test_bad_flag_gives_a_sentence(option, value, accepted):
    """Catches an error without its flag, and a flag whose value is only checked when used."""
    with pytest.raises(VeriCacheConfigError, match=f"^{option} .*{accepted}"):
        from_command_line("--enable-vericache", f"{option}={value}")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("vericache_horizon", float("inf")),
        ("vericache_horizon", 2.5),
        ("vericache_horizon", [16]),
        ("vericache_keep_ratio", "much"),
        ("vericache_keep_ratio", {}),
        ("vericache_draft_memory", []),
        ("vericache_compressor", 5),
    ],
    ids=lambda value: str(value),
)
def test_bad_keyword_gives_a_sentence(keyword, value):
    """Catches values that only a Python caller can give: each is refused by its flag's name, not
    with another exception, and a fraction of a token is not cut off silently."""
    with pytest.raises(VeriCacheConfigError, match="^--" + keyword.replace("_", "-")):
        take_keywords({"enable_vericache": True, keyword: value})


def test_ratio_and_tokens_together():
    """Catches one of the two winning silently."""
    with pytest.raises(VeriCacheConfigError, match="keep-ratio and --vericache-keep-tokens"):
        from_command_line(
            "--enable-vericache", "--vericache-keep-ratio=0.2", "--vericache-keep-tokens=9"
        )


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_flag_without_the_switch(flag):
    """Catches a user who believes drafting is on; even a zero counts as given."""
    with pytest.raises(VeriCacheConfigError) as error:
        config_from({flag.name: 0})
    assert flag.option in str(error.value)
    assert "--enable-vericache: add it" in str(error.value)


def test_flags_without_the_switch_are_all_named():
    """Catches a message that makes the user run twice."""
    with pytest.raises(VeriCacheConfigError, match="--vericache-horizon, --vericache-stagger"):
        from_command_line("--vericache-horizon=3", "--vericache-stagger=2")


def test_engine_keywords_are_taken_out():
    """Catches keywords that reach SGLang's ServerArgs, which knows none of them."""
    keywords = {"model_path": "m", "enable_vericache": True} | {
        "vericache_keep_ratio": 0.5,
        "vericache_horizon": 4,
        "vericache_draft_memory": "1GiB",
    }
    config = take_keywords(keywords)
    assert keywords == {"model_path": "m"}
    assert (config.keep_ratio, config.horizon, config.draft_memory_bytes) == (0.5, 4, GIB)


@pytest.mark.parametrize("keywords", [{}, {"enable_vericache": False}, {"enable_vericache": None}])
def test_engine_without_the_switch(keywords):
    """Catches an Engine that changes although nobody asked."""
    keywords = dict(keywords) | {"model_path": "m"}
    assert take_keywords(keywords) is None
    assert keywords == {"model_path": "m"}


def test_none_is_not_given():
    """Catches keywords passed on with their default None, which must not count."""
    config = take_keywords({"enable_vericache": True} | {flag.name: None for flag in FLAGS})
    assert config == VeriCacheConfig()


def test_config_rides_on_the_record():
    """Catches a record without the flag that raises instead of saying None."""
    config = VeriCacheConfig()
    assert config_of(SimpleNamespace(**{RECORD_ATTRIBUTE: config})) is config
    assert config_of(SimpleNamespace()) is None


def test_draft_dtypes_are_the_pool_formats():
    """Catches a format that no flag reaches: config names them without importing torch."""
    assert tuple(FORMATS) == DRAFT_DTYPES


def test_unknown_draft_dtype_is_refused():
    with pytest.raises(VeriCacheConfigError, match=r"--vericache-draft-dtype 'int3'.*fp8_e4m3"):
        config_from({"enable_vericache": True, "vericache_draft_dtype": "int3"})
