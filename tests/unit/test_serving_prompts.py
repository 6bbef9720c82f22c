"""Texts that prompts are made of."""

from __future__ import annotations

from types import SimpleNamespace

from benchmarks.serving import prompts


def test_our_own_description_is_no_text(monkeypatch):
    """Catches prompts that are other ones after every change of our README, so that a choice of
    them made at one commit serves no other."""

    def package(name: str):
        text = f"Name: {name}\n\nwhat {name} is"
        return SimpleNamespace(metadata={"Name": name}, read_text=lambda _: text)

    found = [package(name) for name in ("torch", prompts.OWN_PACKAGE, "sglang")]
    monkeypatch.setattr(prompts, "distributions", lambda: found)
    assert list(prompts._descriptions()) == ["what sglang is", "what torch is"]
