"""What the worker tells the info endpoint."""

from __future__ import annotations

from typing import Any

from sglang_vericache.plugin import applied_hooks


def status_of(worker: Any) -> dict[str, Any]:
    """Plain values; more of them once a batch has come."""
    allocator = worker.pool.allocator
    status = {
        "drafting": worker.drafting,
        "config": worker.config.describe(),
        "draft_pool": {
            "tokens": allocator.total,
            "used_tokens": allocator.used,
            "bytes": worker.pool.storage.row_bytes * allocator.total,
            "format": worker.pool.storage.format.name,
        },
        "phase_seconds": dict(worker.phases.seconds),
        "horizons": worker.pace.describe(),
        "rounds_in_parts": worker.pace.rounds_in_parts,
        "plain_together": worker.pace.plain_together,
        "rounds_ahead": worker.planner.rounds_ahead,
        "cached_prefills": worker.cached_prompts.passes,
        "admission": {"together": worker.admission.together, "held": worker.admission.held},
        "verify_attention": worker.verifier.attention,
        "hooks": applied_hooks(),
    }
    if worker.requests is None:
        return status
    total = worker.requests.total
    return status | {
        "spans": worker.tree_cache.spans.describe(),
        "offload": vars(worker.rotation.numbers()),
        "cascade": worker.cascade.describe(),
        "requests": len(worker.requests),
        "totals": total.describe(worker.row_bytes)
        | {"draft_rows_limit_exceeded": total.draft_rows_limit_exceeded},
    }
