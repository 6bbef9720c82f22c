"""Phases for the real model: questions over real text, in chat form."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable

from cases import Answers, Call, Phase
from transformers import AutoTokenizer

PENALTIES = {"frequency_penalty": 0.6, "presence_penalty": 0.8, "repetition_penalty": 1.1}
QUESTIONS = (
    "Summarize the text above in three sentences.",
    "What is the text above about? Explain it to a beginner.",
    "List the most important terms of the text above and what they mean.",
    "Write a short introduction to the text above.",
    "Which rules does the text above state? Name three of them.",
    "Ask three questions that the text above answers, and answer them.",
    "Explain the second paragraph of the text above in other words.",
    "Give an example for what the text above describes.",
)


class ChatPrompts:
    """Chat prompts of a wanted length over the language reference."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        prose = "\n\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
        self.text = self.tokenizer(prose, add_special_tokens=False).input_ids

    def document(self, index: int, length: int) -> list[int]:
        start = (index * 9001) % (len(self.text) - length)
        return self.text[start : start + length]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def question(self, index: int, length: int) -> list[int]:
        head = self.encode("<|im_start|>user\n")
        return head + self.document(index, length) + self.ask(QUESTIONS[index % len(QUESTIONS)])

    def ask(self, question: str) -> list[int]:
        return self.encode(f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n")

    def follow_up(self, question: str) -> list[int]:
        return self.encode(
            f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )


def depth_phases(base: Answers, prompts: ChatPrompts, scale: int = 1) -> Iterable[Phase]:
    for repeat in range(scale):
        tag, first = (f"{repeat}/" if repeat else ""), 8 * repeat
        lengths = (300, 700, 1000, 1500, 2000, 3000)
        calls = [
            Call(f"{tag}doc/{n}", prompts.question(first + i, n), 64) for i, n in enumerate(lengths)
        ]
        yield Phase("documents", calls, 3)
        turns = []
        for i, n in enumerate(lengths[1:5]):
            prompt = prompts.question(first + i + 1, n) + base[f"{tag}doc/{n}"].ids
            prompt += prompts.follow_up("Say it again in one sentence.")
            turns.append(Call(f"{tag}turn2/{n}", prompt, 40))
        yield Phase("second turns", turns, 2)
        # One at a time: see breadth.py.
        for i, (name, value) in enumerate(PENALTIES.items()):
            prompt, beside = prompts.question(first + i, 400), prompts.question(first + i + 3, 500)
            call = Call(f"{tag}penalty/{name}", prompt, 60, {name: value}, expect="penalty")
            companion = Call(f"{tag}penalty/{name}/beside", beside, 220, {"ignore_eos": True})
            yield Phase("penalties in a drafting batch", [call], companion=companion)
