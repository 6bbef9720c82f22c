"""Whether a verification reads shared prefixes once, for all requests below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_vericache.rounds.request_state import RequestState
from sglang_vericache.tree.view_plan import PathNode
from sglang_vericache.verify.cascade_groups import NodeEnd, PrefixGroup, group_by_prefix

# Bytes of a layer's KV that must not need to be read again. Such a pass is not captured: launching
# a layer, some fifteen kernels, takes the host about as long as a device reads so much.
LEAST_SAVED_BYTES = 256 << 20

Work = Sequence[tuple[int, int]]


class Cascade:
    """Finds the groups, when those who verify have changed.

    Args:
        path_of: a request's nodes of the radix tree.
        token_bytes: of KV, in one layer.
        enabled: else there are no groups.

    Attributes:
        passes, saved_tokens: verifications with groups, and context that these did not read again.
    """

    def __init__(
        self,
        path_of: Callable[[Any], Sequence[PathNode]],
        token_bytes: int,
        enabled: bool = True,
        least_saved_bytes: int = LEAST_SAVED_BYTES,
    ) -> None:
        self._path_of, self.enabled = path_of, enabled
        self._least_tokens = max(least_saved_bytes // token_bytes, 1)
        self._paths: dict[RequestState, tuple[NodeEnd, ...]] = {}
        self._states: list[RequestState] = []
        self._groups: list[PrefixGroup] = []
        self.passes = self.saved_tokens = 0

    def arrange(
        self, work: Work, reqs: Sequence[Any], states: Sequence[RequestState]
    ) -> tuple[Work, Sequence[tuple[int, int]]]:
        """What a batch verifies, (place, drafted tokens), with the members of each group beside
        each other and those of none at the end; and (requests, shared tokens) of the groups."""
        if not self.enabled or not work:
            return work, ()
        places = [place for place, _ in work]
        found = self.groups([reqs[i] for i in places], [states[i] for i in places])
        return ordered(work, found)

    def groups(self, reqs: Sequence[Any], states: Sequence[RequestState]) -> list[PrefixGroup]:
        """Of the requests of a verification, whose contexts are in the tree; empty when reading
        together would not pay."""
        if len(states) < 2:
            return []
        same = len(states) == len(self._states) and all(
            one is other for one, other in zip(states, self._states, strict=True)
        )
        if not same:
            self._states = list(states)
            self._groups = self._find(reqs, states)
        return self._groups

    def count(self, groups: Sequence[tuple[int, int]]) -> None:
        """A verification reads these, (requests, shared tokens), together."""
        self.passes += bool(groups)
        self.saved_tokens += sum((members - 1) * tokens for members, tokens in groups)

    def describe(self) -> dict[str, int]:
        """For the info endpoint."""
        return {"passes": self.passes, "saved_tokens": self.saved_tokens}

    def _find(self, reqs: Sequence[Any], states: Sequence[RequestState]) -> list[PrefixGroup]:
        known, branches = self._paths, False
        self._paths = {state: known[state] for state in states if state in known}
        for req, state in zip(reqs, states, strict=True):
            if state not in known:
                path = self._path_of(req)
                self._paths[state] = _ends(path)
                branches |= any(node.children > 1 for node in path)
        if branches:  # nodes of the others may have been split where a new one leaves them
            self._paths = {
                state: _ends(self._path_of(req)) for req, state in zip(reqs, states, strict=True)
            }
        found = group_by_prefix([self._paths[state] for state in states])
        return found if sum(g.saved_tokens for g in found) >= self._least_tokens else []


def _ends(path: Sequence[PathNode]) -> tuple[NodeEnd, ...]:
    return tuple((node.node_id, node.end) for node in path)


def ordered(work: Work, groups: Sequence[PrefixGroup]) -> tuple[Work, Sequence[tuple[int, int]]]:
    """As `Cascade.arrange`; groups of places in ``work``."""
    inside = {place for group in groups for place in group.members}
    order = [place for group in groups for place in group.members]
    order += [place for place in range(len(work)) if place not in inside]
    sizes = [(len(group.members), group.tokens) for group in groups]
    return [work[place] for place in order], sizes
