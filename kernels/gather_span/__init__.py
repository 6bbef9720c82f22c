"""Collecting the selected tokens of each head into slots of the draft pool."""

from sglang_vericache.kernels.gather_span.reference import gather_span, regather_span

__all__ = ["gather_span", "regather_span"]
