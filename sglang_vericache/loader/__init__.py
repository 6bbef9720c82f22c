"""The loader thread: copies full KV from the host to the device, and does nothing else."""
