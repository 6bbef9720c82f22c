"""Attention of a few query tokens over the draft view."""

from sglang_vericache.kernels.draft_attention.reference import draft_attention

__all__ = ["draft_attention"]
