"""Where the prompts of a case come from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.registry import Case
from benchmarks.serving import case_prompts
from benchmarks.serving.case_prompts import CHOSEN, CasePrompts, NotChosenError
from benchmarks.serving.selection import SelectionError, read_selections

LARGE = Case("large", "", "", 80, 4, None, "serving")
SMALL, OTHER = replace(LARGE, name="small", requests=2), replace(LARGE, name="other", context=90)


class Texts:
    """Prompts that begin with their number; each is made once."""

    def __init__(self, salt: int = 0) -> None:
        self.salt = salt

    @staticmethod
    def kind(number: int) -> int:
        return 0

    def count(self, length: int) -> int:
        return 50

    def make(self, length: int, numbers) -> list[list[int]]:
        return [[n, *[self.salt] * (length - 1)] for n in numbers]


class Server:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, prompts, tokens: int) -> list[list[int]]:
        self.asked += [len(prompt) for prompt in prompts]
        return [list(range(tokens)) for _ in prompts]

    def flush(self) -> None:
        pass


def prompts_of(monkeypatch, folder, cases, chooses=True, salt=0, model="/models/smol"):
    """What each case gets, and which prompts the server was asked to answer for the choice."""
    monkeypatch.setattr(case_prompts.Prompts, "of_model", lambda model: Texts(salt))
    source, server = CasePrompts(folder, model, None, chooses, 60), Server()
    with source.preparing(cases):
        source.wait()
        found = [source.of(case, server, lambda what: None) for case in cases]
    return found, server.asked


def test_chosen_once(tmp_path, monkeypatch):
    """Catches device time for a choice that an earlier case or call has made."""
    (large, small), asked = prompts_of(monkeypatch, tmp_path, [LARGE, SMALL])
    assert set(asked) == {80} and small[0] == large[0][:2]
    assert large[1]["tried"] == small[1]["tried"] == len(asked)
    assert list(read_selections(tmp_path / CHOSEN, "smol")) == ["large"]
    again, asked = prompts_of(monkeypatch, tmp_path, [SMALL, LARGE], chooses=False)
    assert asked == [] and [prompts for prompts, _ in again] == [small[0], large[0]]
    # The name alone says nothing: a longer case is chosen anew.
    longer = replace(LARGE, context=90)
    [(prompts, _)], asked = prompts_of(monkeypatch, tmp_path, [longer])
    assert set(asked) == {90} and {len(prompt) for prompt in prompts} == {90}


def test_no_choice(tmp_path, monkeypatch):
    """Catches prompts chosen by ours, of other texts or of another model."""
    with pytest.raises(NotChosenError, match="plain side first"):
        prompts_of(monkeypatch, tmp_path, [LARGE], chooses=False)
    prompts_of(monkeypatch, tmp_path, [LARGE])
    for case in (LARGE, SMALL):
        with pytest.raises(SelectionError, match="other texts"):
            prompts_of(monkeypatch, tmp_path, [case], salt=1)
    with pytest.raises(NotChosenError):
        prompts_of(monkeypatch, tmp_path, [OTHER], chooses=False)
    with pytest.raises(SelectionError, match="answers of smol"):
        prompts_of(monkeypatch, tmp_path, [LARGE], model="/models/huge")


def test_a_shape(tmp_path, monkeypatch):
    """Catches a choice among prompts that say nothing."""
    source = CasePrompts(tmp_path, "folder", "tiny", False, 60)
    with source.preparing([SMALL]):
        prompts, chosen = source.of(SMALL, SimpleNamespace(), lambda what: None)
    assert chosen is None and [len(prompt) for prompt in prompts] == [80, 80]
