"""Recorded run lengths in place of acceptance: right counts, and never by accident."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass

import pytest
import torch

from benchmarks.registry import CASES, REPLAY
from benchmarks.replay import vericache_replay as replay
from benchmarks.replay.vericache_replay import Recording, ReplayError, RunReplay

ROWS, HORIZON = 64, 16
RECORDING = Recording.load(REPLAY)


@dataclass(frozen=True)
class Verified:
    """As verify.verifier.Verified, which needs SGLang."""

    tokens: torch.Tensor
    yields: torch.Tensor
    source_slots: torch.Tensor


def walk(rounds: int, requests=None, lengths=None, seed: int = 0) -> torch.Tensor:
    """``[rounds, n]`` yields of all rows, or of those that are named."""
    runs = RunReplay(RECORDING, ROWS, seed=seed)
    requests = torch.arange(ROWS) if requests is None else requests
    lengths = torch.full_like(requests, HORIZON) if lengths is None else lengths
    return torch.stack([runs.yields(requests, lengths) for _ in range(rounds)])


def test_tokens_a_round():
    """Catches a walk that starts each round anywhere, or counts places whose run the end of an
    output cuts: walked output by output, the recording gives 14.0."""
    content = json.loads((replay.FOLDER / "run-lengths.json").read_text())
    outputs = content["runs"]["snapkv+int4had 0.2"]["greedy"]
    tokens = rounds = 0
    for output in outputs:
        place = 0
        while place < len(output) - content["cap"]:
            tokens, rounds = tokens + min(output[place], HORIZON) + 1, rounds + 1
            place += min(output[place], HORIZON) + 1
    assert walk(400).double().mean().item() == pytest.approx(tokens / rounds, abs=0.05)
    assert tokens / rounds == pytest.approx(14.0, abs=0.05)


def test_no_more_than_was_drafted():
    """Catches tokens that stand although nobody drafted them: a short round near the end."""
    lengths = torch.arange(ROWS) % (HORIZON + 1)
    yields = walk(50, lengths=lengths)
    assert (yields >= 1).all() and (yields <= lengths + 1).all()
    assert (yields[:, 0] == 1).all()


def test_fixed_seed_and_independent_requests():
    """Catches runs that cannot be repeated, and requests that move in step."""
    one = walk(40)
    assert torch.equal(one, walk(40)) and not torch.equal(one, walk(40, seed=1))
    columns = {tuple(column.tolist()) for column in one.T}
    assert len(columns) > ROWS * 0.9
    # Whoever else runs beside it changes nothing for a request.
    assert torch.equal(walk(40, requests=torch.tensor([5, 9])), one[:, [5, 9]])


def test_rounds_follow_the_recording():
    """Catches a place that moves on by the accepted tokens but not by the one more, and a round
    at an output's end that begins the next one in its middle."""
    runs = RunReplay(Recording("x", ((3, 9, 9, 9, 0, 2), (1, 8, 7)), 9), 1)
    runs.place[0] = 0
    request, length = torch.tensor([0]), torch.tensor([5])
    # Places 0, 4, 5; past the end, so 6 where the next output begins; 8; and 0 again.
    assert [runs.yields(request, length).item() for _ in range(6)] == [4, 1, 3, 2, 6, 4]


def test_tokens_are_those_whose_kv_is_kept():
    """Catches an emitted token whose KV is another one's, and a changed original."""
    drafts = torch.tensor([[11, 12, 13], [21, 22, 23]])
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    verified = Verified(tokens.clone(), torch.tensor([1, 1]), torch.zeros(2, 4))
    made = replay.imposed(verified, drafts, torch.tensor([3, 1]))
    assert made.tokens[0, :3].tolist() == [11, 12, 3] and made.tokens[1, 0].item() == 5
    assert made.yields.tolist() == [3, 1] and torch.equal(verified.tokens, tokens)
    assert made.source_slots is verified.source_slots


@pytest.mark.parametrize(
    "place, says",
    [
        ("run-lengths.json", "FILE:CONFIG:MODE"),
        ("nothing.json:a:b", "nothing.json"),
        ("run-lengths.json:snapkv+int4had 0.2:loud", "greedy"),
    ],
)
def test_bad_places(place, says):
    with pytest.raises(ReplayError, match=says):
        Recording.load(place)


def test_labels():
    """Catches a row from which nobody could find the recording."""
    assert RECORDING.label == "run-lengths.json, snapkv+int4had 0.2, greedy"
    assert "SIMULATED" in replay.banner(RECORDING.label)
    assert RECORDING.label in replay.banner(RECORDING.label)


@pytest.mark.parametrize("armed, variable", [(False, True), (True, False)])
def test_not_by_accident(monkeypatch, armed, variable):
    """Catches a replay without our flag, or without being asked for."""
    monkeypatch.delenv("_SGLANG_VERICACHE_ARMED", raising=False)
    monkeypatch.delenv(replay.VARIABLE, raising=False)
    if armed:
        monkeypatch.setenv("_SGLANG_VERICACHE_ARMED", "1")
    if variable:
        monkeypatch.setenv(replay.VARIABLE, REPLAY)
    monkeypatch.setattr(replay, "install", lambda recording: pytest.fail("installed"))
    replay.activate()


def test_failure_is_loud(monkeypatch):
    """Catches a server that goes on and accepts for real: SGLang only logs what plugins raise."""
    monkeypatch.setenv("_SGLANG_VERICACHE_ARMED", "1")
    monkeypatch.setenv(replay.VARIABLE, "nothing")
    with pytest.raises(SystemExit, match="FILE:CONFIG:MODE"):
        replay.activate()


def test_not_in_the_wheel():
    """Catches a product that can give wrong tokens: no package of ours holds or names it."""
    root = replay.FOLDER.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert not [p for p in project["tool"]["setuptools"]["packages"] if "replay" in p]
    for path in (root / "sglang_vericache").rglob("*.py"):
        assert replay.VARIABLE not in path.read_text(), path
    assert replay.FOLDER not in (root / "sglang_vericache").rglob("*")


def test_cases_of_shapes_are_the_simulated_ones():
    """Catches a case with weights that is replayed, or one without that is not."""
    served = {c.name: c.model for c in CASES.values() if c.measure == "serving"}
    shapes = {name for name, model in served.items() if model.startswith("shape:")}
    assert shapes == {name for name in served if name.startswith(("8b-", "24b-"))} | {"fits-anyway"}
