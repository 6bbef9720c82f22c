"""Requests of the identity suite as data: the same calls go to both servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a call expects of our server: that it drafts, that nothing is said, or a recorded reason.
DRAFTS, ANYTHING = "drafts", "anything"


@dataclass(frozen=True)
class Call:
    """One /generate request, greedy unless ``params`` say otherwise.

    Attributes:
        name: unique over the suite.
        prompt: token ids.
        params: sampling parameters beside max_new_tokens and temperature.
        options: other fields of the request body.
        expect: DRAFTS, ANYTHING, or the reason for which its tokens are decoded plainly.
        compared: whether the output must equal the reference's.
    """

    name: str
    prompt: Sequence[int]
    max_new_tokens: int
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    expect: str = DRAFTS
    compared: bool = True

    def body(self) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": self.max_new_tokens, **self.params}
        return {"input_ids": list(self.prompt), "sampling_params": sampling, **self.options}


@dataclass(frozen=True)
class Phase:
    """Calls that run together, ``concurrency`` at a time, optionally on an empty cache.

    Attributes:
        companion: a call whose first token is awaited before ``calls`` start beside it.
    """

    name: str
    calls: Sequence[Call]
    concurrency: int = 1
    flush_before: bool = False
    companion: Call | None = None

    @property
    def all_calls(self) -> list[Call]:
        return [*([self.companion] if self.companion else []), *self.calls]


@dataclass
class Answer:
    """What came back.

    Attributes:
        gaps: reference only: difference of the two best log-probabilities at each token.
        info: ``meta_info["vericache"]`` of our server.
        chunks: of a streamed answer, the new tokens in each.
    """

    name: str
    ids: list[int]
    text: str
    finish: Any
    prompt_tokens: int
    cached_tokens: int
    gaps: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    info: dict[str, Any] | None = None
    chunks: list[int] = field(default_factory=list)


Answers = dict[str, Answer]
