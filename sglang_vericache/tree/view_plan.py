"""Which spans of a path to reuse and which to build. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_vericache.compressors.base import Scope
from sglang_vericache.compressors.budget import Budget
from sglang_vericache.config import RECENT_TOKENS, SINK_TOKENS

# A selection over the whole path drafts longer than one in parts (25 to 50 % when the parts are
# 1,024 tokens each), so an earlier span must cover most of the path before it is worth more than
# a fresh one. A span that depends on its path's last queries ages faster than one that does not.
REUSE_SHARE: dict[Scope, float] = {"node": 0.5, "path": 0.75}


@dataclass(frozen=True)
class SpanInfo:
    """A span that some node of the path owns: it covers [start, end of the node)."""

    start: int
    rows: int
    scope: Scope
    budget: Budget


@dataclass(frozen=True)
class PathNode:
    """One node of a radix path.

    Attributes:
        start, end: half-open interval of the path, in tokens from the root.
        children: how many nodes continue after it.
    """

    node_id: int
    start: int
    end: int
    children: int
    span: SpanInfo | None = None


@dataclass(frozen=True)
class Build:
    """A span to select: ``rows`` tokens of [start, end), for ``node_id`` when one ends there."""

    start: int
    end: int
    rows: int
    node_id: int | None


@dataclass(frozen=True)
class ViewPlan:
    """Spans of a draft view in path order: the reused ones, then the built ones.

    Attributes:
        budget: the most generous of the request's own and those of the reused spans; what is
            built is built within it.
    """

    reused: tuple[PathNode, ...]
    builds: tuple[Build, ...]
    budget: Budget


def plan_view(path: Sequence[PathNode], end: int, budget: Budget, scope: Scope) -> ViewPlan:
    """Plan spans that cover [0, end) within one budget over the path.

    The deepest chain of spans is reused when each was selected within a budget that keeps at
    least as much as ``budget``, and they cover at least REUSE_SHARE of the path and stay, with
    what is added, within the row limit of the most generous of these budgets. Otherwise all is
    selected anew: in one span, or, where the path leaves a prefix that other requests share (a
    node with several children) and that prefix is at least REUSE_SHARE of it, in two, so that the
    others reuse the first.

    Args:
        path: nodes from the root; may end before ``end`` (tokens not in the tree yet).
        end: tokens that the view must cover.
        budget: of the request.
        scope: of the scorer that would build; says whether a fork is worth a span of its own.
    """
    for depth in range(len(path), 0, -1):
        chain = _chain(path[:depth])
        if chain is None or chain[-1].end > end:
            continue
        spans = [node.span for node in chain if node.span is not None]
        if not all(span.budget.keeps_at_least(budget, end) for span in spans):
            continue
        widest = max((span.budget for span in spans), key=lambda b: b.asked_rows(end))
        covered, rows = chain[-1].end, sum(span.rows for span in spans)
        share = max(REUSE_SHARE[span.scope] for span in spans)
        builds = _build_after(path, covered, end, widest)
        rows += sum(build.rows for build in builds)
        if covered >= share * end and rows <= widest.limit_rows(end):
            return ViewPlan(chain, builds, widest)
    fork = _fork(path, end, scope)
    if fork is None:
        whole = Build(0, end, budget.path_rows(end), _owner(path, end))
        return ViewPlan((), (whole,), budget)
    # Tokens of the shared part that are always kept: the sinks, and where the fork is close to
    # the end, some of the recent ones.
    forced = SINK_TOKENS + max(0, fork.end - max(0, end - RECENT_TOKENS))
    rows = min(fork.end, max(budget.share_rows(fork.end, end), forced))
    shared = Build(0, fork.end, rows, fork.node_id)
    return ViewPlan((), (shared, *_build_after(path, fork.end, end, budget)), budget)


def _chain(path: Sequence[PathNode]) -> tuple[PathNode, ...] | None:
    """Spans without a gap from the root to the end of the last node, or None."""
    chain: list[PathNode] = []
    wanted_end = path[-1].end
    for node in reversed(path):
        if node.end == wanted_end and node.span is not None:
            chain.append(node)
            wanted_end = node.span.start
    return tuple(reversed(chain)) if chain and wanted_end == 0 else None


def _build_after(
    path: Sequence[PathNode], start: int, end: int, budget: Budget
) -> tuple[Build, ...]:
    """The span that ends a path, if it has tokens: its share, and at least the recent tokens."""
    if start == end:
        return ()
    rows = max(budget.share_rows(end - start, end), min(end - start, RECENT_TOKENS))
    return (Build(start, end, rows, _owner(path, end)),)


def _fork(path: Sequence[PathNode], end: int, scope: Scope) -> PathNode | None:
    shared = [node for node in path if node.children > 1 and node.end < end]
    deepest = shared[-1] if shared else None
    return deepest if deepest is not None and deepest.end >= REUSE_SHARE[scope] * end else None


def _owner(path: Sequence[PathNode], end: int) -> int | None:
    return path[-1].node_id if path and path[-1].end == end else None
