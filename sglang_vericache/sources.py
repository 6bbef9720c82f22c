"""Where settings come from: flags, a config file, the environment.

A flag wins over the config file, the config file over the environment, the environment over the
default. Keywords of ``sgl.Engine`` count as flags.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_vericache.config import VeriCacheConfigError
from sglang_vericache.nearest import unknown

SWITCH = "enable_vericache"
CONFIG = "vericache_config"
SWITCH_VARIABLE = "SGLANG_VERICACHE_ENABLE"
_VARIABLES = "SGLANG_VERICACHE_"
# What cannot hold beside a setting, or has no effect then, gives way to it where it comes from a
# weaker source.
_DISPLACED = {
    "vericache_keep_ratio": ("vericache_keep_tokens",),
    "vericache_keep_tokens": ("vericache_keep_ratio", "vericache_keep_min"),
}
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Setting:
    """A raw value and the words for where it came from, as messages and the info endpoint use
    them."""

    value: Any
    origin: str


def option_of(name: str) -> str:
    """``vericache_horizon`` -> ``--vericache-horizon``."""
    return "--" + name.replace("_", "-")


def key_of(name: str) -> str:
    """``vericache_horizon`` -> ``horizon``, its key in a config file."""
    return name.removeprefix("vericache_")


def variable_of(name: str) -> str:
    """``vericache_horizon`` -> ``SGLANG_VERICACHE_HORIZON``."""
    return f"SGLANG_{name.upper()}"


def is_enabled(flags: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether the flag, or where it is not given its twin in the environment, says yes.

    Raises:
        VeriCacheConfigError: the variable is neither yes nor no.
    """
    if flags.get(SWITCH) is not None:
        return bool(flags[SWITCH])
    text = environ.get(SWITCH_VARIABLE, "").strip().lower()
    if text not in _YES + _NO:
        raise VeriCacheConfigError(
            f"{SWITCH_VARIABLE} {environ[SWITCH_VARIABLE]!r} is neither yes nor no. "
            f"Accepted: {', '.join(_YES)} or {', '.join(filter(None, _NO))}."
        )
    return text in _YES


def gather(
    names: Sequence[str], flags: Mapping[str, Any], environ: Mapping[str, str]
) -> dict[str, Setting]:
    """The winning raw value of each setting of ``names`` that is given anywhere.

    Args:
        flags: values by name; None where a flag is not given.

    Raises:
        VeriCacheConfigError: a config file that cannot be read, an unknown key or variable.
    """
    known = [variable_of(name) for name in (*names, CONFIG)] + [SWITCH_VARIABLE]
    for variable in environ:
        if variable.startswith(_VARIABLES) and variable not in known:
            raise VeriCacheConfigError(unknown("environment variable", variable, known))
    from_flags = {
        name: Setting(flags[name], f"flag {option_of(name)}")
        for name in (*names, CONFIG)
        if flags.get(name) is not None
    }
    from_environment = {
        name: Setting(environ[variable_of(name)], f"environment {variable_of(name)}")
        for name in (*names, CONFIG)
        if environ.get(variable_of(name))  # set to nothing is not set
    }
    place = from_flags.pop(CONFIG, None) or from_environment.get(CONFIG)
    from_environment.pop(CONFIG, None)
    from_file = _read(place, names) if place is not None else {}
    settings: dict[str, Setting] = {}
    for source in (from_environment, from_file, from_flags):  # the later, the stronger
        displaced = {other for name in source for other in _DISPLACED.get(name, ())}
        settings = {n: s for n, s in settings.items() if n not in displaced} | source
    return settings


def _read(place: Setting, names: Iterable[str]) -> dict[str, Setting]:
    """Settings of the config file, or of the mapping or JSON text, that ``place`` holds."""
    content = place.value
    if isinstance(content, Mapping):
        where, values = f"config in {place.origin}", content
    elif str(content).lstrip().startswith("{"):
        where = f"config in {place.origin}"
        values = _json(str(content), where)
    else:
        where = f"config file {content}"
        values = _file(Path(str(content)), where, place.origin)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise VeriCacheConfigError(
            f"{where} holds a {type(values).__name__}: accepted is a mapping of keys to values."
        )
    keys = {key_of(name): name for name in names}
    found = {}
    for key, value in values.items():
        if key not in keys:
            raise VeriCacheConfigError(unknown(f"{where}: key", str(key), keys))
        if value is None or isinstance(value, Mapping | list):
            raise VeriCacheConfigError(
                f"{where}: {key} is {json.dumps(value, default=str)}: accepted is a number or "
                "text; leave a key out for its default."
            )
        found[keys[key]] = Setting(value, f"{where}: {key}")
    return found


def _file(path: Path, where: str, origin: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise VeriCacheConfigError(
            f"{where} ({origin}) cannot be read: {error.strerror}. Accepted: a JSON or YAML file, "
            'or JSON such as {"horizon": 8}.'
        ) from None
    except UnicodeDecodeError:
        raise VeriCacheConfigError(f"{where} is not UTF-8 text.") from None
    return _json(text, where) if path.suffix == ".json" else _yaml(text, where)


def _json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _once(pairs, where)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise VeriCacheConfigError(
            f"{where} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from None


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _once([tuple(map(self.construct_object, pair)) for pair in node.value], where)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise VeriCacheConfigError(f"{where} is not YAML: {problem}{at}.") from None


def _once(pairs: list[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if str(key) in map(str, values):
            raise VeriCacheConfigError(f"{where}: {key} is given twice.")
        values[key] = value
    return values
