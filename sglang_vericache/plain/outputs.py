"""Log-probabilities and hidden states of plain requests -> the layout of a speculative result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput


def spread_output(
    output: LogitsProcessorOutput,
    index: torch.Tensor,
    indices: Sequence[int],
    batch_size: int,
    stride: int,
) -> LogitsProcessorOutput:
    """The whole batch's output with the plain requests' values in their places.

    SGLang's result processor reads a speculative step's values with ``stride`` rows a request;
    a plain request fills the first.

    Args:
        output: rows of the plain requests, in the order of ``indices``.
        index: ``indices`` as an int64 tensor on the device.
    """
    spread = LogitsProcessorOutput(next_token_logits=None)
    if output.next_token_logprobs is not None:
        logprobs = output.next_token_logprobs.view(-1, 1)
        spread.next_token_logprobs = logprobs.new_zeros(batch_size, 1)
        spread.next_token_logprobs[index] = logprobs
    # The result processor calls tolist() on all of these but the ids the user asked for.
    for name, absent in (
        ("next_token_top_logprobs_val", torch.empty(0)),
        ("next_token_top_logprobs_idx", torch.empty(0)),
        ("next_token_token_ids_logprobs_val", torch.empty(0)),
        ("next_token_token_ids_logprobs_idx", []),
    ):
        values = getattr(output, name)
        if values:
            placed: list[Any] = [absent] * batch_size
            for i, value in zip(indices, values, strict=True):
                placed[i] = value
            setattr(spread, name, placed)
    if output.hidden_states is not None:
        hidden = output.hidden_states
        spread.hidden_states = hidden.new_zeros(batch_size * stride, hidden.shape[-1])
        spread.hidden_states[index * stride] = hidden
    return spread
