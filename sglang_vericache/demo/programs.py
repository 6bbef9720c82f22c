"""What the demo asks of a server: single questions, a conversation, a program with a fork.

The same code runs against either server; it knows nothing about the flag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from sglang_vericache.demo.documents import (
    ANSWER_TOKENS,
    INSTRUCTIONS,
    ForkQuestion,
    Question,
    conversation,
    fork_question,
    single_questions,
)

# Far above the longest request of a slow machine; only a hung server reaches it.
REQUEST_TIMEOUT_S = 600
CONCURRENT_QUESTIONS = 2
REQUESTS = 10


@dataclass(frozen=True)
class Record:
    """One finished request.

    Attributes:
        api: how it was asked: generate, chat or frontend.
        output_ids: None where the API does not give token ids.
        seconds: as the server measured it, queueing included.
        cached_tokens: prompt tokens that the server's radix cache held.
        counters: the field "vericache" of meta_info; None from an unmodified server.
    """

    name: str
    api: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    text: str
    output_ids: list[int] | None
    seconds: float
    counters: dict[str, Any] | None


OnRecord = Callable[[Record], None]


def run_workload(url: str, tokenizer: Any, on_record: OnRecord) -> None:
    """Ask everything; ``on_record`` gets each of the REQUESTS records, in a fixed order."""
    ask_single_questions(url, tokenizer, single_questions(tokenizer), on_record)
    hold_conversation(url, conversation(tokenizer), on_record)
    run_fork(url, fork_question(tokenizer), on_record)


def ask_single_questions(
    url: str, tokenizer: Any, questions: Sequence[Question], on_record: OnRecord
) -> None:
    """The native API, CONCURRENT_QUESTIONS at a time."""

    def ask(question: Question) -> Record:
        prompt = tokenizer.apply_chat_template(
            question.messages(), tokenize=False, add_generation_prompt=True
        )
        sampling = {"temperature": 0, "max_new_tokens": question.max_new_tokens}
        response = requests.post(
            f"{url}/generate",
            json={"text": prompt, "sampling_params": sampling},
            timeout=REQUEST_TIMEOUT_S,
        )
        response.raise_for_status()
        answer = response.json()
        return _record(
            question.name, "generate", answer["text"], answer["output_ids"], answer["meta_info"]
        )

    with ThreadPoolExecutor(CONCURRENT_QUESTIONS) as pool:
        for record in pool.map(ask, questions):
            on_record(record)


def hold_conversation(url: str, turns: Sequence[Question], on_record: OnRecord) -> None:
    """The OpenAI client; each turn carries the whole conversation so far."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S)
    messages: list[dict[str, str]] = [{"role": "system", "content": INSTRUCTIONS}]
    for turn in turns:
        content = turn.content if turn.document else turn.question
        messages.append({"role": "user", "content": content})
        completion = client.chat.completions.create(
            model="default",
            messages=messages,
            temperature=0,
            max_tokens=turn.max_new_tokens,
            # SGLang's own fields of a response, which the client passes through.
            extra_body={"return_meta_info": True, "return_token_ids": True},
        )
        choice = completion.choices[0]
        text = choice.message.content
        on_record(_record(turn.name, "chat", text, choice.response_token_ids, choice.meta_info))
        messages.append({"role": "assistant", "content": text})


def run_fork(url: str, question: ForkQuestion, on_record: OnRecord) -> None:
    """SGLang's frontend language: two branches over one document, then a step that uses both."""
    import sglang as sgl

    @sgl.function
    def two_readers(s, question: ForkQuestion):
        s += sgl.system(INSTRUCTIONS)
        s += sgl.user(f"Here is a text.\n\n{question.document}")
        s += sgl.assistant("I have read the text.")
        # fork computes the shared prefix once, but only of text that has been put together.
        s.sync()
        readers = s.fork(len(question.branches))
        for reader, ask in zip(readers, question.branches, strict=True):
            reader += sgl.user(ask)
            reader += sgl.assistant(sgl.gen("answer", max_tokens=ANSWER_TOKENS, temperature=0))
        answers = [reader["answer"] for reader in readers]  # waits for both
        # A program's variables are the only way out for the branches' own records.
        s["branches"] = [reader.get_meta_info("answer") for reader in readers]
        s["answers"] = answers
        s += sgl.user(f"One reader said: {answers[0]}\nAnother: {answers[1]}\n{question.join}")
        s += sgl.assistant(sgl.gen("joined", max_tokens=ANSWER_TOKENS, temperature=0))

    backend = sgl.RuntimeEndpoint(url, chat_template_name="chatml")
    state = two_readers.run(question, backend=backend)
    for number, (text, info) in enumerate(
        zip(state["answers"], state["branches"], strict=True), start=1
    ):
        on_record(_record(f"fork, branch {number}", "frontend", text, None, info))
    joined = state.get_meta_info("joined")
    on_record(_record("fork, join", "frontend", state["joined"], None, joined))


def _record(
    name: str, api: str, text: str, output_ids: list[int] | None, info: dict[str, Any]
) -> Record:
    return Record(
        name=name,
        api=api,
        prompt_tokens=info["prompt_tokens"],
        cached_tokens=info["cached_tokens"],
        output_tokens=info["completion_tokens"],
        text=text,
        output_ids=output_ids,
        seconds=info["e2e_latency"],
        counters=info.get("vericache"),
    )
