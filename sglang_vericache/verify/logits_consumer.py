"""The token picker where SGLang's forward context has a place for it (patches/0003)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_forward_context,
    has_forward_context,
)
from sglang.srt.model_executor.model_runner import ModelRunner

from sglang_vericache.verify.token_picker import TokenPicker


class ConsumingTokenPicker(TokenPicker):
    """Takes the logits of a forward from SGLang's own logits processor, a chunk at a time."""

    def __init__(self, chunk_rows: int, model_runner: ModelRunner) -> None:
        super().__init__(chunk_rows)
        self.model_runner = model_runner

    def consume(self, logits: torch.Tensor) -> torch.Tensor:
        tokens = self.choose(logits)
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens])
        return tokens

    @contextmanager
    def active(self) -> Iterator[ConsumingTokenPicker]:
        if has_forward_context():
            context = get_forward_context()
        else:
            context = ForwardContext(attn_backend=self.model_runner.attn_backend)
        self.tokens = None
        with forward_context(replace(context, logits_consumer=self)):
            yield self


def create_picker(chunk_rows: int, model_runner: ModelRunner) -> TokenPicker:
    if hasattr(ForwardContext, "logits_consumer"):
        return ConsumingTokenPicker(chunk_rows, model_runner)
    return TokenPicker(chunk_rows)
