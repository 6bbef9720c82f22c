"""Which prompts are timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.registry import Case
from benchmarks.serving import selection
from benchmarks.serving.case_prompts import choice_for
from benchmarks.serving.prompts import repetition
from benchmarks.serving.selection import (
    LOOKED_AT,
    Selection,
    SelectionError,
    read_selections,
    select,
    write_selections,
)
from benchmarks.serving.shapes import random_prompts

CASE = Case("mine", "", "", 80, 4, None, "serving")
LOOP, FRESH = [1, 2] * 40, list(range(80))


class Source:
    """Prompts of one kind in three; each begins with its number unless told otherwise."""

    def __init__(self, count: int, same: bool = False, salt: int = 0) -> None:
        self.limit, self.same, self.salt = count, same, salt

    @staticmethod
    def kind(number: int) -> int:
        return number % 3

    def count(self, length: int) -> int:
        return self.limit

    def make(self, length: int, numbers) -> list[list[int]]:
        return [[0 if self.same else n, *[self.salt] * (length - 1)] for n in numbers]


class Server:
    """Answers loop unless the prompt's number says otherwise."""

    def __init__(self, good) -> None:
        self.good, self.asked = good, []

    def __call__(self, prompts, tokens: int) -> list[list[int]]:
        self.asked += [prompt[0] for prompt in prompts]
        return [FRESH if self.good(prompt[0]) else LOOP for prompt in prompts]


def test_repetition():
    assert repetition(FRESH) == 0.0 and repetition(LOOP) > 0.9
    assert repetition([1, 2, 3]) == 0.0


def test_looping_answers_are_left_out(monkeypatch):
    """Catches a choice that takes whatever comes first, and a search that does not end."""
    monkeypatch.setattr(selection, "WAVE", 6)
    server = Server(lambda n: n % 3 == 1)
    chosen = select(Source(100), CASE, server, seconds=60)
    assert chosen.numbers == (1, 4, 7, 10)
    # After the first wave only the kind that does not loop is tried.
    assert server.asked[:6] == [0, 1, 2, 3, 4, 5]
    assert all(n % 3 == 1 for n in server.asked[6:]) and chosen.tried == len(server.asked)


def test_out_of_time_or_documents(monkeypatch):
    """Catches a search without end, and too few prompts that pass for enough."""
    monkeypatch.setattr(selection, "WAVE", 6)
    chosen = select(Source(100), CASE, Server(lambda n: n == 5), seconds=0)
    assert chosen.numbers[0] == 5 and len(chosen.numbers) == 4 and chosen.tried == 6
    chosen = select(Source(7), CASE, Server(lambda n: n == 5), seconds=60)
    assert len(chosen.numbers) == 4
    with pytest.raises(SelectionError, match="only 3"):
        select(Source(3), CASE, Server(lambda n: True), seconds=60)


def test_no_shared_prefix():
    """Catches prompts that would share their prefix in the radix tree."""
    with pytest.raises(SelectionError, match="only 1"):
        select(Source(50, same=True), CASE, Server(lambda n: True), seconds=60)


def test_other_texts_are_noticed():
    """Catches prompts of another installation under the same numbers."""
    chosen = select(Source(100), CASE, Server(lambda n: True), seconds=60)
    again = Selection.from_json(chosen.as_json())
    assert again == chosen and len(again.prompts(Source(100), CASE)) == 4
    with pytest.raises(SelectionError, match="other texts"):
        again.prompts(Source(100, salt=7), CASE)


def test_random_prompts_share_what_the_case_says():
    """Catches readers of one document that do not share it, and others that do."""
    case = replace(CASE, context=50, requests=6, prefixes=2, shared_tokens=40)
    prompts = random_prompts(case, 1000)
    assert [len(prompt) for prompt in prompts] == [50] * 6
    beginnings = [tuple(prompt[:40]) for prompt in prompts]
    assert beginnings[0] == beginnings[1] == beginnings[2] != beginnings[3] == beginnings[5]
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 6
    assert random_prompts(case, 1000) == prompts
    alone = random_prompts(CASE, 1000)
    assert len({prompt[0] for prompt in alone}) > 1


def test_a_larger_case_serves_a_smaller_one():
    """Catches prompts that are chosen twice, and answers whose end nobody has looked at."""
    source = Source(100)
    chosen = select(source, CASE, Server(lambda n: n % 3 == 1), seconds=60)
    smaller = replace(CASE, requests=2)
    assert chosen.serves(smaller) and not chosen.serves(replace(CASE, requests=5))
    assert chosen.serves(replace(smaller, tokens=CASE.tokens // 2))
    assert chosen.serves(replace(smaller, tokens=CASE.tokens + 1))
    short = replace(CASE, tokens=LOOKED_AT - 1)
    chosen_by_less = select(source, short, Server(lambda n: n % 3 == 1), seconds=60)
    assert chosen_by_less.serves(short) and not chosen_by_less.serves(CASE)
    assert not chosen.serves(replace(smaller, context=81))
    first = chosen.first(source, smaller)
    assert first.prompts(source, smaller) == chosen.prompts(source, CASE)[:2]
    with pytest.raises(SelectionError, match="other texts"):
        chosen.first(Source(100, salt=7), smaller)


def test_a_choice_of_another_size_is_none_of_this_case():
    """Catches six requests in a case of three, and prompts of a case that was called the same."""
    chosen = select(Source(100), CASE, Server(lambda n: True), seconds=60)
    assert choice_for(CASE, {CASE.name: chosen}) is chosen
    assert choice_for(replace(CASE, requests=2), {CASE.name: chosen}) is chosen
    for other in (replace(CASE, requests=5), replace(CASE, context=81)):
        assert choice_for(other, {CASE.name: chosen}) is None


def test_choices_of_another_model_or_file(tmp_path):
    """Catches prompts that were chosen by the answers of another model."""
    path = tmp_path / "chosen.json"
    assert read_selections(path, "smol") == {}
    chosen = select(Source(100), CASE, Server(lambda n: True), seconds=60, model="smol")
    write_selections(path, {"mine": chosen})
    assert read_selections(path, "smol") == {"mine": chosen}
    with pytest.raises(SelectionError, match="answers of smol, and the model is large"):
        read_selections(path, "large")
    for text in ("not json", "[1]", json.dumps({"mine": {"what": 1}}), json.dumps({"mine": 3})):
        path.write_text(text)
        with pytest.raises(SelectionError, match="does not hold"):
            read_selections(path, "smol")
