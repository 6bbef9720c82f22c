"""One-token decoding over the full KV, for whom drafting cannot serve."""
