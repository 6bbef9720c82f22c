"""What picks a token from logits, in draft and verify forwards alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sglang_vericache.kernels.row_argmax import row_argmax

# SGLang runs forwards on one thread per process (model_executor/forward_context.py), and its
# logits processor is a module deep inside the model: a forward finds its picker here.
_active: TokenPicker | None = None


class TokenPicker:
    """Greedy choice over rows of logits that exist only a chunk at a time.

    Args:
        chunk_rows: rows of ``[rows, vocab]`` logits computed at once.
    """

    def __init__(self, chunk_rows: int) -> None:
        self.chunk_rows = chunk_rows
        self.tokens: torch.Tensor | None = None

    def pick(
        self, hidden_states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Set ``tokens`` ``[N]`` for ``hidden_states`` ``[N, hidden]``."""
        chunks = hidden_states.split(self.chunk_rows)
        tokens = [self.choose(logits_of(chunk)) for chunk in chunks]
        self.tokens = torch.cat(tokens) if len(tokens) > 1 else tokens[0]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """``[rows, vocab]`` logits to ``[rows]`` tokens."""
        return row_argmax(logits)

    @contextmanager
    def active(self) -> Iterator[TokenPicker]:
        """Let the forward inside pick tokens instead of returning logits."""
        global _active
        previous, _active = _active, self
        self.tokens = None
        try:
            yield self
        finally:
            _active = previous


def active_picker() -> TokenPicker | None:
    return _active
