"""Chat prompts over the language reference that comes with Python."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

from transformers import AutoTokenizer

QUESTIONS = (
    "Summarize the text above in your own words.",
    "What is the text above about? Explain it to a beginner.",
    "List the most important terms of the text above and what they mean.",
    "Write an introduction to the text above.",
    "Which rules does the text above state?",
    "Ask questions that the text above answers, and answer them.",
)
NGRAM = 8


class Prompts:
    """Prompts of a wanted length whose first tokens differ, so that they share no prefix."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        topics = pydoc_data.topics.topics
        prose = "\n\n".join(topics[name] for name in sorted(topics))
        self.text = self._encode(prose)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def make(self, length: int, count: int) -> list[list[int]]:
        """``count`` prompts of exactly ``length`` tokens over different places of the text."""
        head = self._encode("<|im_start|>user\n")
        made = []
        for i in range(count):
            question = QUESTIONS[i % len(QUESTIONS)]
            ask = self._encode(f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n")
            room = length - len(head) - len(ask)
            start = i * (len(self.text) - room) // count
            made.append(head + self.text[start : start + room] + ask)
        return made


def repetition(tokens: Sequence[int]) -> float:
    """Share of the n-grams that occurred before in the same text, in [0, 1]."""
    seen: set[tuple[int, ...]] = set()
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    repeated = 0
    for gram in grams:
        repeated += gram in seen
        seen.add(gram)
    return repeated / max(len(grams), 1)
