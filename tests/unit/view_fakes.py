"""A main pool of random numbers and a ViewBuilder over it, for the tests of draft views.

The first component of a key is a main slot in disguise, so that each row of a view can be traced
back to the token it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_vericache.compressors.base import Granularity, Need, Scope, ScoreInputs, Scorer
from sglang_vericache.compressors.budget import Budget
from sglang_vericache.compressors.rotary import Rotary
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.pool_format import DenseFormat
from sglang_vericache.metrics import SpanCounters
from sglang_vericache.pool.draft_pool import DraftPool
from sglang_vericache.pool.rows import DraftRows
from sglang_vericache.tree.full_kv import FullKV
from sglang_vericache.tree.span_table import SpanTable
from sglang_vericache.tree.view import DraftView
from sglang_vericache.tree.view_builder import ViewBuilder
from sglang_vericache.tree.view_plan import PathNode, SpanInfo

LAYERS, HEADS, DIM = 2, 2, 8
ROWS, LONGEST = 5, 1200
SINKS, RECENT = 4, 64
# Paths are short here, and most tests are about what the ratio leaves out.
SETTINGS = {"horizon": 4, "fold_tail_tokens": 200, "keep_min_tokens": 0}


@dataclass(frozen=True)
class FirstValue(Scorer):
    """Scores a token by the first component of its value: easy to predict, hard to get by luck."""

    name: ClassVar[str] = "first-value"
    paper: ClassVar[str] = "none"
    scope: ClassVar[Scope] = "node"
    needs: ClassVar[frozenset[Need]] = frozenset({"values"})
    granularity: ClassVar[Granularity] = "head_even"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return inputs.values[..., 0].mT.float()


class World:
    """A builder with everything around it. Rows of the main pool are paths of LONGEST tokens."""

    def __init__(
        self,
        slots: int = 2000,
        scorer: Scorer | None = None,
        rotary: Rotary | None = None,
        **settings,
    ) -> None:
        self.config = VeriCacheConfig(**(SETTINGS | settings))
        self.main_slots = main_slots = ROWS * LONGEST + 1
        keys, values = torch.randn(2, LAYERS, main_slots, HEADS, DIM)
        keys[..., 0] = (torch.arange(main_slots) / main_slots)[:, None]
        table = torch.randperm(main_slots - 1)[: ROWS * LONGEST].view(ROWS, LONGEST) + 1
        self.full = FullKV(
            list(keys),
            list(values),
            table.to(torch.int32),
            DIM**-0.5,
            [rotary] * LAYERS if rotary is not None else None,
        )
        self.pool = DraftPool(DenseFormat(torch.float32), LAYERS, slots, HEADS, DIM, "cpu")
        width = Budget.of(self.config).folded_limit_rows(LONGEST) + self.config.tail_capacity
        self.rows = DraftRows(ROWS, width, "cpu")
        self.spans = SpanTable(SpanCounters())
        self.views = ViewBuilder(
            self.config, scorer or FirstValue(), self.pool, self.rows, self.spans, self.full
        )

    @property
    def counters(self) -> SpanCounters:
        return self.spans.counters

    @property
    def used(self) -> int:
        return self.pool.allocator.used

    def share(self, row: int, other: int, tokens: int) -> None:
        """Let ``row`` have the first tokens of ``other``, as a common prefix in the tree does."""
        self.full.row_table[row, :tokens] = self.full.row_table[other, :tokens]

    def node(self, node_id: int, start: int, end: int, children: int = 1) -> PathNode:
        """A node of a path with the span that the table has for it, as tree.cache gives it."""
        span = self.spans.get(node_id)
        info = span and SpanInfo(span.start, span.rows, span.scope, span.budget)
        return PathNode(node_id, start, end, children, info)

    def open(self, row: int, end: int, path=(), computed=None, budget=None) -> DraftView | None:
        return self.views.open(row, path, end, computed, budget)

    def commit(self, view: DraftView, start: int, end: int) -> None:
        """Tokens [start, end) of the view's path become its tail, as after a verify pass."""
        assert self.views.reserve(view, view.length(end))
        targets = self.rows.table[view.row, view.length(start) : view.length(end)].long()
        source = self.full.slots(view.row, start, end)
        commit_rows(self.full.keys, self.full.values, source, self.pool.storage, targets)

    def held(self, views: list[DraftView]) -> int:
        """Slots of all spans and tails, after checking that no slot is in two places."""
        spans = {id(s): s for view in views for s in view.spans}
        spans |= {id(s): s for s in map(self.spans.get, self.spans.owners())}
        slots = [span.slots for span in spans.values()]
        for view in views:
            slots += view.tail
            row = self.rows.table[view.row, : view.capacity].long()
            held = torch.cat([*(span.slots for span in view.spans), *view.tail])
            assert torch.equal(row, held), "the row does not say what the view holds"
        every = torch.cat([torch.empty(0, dtype=torch.int64), *slots]).tolist()
        assert len(set(every)) == len(every), "a slot is in two places"
        assert 0 not in every, "the padding slot was handed out"
        for span in spans.values():
            holders = sum(span in view.spans for view in views)
            holders += sum(self.spans.get(node) is span for node in self.spans.owners())
            assert span.references == holders, "a reference is missing or too many"
        return len(every)

    def tokens_of(self, view: DraftView, committed: int) -> list[list[list[int]]]:
        """Per layer and head the path positions that the view's rows hold, in row order, after
        checking that each holds the very key and value of that position."""
        slots = self.rows.table[view.row, : view.length(committed)].long()
        position_of = torch.full((self.main_slots,), -1)
        position_of[self.full.slots(view.row, 0, committed)] = torch.arange(committed)
        heads = torch.arange(HEADS)
        found = []
        for layer in range(LAYERS):
            keys, values = self.pool.storage.read(layer, slots)
            main = (keys[:, :, 0].abs() * self.main_slots).round().long()  # [rows, H]
            assert torch.equal(keys, self.full.keys[layer][main, heads]), "not a token's key"
            assert torch.equal(values, self.full.values[layer][main, heads]), "another's value"
            positions = position_of[main]
            assert (positions >= 0).all(), "a token of another path"
            found.append(positions.T.tolist())
        return found

    def best(
        self, row: int, layer: int, head: int, start: int, end: int, rows: int, path_end: int
    ) -> list[int]:
        """What FirstValue keeps of [start, end): the forced tokens, then the highest values."""
        slots = self.full.slots(row, start, end)
        value = self.full.values[layer][slots, head, 0].tolist()

        def rank(position: int):
            forced = position < SINKS or position >= path_end - RECENT
            return (not forced, -value[position - start])

        return sorted(sorted(range(start, end), key=rank)[:rows])


def each_head(tokens: list[list[list[int]]]):
    """(layer, head, positions) of `World.tokens_of`."""
    for layer, heads in enumerate(tokens):
        for head, positions in enumerate(heads):
            yield layer, head, positions
