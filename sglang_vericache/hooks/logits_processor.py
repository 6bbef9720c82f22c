"""Tokens instead of logits, a chunk of rows at a time."""

from __future__ import annotations

from sglang_vericache.hooks import Hook
from sglang_vericache.verify.token_picker import active_picker


def pick_tokens(
    original, processor, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs
):
    """In a draft or verify forward, choose tokens here and return no logits."""
    picker = active_picker()
    if picker is None:
        return original(
            processor, input_ids, hidden_states, lm_head, logits_metadata, *args, **kwargs
        )
    from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput

    if not isinstance(logits_metadata, LogitsMetadata):
        logits_metadata = LogitsMetadata.from_forward_batch(logits_metadata)
    if _is_product_alone(processor, lm_head):
        # SGLang would write them once more, as float32: their order is the same.
        def logits_of(rows):
            return processor._compute_lm_head(rows, lm_head)[:, : processor.vocab_size]

    else:

        def logits_of(rows):
            return processor._get_logits(rows, lm_head, logits_metadata)

    picker.pick(hidden_states, logits_of)
    return LogitsProcessorOutput(next_token_logits=None)


def _is_product_alone(processor, lm_head) -> bool:
    """Whether logits are the product with the head and nothing else: not scaled, capped, gathered,
    or of an adapter."""
    return not (
        processor.logit_scale is not None
        or processor.final_logit_softcapping
        or processor.do_tensor_parallel_all_gather
        or processor.do_tensor_parallel_all_gather_dp_attn
        or hasattr(lm_head, "set_lora")
    )


HOOKS = (
    Hook(
        "sglang.srt.layers.logits_processor.LogitsProcessor.forward",
        "around",
        pick_tokens,
        "a verify pass of 256 requests would hold gigabytes of logits at once",
        "0003-logits-row-chunks.patch",
        "sglang.srt.model_executor.forward_context.ForwardContext.logits_consumer",
    ),
)
