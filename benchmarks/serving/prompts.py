"""Prompts over real text that every installation of SGLang has.

Documents are pieces of the language reference that comes with Python, of package descriptions, of
docstrings and of source files; no two pieces of one kind overlap. They are continued, or asked
about in chat form.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import pydoc_data.topics
import random
import re
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# A chat prompt: what is asked, and how the answer begins. None: the document goes on.
Question = tuple[str, str] | None
QUESTIONS: tuple[Question, ...] = (
    None,
    ("Write a long story about two friends who find this text and talk about it.", ""),
    ("Write a dialogue between a teacher and a student about the text above.", "Teacher: "),
    ("Repeat the text above word by word, from its beginning.", ""),
    ("Write an email to a colleague that says what is in the text above.", "Subject: "),
    ("Ask ten different questions about the text above and answer each.", "Question 1: "),
    ("Summarize the text above in your own words.", ""),
    ("Which rules does the text above state?", "The text above says that"),
)
NGRAM = 8
# Documents are cut by characters first: enough of them for so many tokens, code included.
CHARACTERS_A_TOKEN = 5
PACKAGES = ("sglang", "transformers", "torch")
OWN_PACKAGE = "sglang-vericache"
LEAST_FILE_BYTES = 2000
# Shorter ones are lists of arguments more than prose.
LEAST_DOCSTRING = 500
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)

_LOADING = threading.Lock()


class TooFewDocumentsError(RuntimeError):
    """The texts of this installation do not suffice."""


class Prompts:
    """Prompts of a wanted length, by number; the same number gives the same prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._documents: dict[int, list[str]] = {}
        self._made: dict[tuple[int, int], list[int]] = {}

    @classmethod
    def of_model(cls, model: str) -> Prompts:
        # Its lazy modules are not safe to open from two threads, and sides may run at once.
        with _LOADING:
            from transformers import AutoTokenizer

            return cls(AutoTokenizer.from_pretrained(model))

    @staticmethod
    def kind(number: int) -> int:
        """Place of its question among QUESTIONS."""
        return number % len(QUESTIONS)

    def count(self, length: int) -> int:
        """How many there are of that length."""
        return len(self._documents_of(length))

    def make(self, length: int, numbers: Sequence[int]) -> list[list[int]]:
        """Prompts of exactly ``length`` tokens; they are kept, for making them takes long.

        Raises:
            TooFewDocumentsError: a number beyond `count`.
        """
        documents = self._documents_of(length)
        if max(numbers, default=-1) >= len(documents):
            raise TooFewDocumentsError(
                f"only {len(documents)} documents of {length} tokens are installed here"
            )
        missing = [number for number in numbers if (length, number) not in self._made]
        if missing:  # in one call: the tokenizer takes all cores for it
            texts = self.tokenizer([documents[n] for n in missing], add_special_tokens=False)
            for number, text in zip(missing, texts.input_ids, strict=True):
                self._made[length, number] = self._fitted(length, number, text)
        return [self._made[length, number] for number in numbers]

    def _fitted(self, length: int, number: int, text: list[int]) -> list[int]:
        """The document ``text`` with its question, cut to the length."""
        documents = self._documents_of(length)
        question = QUESTIONS[self.kind(number)]
        head, tail = "", ""
        if question is not None:
            asked, begun = question
            head = "<|im_start|>user\n"
            tail = f"\n\n{asked}<|im_end|>\n<|im_start|>assistant\n{begun}"
        before, after = self._encode(head), self._encode(tail)
        room, following = length - len(before) - len(after), number
        while len(text) < room:  # longer words than most
            following = (following + 1) % len(documents)
            text = text + self._encode(documents[following])
        return before + text[:room] + after

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _documents_of(self, length: int) -> list[str]:
        if length not in self._documents:
            source, characters = random.Random(0), length * CHARACTERS_A_TOKEN
            pieces: list[str] = []
            # Prose first: small models go on about it longest before they repeat themselves.
            for kind in ((_reference, _descriptions, _docstrings), (_sources,)):
                found = [piece for texts in kind for piece in _pieces(texts(), characters)]
                source.shuffle(found)
                pieces += found
            self._documents[length] = pieces
        return self._documents[length]


def _pieces(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The texts one after the other, cut."""
    held = ""
    for text in texts:
        held += text + "\n\n"
        while len(held) >= characters:
            yield held[:characters]
            held = held[characters:]


def _reference() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    return (topics[name] for name in sorted(topics))


def _descriptions() -> Iterator[str]:
    """Of the installed packages, which are written for readers; not our own, which changes from
    one commit to the next, and with it the prompts would."""
    found = {str(d.metadata["Name"]): d.read_text("METADATA") or "" for d in distributions()}
    found.pop(OWN_PACKAGE, None)
    return (found[name].partition("\n\n")[2] for name in sorted(found))


def _docstrings() -> Iterator[str]:
    for text in _sources():
        for found in _DOCSTRING.findall(text):
            if len(found) >= LEAST_DOCSTRING:
                yield inspect.cleandoc(found)


def _sources() -> Iterator[str]:
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent)
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if "site-packages" in inside.parts or path.stat().st_size < LEAST_FILE_BYTES:
                continue
            yield path.read_text(encoding="utf-8", errors="replace")


def digest(prompts: Sequence[Sequence[int]]) -> str:
    """Which prompts these are."""
    return hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()[:16]


def repetition(tokens: Sequence[int]) -> float:
    """Share of the n-grams that occurred before in the same text, in [0, 1]."""
    seen: set[tuple[int, ...]] = set()
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    repeated = 0
    for gram in grams:
        repeated += gram in seen
        seen.add(gram)
    return repeated / max(len(grams), 1)
