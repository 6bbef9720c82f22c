"""Prefills that only score: no token is wanted after them."""

from __future__ import annotations

from http import HTTPStatus

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

_REFUSAL = (
    "score_extraction_token is not accepted with --enable-vericache: leave it out, or ask a server "
    "without the flag."
)


def mark_scoring(batch: ScheduleBatch) -> None:
    """Let SGLang skip the sampler where every request of a prefill asks for 0 tokens.

    SGLang does so only without speculation. With it, a token is sampled that nobody asked for, and
    its log-probability is in the answer (``Req.is_prefill_only``).

    Scores at chosen positions depend on the same switch outside of a worker's reach: such a
    request is answered with an error, because it would get the scores of all positions.
    """
    for req in batch.reqs:
        if req.token_indices_to_pool is not None:
            req.to_finish = FINISH_ABORT(_REFUSAL, HTTPStatus.BAD_REQUEST, "BadRequestError")
    batch.is_prefill_only = all(_only_scores(req) for req in batch.reqs)


def _only_scores(req: Req) -> bool:
    return req.sampling_params.max_new_tokens == 0 and req.token_indices_to_pool is None
