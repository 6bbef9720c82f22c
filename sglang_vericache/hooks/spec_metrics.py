"""SGLang's own ``spec_*`` numbers of a response."""

from __future__ import annotations

from sglang_vericache.hooks import Hook
from sglang_vericache.metrics import DraftCounters


def refine_metrics(result, manager, meta_info, recv_obj, index) -> None:
    count_rounds_only(meta_info)


def count_rounds_only(meta_info) -> None:
    """SGLang takes all tokens for tokens of rounds, and every round for one of a full horizon.
    Its counts of rounds, accepted tokens and their histogram are right already: the output
    streamer sets them."""
    from sglang_vericache.output_streamer import RESPONSE_FIELD

    counters = DraftCounters.parse(meta_info.get(RESPONSE_FIELD) or {})
    if "spec_verify_ct" not in meta_info or not counters.rounds:
        return
    meta_info["spec_accept_length"] = counters.tokens_per_round
    meta_info["spec_num_proposed_drafts"] = counters.drafted
    meta_info["spec_accept_rate"] = counters.accepted / counters.drafted


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._calculate_spec_decoding_metrics",
        "after",
        refine_metrics,
        "tokens decoded plainly and short rounds distort the acceptance of a response",
        "0011-speculative-metrics-of-rounds.patch",
        "sglang.srt.speculative.spec_registry.CustomSpecAlgo.refine_request_metrics",
    ),
)
