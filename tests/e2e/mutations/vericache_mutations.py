"""An SGLang plugin that breaks ours on purpose, one way at a time.

The file named by VERICACHE_MUTATION holds the name of the mutation, read at each use, so that
one server shows them all.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

NAMES = ("none", "random draft kv", "nan draft kv", "accept all", "yield one more")


def activate() -> None:
    """Loaded in every process; only a scheduler that uses our flag runs our worker."""
    if not os.environ.get("_SGLANG_VERICACHE_ARMED"):
        return
    from sglang_vericache.kernels.pool_format import PoolStorage
    from sglang_vericache.verify import verifier

    file = Path(os.environ["VERICACHE_MUTATION"])
    read, accept = PoolStorage.read, verifier.accept_longest_prefix

    def mutated_read(storage, layer, slots):
        keys, values = read(storage, layer, slots)
        name = file.read_text()
        if name == "random draft kv":
            return torch.randn_like(keys), torch.randn_like(values)
        if name == "nan draft kv":
            return torch.full_like(keys, float("nan")), torch.full_like(values, float("nan"))
        return keys, values

    def mutated_accept(draft_tokens, draft_lengths, target_tokens):
        yields = accept(draft_tokens, draft_lengths, target_tokens)
        name = file.read_text()
        if name == "accept all":
            return draft_lengths + 1
        if name == "yield one more":
            return torch.minimum(yields + 1, draft_lengths + 1)
        return yields

    PoolStorage.read = mutated_read
    verifier.accept_longest_prefix = mutated_accept
