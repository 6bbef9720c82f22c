"""Long real documents that every Python installation has, and questions about them.

The prose is the language reference in ``pydoc_data.topics`` (PSF licence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Long enough for several rounds at the default horizon, short enough for two CPU cores.
ANSWER_TOKENS = 64
# More than the prose has anywhere over a whole document (about 4).
_CHARACTERS_A_TOKEN = 8
INSTRUCTIONS = "You answer questions about the given text."


@dataclass(frozen=True)
class Question:
    """One question about one document.

    Attributes:
        name: what the tables call it.
        document: the text; it precedes the question, so that questions about it share a prefix.
        max_new_tokens: limit of the answer.
    """

    name: str
    document: str
    question: str
    max_new_tokens: int = ANSWER_TOKENS

    @property
    def content(self) -> str:
        """The user's message."""
        return f"Here is a text.\n\n{self.document}\n\n{self.question}"

    def messages(self) -> list[dict[str, str]]:
        """The question in chat form."""
        return [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": self.content},
        ]


def document(topics: Sequence[str], tokens: int, tokenizer: Any) -> str:
    """The first ``tokens`` tokens of the topics' prose, one topic after the other.

    Args:
        topics: keys of ``pydoc_data.topics.topics``.
        tokenizer: a fast transformers tokenizer.
    """
    from pydoc_data.topics import topics as prose

    # A longer text than the model's limit is only cut, but the tokenizer would warn about it.
    text = "\n\n".join(prose[topic].strip() for topic in topics)[: tokens * _CHARACTERS_A_TOKEN]
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    if len(ends) < tokens:
        raise ValueError(f"{', '.join(topics)} have {len(ends)} tokens, {tokens} were asked for")
    return text[: ends[tokens - 1]]


def hide(sentence: str, text: str, depth: float) -> str:
    """``text`` with ``sentence`` as a paragraph of its own, ``depth`` (0 to 1) of the way down."""
    gap = text.find("\n\n", int(len(text) * depth))
    at = len(text) if gap < 0 else gap
    return f"{text[:at]}\n\n{sentence}{text[at:]}"


def single_questions(tokenizer: Any) -> list[Question]:
    """Questions in pairs: neighbours are asked at the same time."""
    lisbon = "The secret number for Lisbon is 48213."
    oslo = "The secret number for Oslo is 70659."
    return [
        Question(
            "summary",
            document(["typesseq"], 1500, tokenizer),
            "Summarize this text in a short paragraph.",
        ),
        Question(
            "needle, middle",
            hide(lisbon, document(["debugger"], 2800, tokenizer), 0.5),
            "What is the secret number for Lisbon?",
        ),
        Question(
            "explain",
            document(["execmodel", "naming"], 2000, tokenizer),
            "Explain to a beginner what a scope is.",
        ),
        Question(
            "needle, early",
            hide(oslo, document(["formatstrings"], 1000, tokenizer), 0.2),
            "What is the secret number for Oslo?",
        ),
    ]


def conversation(tokenizer: Any) -> list[Question]:
    """A conversation: the first turn brings the document, the others only ask."""
    text = document(["import"], 1800, tokenizer)
    return [
        Question("turn 1", text, "Summarize the text for a colleague in one paragraph."),
        Question("turn 2", "", "Which errors can it raise, and when?"),
        Question("turn 3", "", "Now write a short quiz of three questions about all of this."),
    ]


@dataclass(frozen=True)
class ForkQuestion:
    """A document that two readers answer about, and what to do with both answers."""

    document: str
    branches: tuple[str, str]
    join: str


def fork_question(tokenizer: Any) -> ForkQuestion:
    return ForkQuestion(
        document(["compound"], 2200, tokenizer),
        (
            "Which compound statements does the text describe? Give a list.",
            "How does the try statement treat exceptions? Explain it step by step.",
        ),
        "Write one paragraph for a newcomer that uses both answers.",
    )
