"""Selecting the tokens of a span: scorers, budget and top-k. Pure torch, no SGLang."""
