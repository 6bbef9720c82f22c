"""Copying exact keys and values of accepted tokens into the tails."""

from sglang_vericache.kernels.commit_rows.reference import commit_rows

__all__ = ["commit_rows"]
