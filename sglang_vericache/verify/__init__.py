"""One pass over the full KV that checks the drafted tokens."""
