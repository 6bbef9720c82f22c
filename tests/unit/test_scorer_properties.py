"""What holds for every registered scorer, one table of scorers against one list of properties."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from score_fakes import inputs_of, make_inputs, make_rotary, observe, rotate
from view_fakes import DIM, HEADS, LAYERS, RECENT, SINKS, World, each_head

from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.query_stats import StatsWatch
from sglang_vericache.compressors.registry import SCORERS
from sglang_vericache.compressors.select import select_rows
from sglang_vericache.compressors.window import WindowWatch
from sglang_vericache.tree.path_scores import ScoredPath, path_scores

# The same float32 sums in another order, relative to the largest score.
TOLERANCE = 2e-6
# Statistics joined from chunks, behind a softmax.
STATS_TOLERANCE = 2e-5
TOKENS, HEADS_SCORED, GROUP = 120, 3, 2

every_scorer = pytest.mark.parametrize("name", SCORERS)


def create(name: str):
    return SCORERS[name]()


def assert_same(found: torch.Tensor, wanted: torch.Tensor, relative: float = TOLERANCE) -> None:
    atol = relative * float(wanted.abs().max())
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=atol)


@every_scorer
def test_declarations(name):
    """Catches a scorer that watches nothing though it reads queries, or whose state changes."""
    scorer = create(name)
    assert scorer.name == name
    assert scorer.scope in ("node", "path")
    assert scorer.granularity in ("token", "head_even")
    assert scorer.paper.split()[-2] == "arXiv"
    assert ("queries" in scorer.needs) == isinstance(scorer.watch, WindowWatch)
    assert ("query_stats" in scorer.needs) == isinstance(scorer.watch, StatsWatch)
    assert scorer.scope == "path" or scorer.watch is None
    assert dataclasses.is_dataclass(scorer) and scorer.__dataclass_params__.frozen


@every_scorer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_scores_are_finite_float32(name, dtype):
    """Catches sums in half precision, a wrong axis order, and inputs written in place."""
    inputs = make_inputs(create(name), TOKENS, HEADS_SCORED, GROUP, dtype=dtype)
    tensors = [x for x in vars(inputs).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    scores = create(name).score(inputs)
    assert scores.shape == (HEADS_SCORED, TOKENS)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


@every_scorer
def test_zero_keys_and_values(name):
    """Catches a division by the norm of padding or of a dead head."""
    inputs = make_inputs(create(name))
    inputs = replace(
        inputs,
        keys=torch.zeros_like(inputs.keys),
        values=torch.zeros_like(inputs.keys) if inputs.values is not None else None,
    )
    assert create(name).score(inputs).isfinite().all()


@every_scorer
def test_scoring_never_waits_for_the_device(name):
    """Catches .item(), a mask used as an index and the like: on the meta device there is no number
    to look at, so whatever would wait for one raises."""
    inputs = make_inputs(create(name))
    stats, rotary = inputs.query_stats, inputs.rotary
    moved = {k: v.to("meta") for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    if stats is not None:
        parts = {k: getattr(stats, k).to("meta") for k in ("mean", "variance", "cross")}
        moved["query_stats"] = replace(stats, **parts)
    moved["rotary"] = replace(rotary, table=rotary.table.to("meta"))
    scores = create(name).score(replace(inputs, **moved))
    assert scores.is_meta and scores.shape == (3, 120)


@every_scorer
def test_needs_are_complete(name):
    """Catches a scorer that reads what it does not declare: it would be given nothing, or work in
    tests only."""
    scorer = create(name)
    inputs = make_inputs(scorer)
    assert (inputs.values is None) == ("values" not in scorer.needs)
    assert (inputs.queries is None) == ("queries" not in scorer.needs)
    assert (inputs.query_stats is None) == ("query_stats" not in scorer.needs)
    before = scorer.score(inputs)
    if "keys" not in scorer.needs:
        inputs.keys.normal_()
    if "query_stats" not in scorer.needs:
        inputs = replace(inputs, rotary=None)
    assert torch.equal(scorer.score(inputs), before)


@pytest.mark.parametrize(
    ("name", "need"),
    [(n, need) for n, scorer in SCORERS.items() for need in sorted(scorer.needs)],
)
def test_needs_are_read(name, need):
    """Catches a need that is declared and not read: values are gathered for it in every layer."""
    scorer = create(name)
    inputs, other = make_inputs(scorer), make_inputs(scorer)
    changed = replace(inputs, **{need: getattr(other, need)})
    assert not torch.equal(scorer.score(changed), scorer.score(inputs))


def with_heads(scorer, order: list[int], chunks=()):
    """Inputs whose kv heads are those of one random path in ``order``, with their queries."""
    generator = torch.Generator().manual_seed(5)
    dim, heads = 16, 3

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = normal(TOKENS, heads, dim), normal(TOKENS, heads, dim)
    queries = normal(TOKENS, heads, GROUP, dim) + normal(heads, GROUP, dim)
    rotary = make_rotary(dim, TOKENS + 600)
    queries = rotate(queries[:, order].flatten(1, 2), torch.arange(TOKENS), rotary)
    return inputs_of(scorer, keys[:, order], values[:, order], queries, rotary, chunks)


@every_scorer
@pytest.mark.parametrize("order", [[0, 0, 0], [2, 1, 2], [1, 2, 0], [1]], ids=str)
def test_heads_do_not_see_each_other(name, order):
    """Catches sums over heads, and query heads given to the wrong kv head: equal heads score
    equally, and heads in another order the same in that order."""
    scorer = create(name)
    plain = scorer.score(with_heads(scorer, [0, 1, 2]))
    assert_same(scorer.score(with_heads(scorer, order)), plain[order])


@every_scorer
def test_granularity(name):
    """Catches a scorer that says `token` and lets heads differ, or the other way round."""
    scorer = create(name)
    picks = select_rows(scorer.score(make_inputs(scorer)), 80, 0, TOKENS)
    alike = all(torch.equal(picks[0], head) for head in picks)
    assert alike == (scorer.granularity == "token")


@every_scorer
@pytest.mark.parametrize(
    "chunks",
    [[60], [1], [119], [1, 2, 3, 4, 5], [110, 114, 118], list(range(10, 120, 10))],
    ids=str,
)
def test_chunked_prefill_changes_nothing(name, chunks):
    """Catches queries of an earlier chunk lost, counted twice or at the wrong positions, and
    statistics that depend on where chunks end."""
    scorer = create(name)
    whole = scorer.score(with_heads(scorer, [0, 1, 2]))
    found = scorer.score(with_heads(scorer, [0, 1, 2], chunks))
    if isinstance(scorer.watch, StatsWatch):
        assert_same(found, whole, STATS_TOLERANCE)
    else:
        assert torch.equal(found, whole), "windows are copies"


@pytest.mark.parametrize("name", [n for n, scorer in SCORERS.items() if scorer.scope == "node"])
def test_node_scope_does_not_know_where_it_stands(name):
    """Catches a scorer that calls itself shareable but depends on the path before the interval."""
    inputs = make_inputs(create(name))
    here = create(name).score(inputs)
    there = create(name).score(replace(inputs, start=5000, path_end=9000))
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", [n for n, scorer in SCORERS.items() if scorer.any_basis])
def test_any_basis_is_any_basis(name):
    """Catches a scorer that reads more of keys than their lengths and angles, but says it does
    not: tails are folded by keys that are stored rotated."""
    scorer = create(name)
    inputs = make_inputs(scorer)
    assert scorer.needs == {"keys"}
    dim = inputs.keys.shape[-1]
    basis = torch.linalg.qr(torch.randn(dim, dim)).Q
    turned = scorer.score(replace(inputs, keys=inputs.keys @ basis))
    assert_same(turned, scorer.score(inputs), 1e-5)


@every_scorer
def test_many_layers_at_once(name, monkeypatch):
    """Catches layers that are mixed up, or left out, where their keys are copied together."""
    scorer = create(name)
    if not scorer.needs <= {"keys", "values"}:
        pytest.skip("looks through queries, layer by layer")
    world = World(scorer=scorer)
    full, source = world.full, world.full.slots(1, 0, 300)
    found = path_scores(scorer, ScoredPath(full, source, 0, 300, None))
    monkeypatch.setattr("sglang_vericache.tree.path_scores.MOST_COPIED_BYTES", 1)
    apart = path_scores(scorer, ScoredPath(full, source, 0, 300, None))
    assert found.shape == (LAYERS, HEADS, 300)
    assert_same(found, apart)
    for layer in range(LAYERS):
        keys, values = full.keys[layer][source], full.values[layer][source]
        alone = scorer.score(ScoreInputs(keys, values, 0, full.scaling, path_end=300))
        assert_same(found[layer], alone)


@every_scorer
@pytest.mark.parametrize(
    ("end", "fork", "settings"),
    [
        pytest.param(500, None, {}, id="fifth"),
        pytest.param(100, None, {}, id="least"),
        pytest.param(500, None, {"keep_ratio": None, "keep_tokens": 90}, id="tokens"),
        pytest.param(500, None, {"keep_ratio": 0.07}, id="odd-ratio"),
        pytest.param(600, 480, {}, id="fork"),
        pytest.param(600, 590, {}, id="fork-among-the-recent"),
    ],
)
def test_views(name, end, fork, settings):
    """Catches sinks or recent tokens dropped, a token kept twice, heads of unlike budgets, and
    parts whose rows add up to more than the budget, through all of ViewBuilder."""
    scorer = create(name)
    rotary = make_rotary(DIM, 1200)
    world = World(scorer=scorer, rotary=rotary, **settings)
    path = [world.node(7, 0, fork, children=2), world.node(8, fork, end)] if fork else []
    queries = [torch.randn(end, 2 * HEADS, DIM) for _ in range(LAYERS)]
    seen = observe(scorer, queries, rotary, [end // 3]) if scorer.watch is not None else None
    view = world.open(1, end, path, seen)
    assert len(view.spans) == (2 if fork else 1)
    assert world.counters.scored_without == 0
    budget = world.views.budget
    if not fork:
        assert view.span_rows == budget.path_rows(end)
    assert view.span_rows <= budget.limit_rows(end)
    for _, _, positions in each_head(world.tokens_of(view, end)):
        assert len(positions) == view.span_rows, "an equal budget a head"
        assert positions == sorted(set(positions)), "in order, none twice"
        assert set(positions) >= {*range(SINKS), *range(end - RECENT, end)}
    assert world.held([view]) == world.used == view.span_rows


@every_scorer
def test_views_do_not_depend_on_chunks(name):
    """Catches a selection that changes with the scheduler's mood: the same prompt would draft
    better at one load than at another."""
    scorer = create(name)
    rotary = make_rotary(DIM, 1200)
    queries = [torch.randn(400, 2 * HEADS, DIM) + torch.randn(DIM) for _ in range(LAYERS)]
    world = World(scorer=scorer, rotary=rotary)
    kept = []
    for row, chunks in enumerate(([], [256], [70, 71, 200, 399]), start=1):
        world.share(row, 1, 400)
        seen = observe(scorer, queries, rotary, chunks) if scorer.watch is not None else None
        kept.append(world.tokens_of(world.open(row, 400, (), seen), 400))
    assert kept[0] == kept[1] == kept[2]


@every_scorer
def test_folds_keep_their_share(name):
    """Catches a scorer asked about generated tokens in a way that it cannot answer."""
    world = World(scorer=create(name), rotary=make_rotary(DIM, 1200))
    view = world.open(1, 500)
    world.commit(view, 500, 650)
    assert world.views.fold([(view, 650)])[0]
    assert [(span.start, span.end) for span in view.spans] == [(0, 500), (500, 586)]
    for _, _, positions in each_head(world.tokens_of(view, 650)):
        assert positions == sorted(set(positions))
        assert set(positions) >= set(range(586, 650))
    assert world.held([view]) == world.used
