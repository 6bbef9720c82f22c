"""The acceptance rule. Pure."""

from __future__ import annotations

import torch


def accept_longest_prefix(
    draft_tokens: torch.Tensor, draft_lengths: torch.Tensor, target_tokens: torch.Tensor
) -> torch.Tensor:
    """How many tokens a verification yields for each request.

    The full model's token at position i, ``target_tokens[:, i]``, continues the pending token
    and the first i drafted ones. A drafted token stands while it equals the full model's and all
    before it stood; the first that does not is replaced by the full model's, which is also what
    follows when all stand. So the yield is the accepted prefix plus one.

    Args:
        draft_tokens: ``[B, k]``.
        draft_lengths: ``[B]``, of the k columns how many were drafted; the rest is padding.
        target_tokens: ``[B, k + 1]``.

    Returns:
        ``[B]`` int64 in [1, k + 1]; the tokens are ``target_tokens[b, :yield]``.
    """
    column = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    stands = (draft_tokens == target_tokens[:, :-1]) & (column < draft_lengths[:, None])
    return stands.to(torch.int64).cumprod(dim=1).sum(dim=1) + 1
