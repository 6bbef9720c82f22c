"""Settings from flags, a file and the environment: who wins, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from sglang_vericache.config import VeriCacheConfig, VeriCacheConfigError
from sglang_vericache.flags import FLAGS, config_from, take_keywords
from sglang_vericache.sources import gather, key_of, variable_of

ON = {"enable_vericache": True}


def config(flags: dict | None = None, environ: dict | None = None) -> VeriCacheConfig | None:
    return config_from(ON | (flags or {}), environ or {})


@pytest.fixture
def write(tmp_path):
    def write(text: str | dict, name: str = "vericache.yaml") -> str:
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flag", "file", "variable", "expected", "source"),
    [
        (True, True, True, 3, "flag --vericache-horizon"),
        (True, True, False, 3, "flag --vericache-horizon"),
        (True, False, True, 3, "flag --vericache-horizon"),
        (True, False, False, 3, "flag --vericache-horizon"),
        (False, True, True, 5, "config file .*vericache.yaml: horizon"),
        (False, True, False, 5, "config file .*vericache.yaml: horizon"),
        (False, False, True, 7, "environment SGLANG_VERICACHE_HORIZON"),
        (False, False, False, 15, "default"),
    ],
)
def test_precedence(write, flag, file, variable, expected, source):
    """Catches a precedence other than flag, file, environment, default, and a wrong source."""
    flags = {"vericache_horizon": 3} if flag else {}
    if file:
        flags["vericache_config"] = write({"horizon": 5})
    environ = {"SGLANG_VERICACHE_HORIZON": "7"} if variable else {}
    found = config(flags, environ)
    assert found.horizon == expected
    assert re.fullmatch(source, found.describe()["sources"]["horizon"])


def test_every_setting_has_its_twins(write):
    """Catches a setting that the file or the environment cannot set."""
    values = {
        "compressor": "keydiff",
        "keep_ratio": "0.3",
        "horizon": "5",
        "draft_dtype": "int4",
        "keep_min": "500",
        "grow_views": "on",
        "horizon_policy": "fixed",
        "max_step_ms": "40",
        "draft_memory": "1GiB",
        "min_context": "77",
        "stagger": "2",
        "draft_ahead": "off",
        "verify_attention": "triton",
        "cascade": "auto",
        "fold_tail": "99",
        "offload": "auto",
        "host_memory": "2GiB",
        "offload_checksums": "on",
        "loader_watch": "ipc:///run/loader",
    }
    others = {key_of(flag.name) for flag in FLAGS} - values.keys() - {"keep_tokens"}
    assert not others, "new settings belong into this test"
    from_file = config({"vericache_config": write(values)})
    variables = {variable_of(f"vericache_{key}"): value for key, value in values.items()}
    from_environment = config(environ=variables)
    from_flags = config({f"vericache_{key}": value for key, value in values.items()})
    assert from_file == from_environment == from_flags != config()
    assert set(variables) == {f"SGLANG_VERICACHE_{key.upper()}" for key in values}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"horizon": 5, "keep_ratio": 0.5}', "a.json"),
        ("horizon: 5\nkeep_ratio: 0.5\n", "a.yaml"),
        ("# comment\nhorizon: '5'\nkeep_ratio: .5\n", "a.yml"),
        ('{"horizon": 5, "keep_ratio": 0.5}', "config"),
    ],
)
def test_file_formats(write, text, name):
    """Catches a format that depends on more than the suffix .json."""
    found = config({"vericache_config": write(text, name)})
    assert (found.horizon, found.keep_ratio) == (5, 0.5)


def test_json_instead_of_a_file():
    """Catches JSON on the command line that is taken for a path, and a mapping for Engine."""
    for value in ('{"horizon": 5}', ' {"horizon": 5}', {"horizon": 5}):
        found = config({"vericache_config": value})
        assert found.horizon == 5
        source = found.describe()["sources"]["horizon"]
        assert source == "config in flag --vericache-config: horizon"


def test_file_from_the_environment(write):
    """Catches a variable for the file that is not read, or wins over the flag's file."""
    environ = {"SGLANG_VERICACHE_CONFIG": write({"horizon": 5, "stagger": 2}, "a.yaml")}
    assert config(environ=environ).horizon == 5
    found = config({"vericache_config": write({"horizon": 6}, "b.yaml")}, environ)
    assert (found.horizon, found.stagger_groups) == (6, 1)


@pytest.mark.parametrize("empty", ["", "\n", "{}", "# nothing\n"])
def test_empty_file(write, empty):
    """Catches an empty file that is an error, or no mapping."""
    assert config({"vericache_config": write(empty)}) == VeriCacheConfig()


