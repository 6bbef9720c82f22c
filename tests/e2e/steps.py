"""What a program's author sees of each request, whichever API it went through."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cases import DRAFTS

from sglang_vericache.metrics import DraftCounters

# Log-probabilities of prefills that are cut differently; the tokens must be equal.
LOGPROB_TOLERANCE = 1e-3
# What /generate tells that has to be the same; the rest are ids, times and our own record.
META = (
    *("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("input_token_logprobs", "output_token_logprobs", "input_top_logprobs"),
    *("output_top_logprobs", "input_token_ids_logprobs", "output_token_ids_logprobs"),
)


@dataclass(frozen=True)
class Step:
    """One request of a program.

    Attributes:
        name: unique in its program.
        answer: everything in the reply that must not depend on the flag.
        cached_tokens: prompt tokens that the radix cache held; None where the API does not tell.
        expect: DRAFTS, or the reasons for which its tokens may be decoded plainly.
        counters: our server's record; None from an unmodified one.
    """

    name: str
    answer: Any
    cached_tokens: int | None
    expect: str
    counters: DraftCounters | None


def of_generate(name: str, reply: dict[str, Any], expect: str = DRAFTS) -> Step:
    """A reply of /generate."""
    answer = {key: reply["meta_info"][key] for key in META if key in reply["meta_info"]}
    answer |= {"text": reply["text"], "output_ids": reply.get("output_ids")}
    return of_meta(name, answer, reply["meta_info"], expect)


def of_meta(name: str, answer: Any, meta: dict[str, Any], expect: str = DRAFTS) -> Step:
    """Something that came with SGLang's ``meta_info``."""
    return Step(name, answer, meta["cached_tokens"], expect, _counters(meta.get("vericache")))


def of_openai(name: str, answer: Any, reply: Any, expect: str = DRAFTS) -> Step:
    """A reply of the openai client, or the last chunk of a stream."""
    usage = reply.usage
    counts = (usage.prompt_tokens, usage.completion_tokens)
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    record = (getattr(reply, "sglext", None) or {}).get("vericache")
    return Step(name, (answer, counts), cached, expect, _counters(record))


def _counters(record: Any) -> DraftCounters | None:
    """Of one request, or the sum over the choices of one."""
    if record is None:
        return None
    total = DraftCounters()
    for part in record if isinstance(record, list) else [record]:
        total.add(DraftCounters.parse(part))
    return total


def differences(expected: Any, got: Any, where: str = "") -> Iterable[str]:
    """Paths at which two answers differ, with both values."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted(expected.keys() | got.keys()):
            yield from differences(expected.get(key), got.get(key), f"{where}.{key}")
    elif isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        if len(expected) != len(got):
            yield f"{where}: {len(expected)} entries became {len(got)}: {expected} {got}"
        for i, pair in enumerate(zip(expected, got, strict=False)):
            yield from differences(*pair, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(got, float):
        if not math.isclose(expected, got, rel_tol=0, abs_tol=LOGPROB_TOLERANCE):
            yield f"{where}: {expected} became {got}"
    elif expected != got:
        yield f"{where}: {expected!r} became {got!r}"
