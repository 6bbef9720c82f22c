"""Measurements: ``python -m benchmarks.NAME`` from the checkout; rows land in results/."""

from sglang_vericache.import_path import leave_checkouts

# Here, because it must come before the imports of whichever module is run.
leave_checkouts()
