"""Measurements: ``python -m benchmarks.NAME`` from the checkout; rows land in results/."""