@pytest.mark.parametrize(
    ("flags", "environ", "kept"),
    [
        ({"vericache_keep_tokens": 300}, {"SGLANG_VERICACHE_KEEP_RATIO": "0.5"}, (None, 300)),
        ({"vericache_keep_ratio": 0.5}, {"SGLANG_VERICACHE_KEEP_TOKENS": "300"}, (0.5, None)),
        ({}, {"SGLANG_VERICACHE_KEEP_TOKENS": "300"}, (None, 300)),
    ],
)
def test_alternatives(flags, environ, kept):
    """Catches a ratio from a weaker source that contradicts the tokens of a stronger one."""
    found = config(flags, environ)
    assert (found.keep_ratio, found.keep_tokens) == kept
    sources = found.describe()["sources"]
    assert "default" not in (sources["keep_ratio"] if kept[0] else sources["keep_tokens"])


def test_least_tokens_kept_give_way():
    """Catches a floor from a weaker source that contradicts the tokens of a stronger one; and one
    of a stronger source that is silently ignored."""
    least, tokens = {"SGLANG_VERICACHE_KEEP_MIN": "500"}, {"SGLANG_VERICACHE_KEEP_TOKENS": "300"}
    found = config({"vericache_keep_tokens": 300}, least)
    assert (found.keep_tokens, found.keep_min_tokens) == (300, 0)
    assert found.describe()["sources"]["keep_min_tokens"] == "flag --vericache-keep-tokens"
    assert config({"vericache_keep_ratio": 0.5}, least).keep_min_tokens == 500
    for flags, environ in (({"vericache_keep_min": 500}, tokens), ({}, least | tokens)):
        with pytest.raises(VeriCacheConfigError, match="has no effect with --vericache-keep-tok"):
            config(flags, environ)


def test_alternatives_in_one_source(write):
    """Catches two contradicting settings of one source, of which one is silently ignored."""
    path = write({"keep_ratio": 0.5, "keep_tokens": 300})
    with pytest.raises(VeriCacheConfigError, match="are alternatives: give one") as error:
        config({"vericache_config": path})
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("horizn: 5", "a.yaml", "key 'horizn' is not known. Did you mean horizon?"),
        ("keep-ratio: 0.5", "a.yaml", "Did you mean keep_ratio?"),
        ("vericache_horizon: 5", "a.yaml", "Did you mean horizon?"),
        ("7: 5", "a.yaml", "key '7' is not known"),
        ("enable: true", "a.yaml", "key 'enable' is not known"),
        ("horizon: five", "a.yaml", "--vericache-horizon 'five' is not a whole number"),
        ("horizon: 5.5", "a.yaml", "--vericache-horizon 5.5 is not a whole number"),
        ("horizon: true", "a.yaml", "--vericache-horizon True is not a whole number"),
        ("keep_ratio: false", "a.yaml", "--vericache-keep-ratio False is not a number"),
        ("keep_ratio: .nan", "a.yaml", "--vericache-keep-ratio nan is outside"),
        ("horizon: 0", "a.yaml", "--vericache-horizon 0 is too small"),
        ("horizon:", "a.yaml", "horizon is null: accepted is a number or text"),
        ("horizon: [5]", "a.yaml", "horizon is [5]: accepted is a number or text"),
        ("compressor: {name: snapkv}", "a.yaml", 'compressor is {"name": "snapkv"}: accepted'),
        ("compressor: zip", "a.yaml", "no compressor is called 'zip'. Known: snapkv"),
        ("draft_memory: lots", "a.yaml", "--vericache-draft-memory 'lots' is not a size"),
        ("horizon: 5\nhorizon: 6", "a.yaml", "horizon is given twice"),
        ('{"horizon": 5, "horizon": 6}', "a.json", "horizon is given twice"),
        ("horizon: [5", "a.yaml", "is not YAML: "),
        ("a: b: c", "a.yaml", "in line 1, column"),
        ('{"horizon": }', "a.json", "is not JSON: Expecting value in line 1, column 13"),
        ("horizon: 5", "a.json", "is not JSON"),
        ("- horizon", "a.yaml", "holds a list: accepted is a mapping"),
        ("horizon", "a.yaml", "holds a str: accepted is a mapping"),
        ("[]", "a.json", "holds a list"),
        ("\x00", "a.yaml", "is not YAML"),
    ],
)
def test_bad_file(write, text, name, expected):
    """Catches a file that is half applied, and a message without the file, the key or what is
    accepted."""
    path = write(text, name)
    with pytest.raises(VeriCacheConfigError) as error:
        config({"vericache_config": path})
    assert expected in str(error.value)
    assert path in str(error.value)


