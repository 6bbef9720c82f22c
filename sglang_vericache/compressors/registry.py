"""Names of scorers -> scorers.

A new scorer is one file in scorers/ and its class in SCORERS. Its tests are one file with its
formula, a comparison in tests/unit/test_against_kvpress.py where kvpress has the method, and
tests/unit/test_scorer_properties.py, which takes it from SCORERS.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from sglang_vericache.compressors.base import Scorer
from sglang_vericache.compressors.scorers.expected_attention import ExpectedAttention
from sglang_vericache.compressors.scorers.keydiff import KeyDiff
from sglang_vericache.compressors.scorers.knorm import Knorm
from sglang_vericache.compressors.scorers.snapkv import SnapKV
from sglang_vericache.compressors.scorers.streamingllm import StreamingLLM
from sglang_vericache.config import CompressorSpec, VeriCacheConfigError

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer for scorer in (SnapKV, ExpectedAttention, KeyDiff, Knorm, StreamingLLM)
}


def create_scorer(spec: CompressorSpec) -> Scorer:
    """The scorer that ``spec`` names, with its parameters.

    Raises:
        VeriCacheConfigError: unknown name or parameter, or a value it does not accept.
    """
    flag = f"--vericache-compressor {spec}"
    kind = SCORERS.get(spec.name)
    if kind is None:
        raise VeriCacheConfigError(
            f"{flag}: no compressor is called {spec.name!r}. Known: {', '.join(SCORERS)}."
        )
    parameters = {f.name: f for f in fields(cast(Any, kind))}  # every scorer is a dataclass
    values = {}
    for key, text in spec.params.items():
        if key not in parameters:
            known = ", ".join(f"{name} (default {f.default})" for name, f in parameters.items())
            raise VeriCacheConfigError(
                f"{flag}: {spec.name} has no parameter {key!r}. "
                f"Known: {known or 'none, it takes no parameters'}."
            )
        number: Any = type(parameters[key].default)
        try:
            values[key] = number(text)
        except ValueError:
            raise VeriCacheConfigError(
                f"{flag}: {key}={text} is not {'a whole number' if number is int else 'a number'}."
            ) from None
    try:
        return kind(**values)
    except ValueError as error:
        raise VeriCacheConfigError(f"{flag}: {error}.") from None
