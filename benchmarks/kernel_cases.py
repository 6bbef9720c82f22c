"""What `benchmarks.kernels` times: pools of real size and the operations on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sglang_vericache.kernels.append_rows import append_rows
from sglang_vericache.kernels.commit_rows import commit_rows
from sglang_vericache.kernels.draft_attention.triton import append_and_attend, draft_attention
from sglang_vericache.kernels.draft_attention.workspace import Workspace
from sglang_vericache.kernels.gather_span import gather_span, regather_span
from sglang_vericache.kernels.layer_buffers import LayerBuffers
from sglang_vericache.kernels.pool_format import PoolFormat, PoolStorage
from sglang_vericache.kernels.row_argmax import row_argmax
from sglang_vericache.kernels.score_window import score_window

MODEL_DTYPE = torch.bfloat16
# A layer's rows alone exceed any L2 cache; a few layers in turn leave nothing of each other.
LAYERS = 4
# Slots come from a pool that has run for a while in runs of the blocks that tails are taken in.
RUN_OF_SLOTS = 32
COMMITTED_TOKENS = 8  # a request, at a verification
WINDOW = 64
KEPT = 0.2  # of a context, at span building


@dataclass(frozen=True)
class Shape:
    """A model's attention and a batch of it.

    Attributes:
        rows: of each draft view.
        context: tokens of the path that spans are built from.
        vocabulary: logits of a request.
    """

    name: str
    query_heads: int
    heads: int
    dim: int
    requests: int
    rows: int
    context: int
    vocabulary: int


SHAPES = (
    Shape("135M", 9, 3, 64, requests=256, rows=1700, context=8192, vocabulary=49152),
    Shape("8B", 32, 8, 128, requests=12, rows=6700, context=32768, vocabulary=128256),
)


@dataclass(frozen=True)
class Timed:
    """Calls that do the same work on different layers.

    Attributes:
        moved_bytes: that one call must read and write, each once.
    """

    calls: Sequence[Callable[[], object]]
    moved_bytes: int


class Case:
    """A filled pool, its views, and a main pool; everything on the GPU.

    Args:
        scattered: slots in random order instead of in runs.
    """

    def __init__(self, shape: Shape, pool_format: PoolFormat, scattered: bool) -> None:
        self.shape = shape
        device, self.scale = "cuda", shape.dim**-0.5
        slots = shape.requests * shape.rows
        self.storage = PoolStorage(pool_format, LAYERS, slots, shape.heads, shape.dim, device)
        self._fill()
        order = torch.arange(1, slots + 1, device=device)
        run = 1 if scattered else RUN_OF_SLOTS
        runs = order[: slots // run * run].view(-1, run)
        order = torch.cat([runs[torch.randperm(len(runs), device=device)].flatten(), order[-run:]])
        self.table = order[:slots].view(shape.requests, shape.rows).to(torch.int32)
        self.request_rows = torch.arange(shape.requests, device=device)
        self.lengths = torch.full((shape.requests,), shape.rows, device=device)
        queries = (LAYERS, shape.requests, 1, shape.query_heads, shape.dim)
        self.queries = torch.randn(queries, device=device).to(MODEL_DTYPE)
        new = (2, LAYERS, shape.requests, shape.heads, shape.dim)
        self.new_keys, self.new_values = torch.randn(new, device=device).to(MODEL_DTYPE)
        self.new_slots = self.table[:, -1].long()
        self.workspace = Workspace.create(
            self.storage, shape.requests, shape.query_heads, shape.rows
        )

    def _fill(self) -> None:
        for layer in range(LAYERS):
            for some in torch.arange(self.storage.slots + 1, device="cuda").split(1 << 16):
                numbers = (2, len(some), self.storage.heads, self.storage.head_dim)
                self.storage.write(layer, some, *torch.randn(numbers, device="cuda"))

    def view_arguments(self, layer: int) -> tuple:
        return self.storage, layer, self.table, self.request_rows, self.lengths, self.scale

    @property
    def row_bytes(self) -> int:
        """Of one row and head."""
        return self.storage.format.row_bytes(self.shape.dim)

    @property
    def exact_bytes(self) -> int:
        """Of one token and head in the main pool."""
        return 2 * self.shape.dim * MODEL_DTYPE.itemsize

    @property
    def attention_bytes(self) -> int:
        rows = self.shape.requests * self.shape.rows
        queries = 2 * self.queries[0].numel() * MODEL_DTYPE.itemsize
        return rows * (self.shape.heads * self.row_bytes + self.table.itemsize) + queries

    def attention(self, **options) -> Timed:
        options = {"workspace": self.workspace} | options
        calls = [
            lambda layer=layer: draft_attention(
                self.queries[layer], *self.view_arguments(layer), **options
            )
            for layer in range(LAYERS)
        ]
        return Timed(calls, self.attention_bytes)

    def step(self, **options) -> Timed:
        """Append and attend: a layer of a draft step."""
        options = {"workspace": self.workspace} | options
        calls = [
            lambda layer=layer: append_and_attend(
                self.queries[layer],
                self.new_keys[layer],
                self.new_values[layer],
                self.new_slots,
                *self.view_arguments(layer),
                **options,
            )
            for layer in range(LAYERS)
        ]
        return Timed(calls, self.attention_bytes + self._append_bytes)

    @property
    def _append_bytes(self) -> int:
        return self.shape.requests * self.shape.heads * (self.exact_bytes + self.row_bytes)

    def append(self) -> Timed:
        calls = [
            lambda layer=layer: append_rows(
                self.new_keys[layer], self.new_values[layer], self.new_slots, self.storage, layer
            )
            for layer in range(LAYERS)
        ]
        return Timed(calls, self._append_bytes)

    def main_pool(self) -> tuple[LayerBuffers, LayerBuffers]:
        shape = (2, LAYERS, 2 * self.shape.context, self.shape.heads, self.shape.dim)
        keys, values = torch.randn(shape, device="cuda", dtype=torch.float32).to(MODEL_DTYPE)
        return LayerBuffers(list(keys)), LayerBuffers(list(values))

    def commit(self) -> Timed:
        """All layers at once."""
        keys, values = self.main_pool()
        count = self.shape.requests * COMMITTED_TOKENS
        sources = torch.randint(0, len(keys[0]), (4, count), device="cuda")
        targets = self.table[:, -COMMITTED_TOKENS:].flatten().long()
        calls = [
            lambda source=source: commit_rows(keys, values, source, self.storage, targets)
            for source in sources
        ]
        moved = count * LAYERS * self.shape.heads * (self.exact_bytes + self.row_bytes)
        return Timed(calls, moved)

    def _picks(self) -> torch.Tensor:
        scores = torch.rand(LAYERS, self.shape.heads, self.shape.context, device="cuda")
        kept = int(KEPT * self.shape.context)
        return scores.topk(kept, dim=2).indices.sort(dim=2).values

    def gather(self) -> Timed:
        """All layers at once, one request."""
        keys, values = self.main_pool()
        picks = self._picks()
        sources = torch.arange(self.shape.context, device="cuda") + 7
        targets = self.table.flatten()[: picks.shape[2]].long()
        calls = [lambda: gather_span(keys, values, sources, picks, self.storage, targets)]
        return Timed(calls, picks.numel() * (self.exact_bytes + self.row_bytes))

    def regather(self) -> Timed:
        """All layers at once: the older half of a view."""
        slots = self.table.flatten().long()
        half = self.shape.rows // 2
        picks = self._picks()[:, :, : half // 2] % half
        targets = slots[half : half + picks.shape[2]]
        calls = [lambda: regather_span(self.storage, slots[:half], picks, targets)]
        return Timed(calls, 2 * picks.numel() * self.row_bytes)

    def score(self) -> Timed:
        """All layers at once, one request; keys counted once, though two passes read them."""
        keys, _ = self.main_pool()
        shape = (LAYERS, WINDOW, self.shape.query_heads, self.shape.dim)
        queries = torch.randn(shape, device="cuda").to(MODEL_DTYPE)
        slots = torch.arange(self.shape.context, device="cuda") + 7
        positions = slots[-WINDOW:] - 7
        calls = [lambda: score_window(queries, positions, keys, slots, 0, self.scale)]
        tokens = LAYERS * self.shape.heads * self.shape.context
        return Timed(calls, tokens * (self.exact_bytes // 2 + torch.float32.itemsize))

    def operations(self) -> Iterator[tuple[str, Callable[[], Timed]]]:
        yield "attention", self.attention
        yield "attention, two launches", lambda: self.attention(workspace=None)
        yield "append and attend", self.step
        yield "append", self.append
        yield "commit", self.commit
        yield "gather", self.gather
        yield "regather", self.regather
        yield "score", self.score


def picks(shape: Shape) -> Iterator[tuple[str, Timed]]:
    """A token of each request from its logits, those of several steps in turn; "by torch" as
    SGLang's logits processor leaves them, in float32.
    """
    size = LAYERS, shape.requests, shape.vocabulary
    steps = torch.randn(size, device="cuda", dtype=torch.float32).to(MODEL_DTYPE).unbind()
    moved = steps[0].numel() * MODEL_DTYPE.itemsize
    yield "pick", Timed([partial(row_argmax, logits) for logits in steps], moved)
    yield "pick, by torch", Timed([partial(_pick_by_torch, logits) for logits in steps], moved)


def _pick_by_torch(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().argmax(dim=-1)
