"""When a grammar advances.

SGLang without speculation decides whether a request is finished and then lets its grammar accept
the token; with speculation it is the other way round, so that a request ends one token earlier
when its grammar terminates and the end-of-text token does not end it (ignore_eos). Requests with
a grammar are decoded plainly here, so they follow the plain order.
"""

from __future__ import annotations

from sglang_vericache.flags import ALGORITHM
from sglang_vericache.hooks import Hook

PATCH = "0008-grammar-order.patch"
ADDED = "sglang.srt.speculative.spec_registry.CustomSpecAlgo.advances_grammar_after_finish"


def _ours(batch) -> bool:
    return getattr(batch.spec_algorithm, "name", None) == ALGORITHM


def advance_grammar_fsm(original, processor, result, batch) -> None:
    """Hand the decoded tokens on without advancing; `accept_after_finish` does that."""
    decoded = batch.has_grammar and batch.forward_mode.is_decode()
    if not (_ours(batch) and decoded) or result.grammar_advanced:
        return original(processor, result, batch)
    tokens, yields = result.next_token_ids.tolist(), result.accept_lens.tolist()
    stride = result.speculative_num_draft_tokens
    result.grammar_retained_tokens = [
        tokens[i * stride : i * stride + count] for i, count in enumerate(yields)
    ]
    result.grammar_advanced = True


def accept_after_finish(processor, req, batch, result, i, logits_output) -> None:
    if _ours(batch) and req.grammar is not None and result.grammar_retained_tokens is not None:
        processor._accept_grammar_tokens(req, result.grammar_retained_tokens[i])


_PROCESSOR = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
)
HOOKS = (
    Hook(
        f"{_PROCESSOR}.advance_grammar_fsm",
        "around",
        advance_grammar_fsm,
        "a speculative step advances grammars before it looks for the end of a request",
        PATCH,
        ADDED,
    ),
    Hook(
        f"{_PROCESSOR}._handle_finish_state_updated_req",
        "before",
        accept_after_finish,
        "a speculative step advances grammars before it looks for the end of a request",
        PATCH,
        ADDED,
    ),
)