def test_unreadable_file(tmp_path):
    """Catches a traceback where a sentence belongs."""
    (tmp_path / "latin").write_bytes(b"horizon: \xff")
    for name, expected in (
        ("missing.yaml", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("latin", "is not UTF-8"),
    ):
        with pytest.raises(VeriCacheConfigError, match=expected):
            config({"vericache_config": str(tmp_path / name)})


@pytest.mark.parametrize("text", ['{"horizon": 5', '{"horizn": 5}'])
def test_bad_json_text(text):
    """Catches a message that shows no place because there is no file."""
    with pytest.raises(VeriCacheConfigError, match="config in flag --vericache-config"):
        config({"vericache_config": text})


def test_unknown_variable():
    """Catches a misspelt variable that does nothing."""
    with pytest.raises(VeriCacheConfigError, match="Did you mean SGLANG_VERICACHE_HORIZON"):
        config(environ={"SGLANG_VERICACHE_HORIZN": "5"})
    assert config(environ={"SGLANG_HORIZON": "5", "VERICACHE_CACHE": "x"}) == VeriCacheConfig()


def test_bad_variable_is_named():
    """Catches a message that names only a flag nobody gave."""
    for value, expected in (("x", "is not a whole number"), ("0", "too small")):
        with pytest.raises(VeriCacheConfigError, match=expected) as error:
            config(environ={"SGLANG_VERICACHE_HORIZON": value})
        assert "Set by environment SGLANG_VERICACHE_HORIZON" in str(error.value)
    with pytest.raises(VeriCacheConfigError) as error:
        config({"vericache_horizon": "x"}, {"SGLANG_VERICACHE_STAGGER": "2"})
    assert "Set by" not in str(error.value)


def test_empty_variable_is_not_set():
    """Catches a compose file's ${HORIZON:-} that is refused."""
    assert config(environ={"SGLANG_VERICACHE_HORIZON": ""}) == VeriCacheConfig()


@pytest.mark.parametrize(
    ("flags", "variable", "enabled"),
    [
        ({}, "1", True),
        ({}, "Yes", True),
        ({}, "off", False),
        ({}, "", False),
        ({}, None, False),
        ({"enable_vericache": False}, "1", False),
        ({"enable_vericache": None}, "true", True),
        ({"enable_vericache": True}, "0", True),
    ],
)
def test_switch(flags, variable, enabled):
    """Catches a flag that the environment overrides."""
    environ = {} if variable is None else {"SGLANG_VERICACHE_ENABLE": variable}
    assert (config_from(flags, environ) is not None) == enabled


def test_switch_that_is_neither():
    """Catches "enabled" that means no."""
    with pytest.raises(VeriCacheConfigError, match="SGLANG_VERICACHE_ENABLE 'enabled' is neither"):
        config_from({}, {"SGLANG_VERICACHE_ENABLE": "enabled"})


def test_settings_in_the_environment_do_not_enable():
    """Catches a plain server that refuses to start, or changes, where the environment is
    prepared for ours."""
    assert config_from({}, {"SGLANG_VERICACHE_HORIZON": "x", "SGLANG_VERICACHE_NO": "1"}) is None


def test_config_without_the_switch():
    """Catches a file that silently does nothing."""
    with pytest.raises(VeriCacheConfigError, match="--vericache-config has no effect without"):
        config_from({"vericache_config": "{}"}, {})


def test_engine_keywords_count_as_flags(monkeypatch):
    """Catches an Engine whose environment wins, and a keyword left for ServerArgs."""
    monkeypatch.setenv("SGLANG_VERICACHE_HORIZON", "7")
    keywords = {"model_path": "m", "vericache_config": {"horizon": 5, "stagger": 2}} | ON
    found = take_keywords(keywords | {"vericache_horizon": 3})
    assert (found.horizon, found.stagger_groups) == (3, 2)
    assert take_keywords(keywords).stagger_groups == 2
    assert keywords == {"model_path": "m"}


def test_every_field_has_a_source():
    """Catches a setting that the info endpoint shows without where it came from."""
    described = config({"vericache_horizon": 3}).describe()
    assert described["sources"].keys() == described.keys() - {"sources"}
    assert described["sources"]["horizon"] == "flag --vericache-horizon"
    text = str(config({"vericache_horizon": 3}))
    assert "horizon=3 (flag --vericache-horizon), " in text and "keep_ratio=0.2 (default)" in text


def test_gather_leaves_out_what_is_not_given():
    """Catches defaults that look like settings."""
    assert gather(["vericache_horizon", "vericache_stagger"], {"vericache_horizon": None}, {}) == {}
