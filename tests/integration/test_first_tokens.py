"""When first tokens are sent: by our hook, or by SGLang itself where it is patched."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import cpu_engine
import pytest

cpu_engine.required()

from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from sglang_vericache.hooks import first_tokens  # noqa: E402

PATCHED = hasattr(Scheduler, "FIRST_TOKEN_SYNC_MAX_BS")
EXTEND, DECODE = ForwardMode.EXTEND, ForwardMode.DECODE


def batch_of(mode: ForwardMode | None, requests: int = 1, grammar: bool = False):
    if mode is None:
        return None
    return SimpleNamespace(
        forward_mode=mode,
        reqs=[object()] * requests,
        is_extend_in_batch=mode.is_extend(),
        spec_algorithm=SimpleNamespace(is_none=lambda: False),
        grammar_needs_sync=lambda: grammar,
    )


def is_processed_first(mode, last, requests=1, waiting=1, data_parallel=False, grammar=False):
    """Whether the last batch's result is looked at before a batch of that kind is launched."""
    scheduler = SimpleNamespace(
        require_mlp_sync=data_parallel, result_queue=[None] * waiting, FIRST_TOKEN_SYNC_MAX_BS=2
    )
    batch, last_batch = batch_of(mode, requests, grammar), batch_of(last)
    if PATCHED:
        return bool(Scheduler.is_disable_overlap_for_batch(scheduler, batch, last_batch))
    # Another file of this process may have applied the hooks.
    original = inspect.unwrap(Scheduler.is_disable_overlap_for_batch)
    answer = first_tokens.is_disable_overlap_for_batch(original, scheduler, batch, last_batch)
    assert isinstance(answer, bool)
    return answer


@pytest.mark.parametrize(
    ("mode", "last", "more", "first"),
    [
        pytest.param(DECODE, EXTEND, {}, True, id="lone"),
        pytest.param(DECODE, EXTEND, {"requests": 2}, True, id="two"),
        pytest.param(DECODE, EXTEND, {"requests": 3}, False, id="several"),
        pytest.param(DECODE, DECODE, {}, False, id="later-steps"),
        pytest.param(EXTEND, EXTEND, {}, False, id="prefill-after-prefill"),
        pytest.param(EXTEND, DECODE, {}, False, id="prefill"),
        pytest.param(None, EXTEND, {}, False, id="nothing-to-run"),
        pytest.param(DECODE, None, {}, False, id="nothing-ran"),
        pytest.param(DECODE, EXTEND, {"waiting": 0}, False, id="no-result"),
        pytest.param(DECODE, EXTEND, {"data_parallel": True}, False, id="ranks-in-step"),
        pytest.param(DECODE, EXTEND, {"requests": 9, "grammar": True}, True, id="grammar"),
    ],
)
def test_which_results_are_processed_first(mode, last, more, first):
    """Catches a lone request whose first token waits for a step that drafts, and a device that
    waits for the host with every prefill of many."""
    assert is_processed_first(mode, last, **more) == first
