"""What one request may ask for: ``custom_params={"vericache": {...}}``, or the field
``vericache`` of an OpenAI request.

A request that asks for its own keep ratio gets draft spans of its own budget. It takes a span
from the radix tree only where that was selected within a budget that keeps at least as much.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.nearest import unknown

KEY = "vericache"

logger = logging.getLogger(__name__)


class RequestOptionsError(ValueError):
    """The request cannot be served as asked; SGLang answers HTTP 400 with the message."""


@dataclass(frozen=True)
class RequestOptions:
    """
    Attributes:
        enabled: False decodes the request without drafting.
        keep_ratio: fraction of its path's tokens that its spans keep, taken as written, without
            the server's least number of tokens; None: as the server's.
        horizon: most tokens drafted before each verification; None: as the server's.
    """

    enabled: bool = True
    keep_ratio: float | None = None
    horizon: int | None = None

    @classmethod
    def parse(cls, value: Any, config: VeriCacheConfig) -> RequestOptions:
        """Check ``value`` against the server's settings.

        Raises:
            RequestOptionsError: an unknown key, a wrong type, or a value out of range.
        """
        if not isinstance(value, Mapping):
            raise RequestOptionsError(
                f"{KEY} is {_shown(value)}: accepted is an object such as "
                '{"enabled": true, "keep_ratio": 0.2, "horizon": 8}.'
            )
        known = [field.name for field in fields(cls)]
        for key in value:
            if key not in known:
                raise RequestOptionsError(unknown(f"{KEY}: key", str(key), known))
        if "enabled" in value and not isinstance(value["enabled"], bool):
            raise RequestOptionsError(_not(value, "enabled", "true or false"))
        ratio = value.get("keep_ratio")
        if "keep_ratio" in value and not (_is(float, ratio) and 0.0 < ratio <= 1.0):
            raise RequestOptionsError(_not(value, "keep_ratio", "a number in (0, 1]"))
        horizon = value.get("horizon")
        if "horizon" in value and not (_is(int, horizon) and 1 <= horizon <= config.horizon):
            limit = f"a whole number from 1 to {config.horizon}, the server's --vericache-horizon"
            raise RequestOptionsError(_not(value, "horizon", limit))
        return cls(**value)


def read_options(custom_params: Any, config: VeriCacheConfig) -> RequestOptions:
    """The options in SGLang's ``custom_params``, the defaults where there are none.

    Raises:
        RequestOptionsError: see `RequestOptions.parse`.
    """
    if not isinstance(custom_params, Mapping) or KEY not in custom_params:
        return RequestOptions()
    return RequestOptions.parse(custom_params[KEY], config)


def check_room(
    options: RequestOptions, config: VeriCacheConfig, prompt_tokens: int, context_tokens: int
) -> None:
    """Refuse a ratio that keeps more of the prompt than a draft row holds.

    Rows are as wide as the server's own budget needs of its longest context.

    Raises:
        RequestOptionsError: with the largest ratio for this prompt.
    """
    if options.keep_ratio is None:
        return
    asked = Budget(options.keep_ratio, None).asked_rows(prompt_tokens)
    room = Budget.of(config).asked_rows(context_tokens)
    if asked > room:
        raise RequestOptionsError(
            f"{KEY}.keep_ratio is {options.keep_ratio}: of {prompt_tokens} tokens that keeps "
            f"{asked}, and this server's draft rows have room for {room}. Accepted for this prompt "
            f"is up to {room / prompt_tokens:.3f}; a larger --vericache-keep-ratio or "
            "--vericache-keep-tokens makes the rows wider."
        )


def options_of(req: Any, config: VeriCacheConfig) -> RequestOptions:
    """The options of SGLang's Req, checked by the tokenizer already.

    A front end that skips it must not stop the scheduler: what it lets through is decoded plainly.
    """
    try:
        return read_options(req.sampling_params.custom_params, config)
    except RequestOptionsError as error:
        logger.warning("Request %s is decoded without drafting: %s", req.rid, error)
        return RequestOptions(enabled=False)


def _is(kind: type, value: Any) -> bool:
    """Whether JSON's ``value`` is a number of this kind; true and false are none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (kind is float and isinstance(value, float))


def _not(value: Mapping[str, Any], key: str, accepted: str) -> str:
    return f"{KEY}.{key} is {_shown(value[key])}: accepted is {accepted}."


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
