"""Programs as users write them; the same code runs against a server with the flag and without.

Prompts that run together share a prefix that the cache holds already and differ from the next
token on, so that the cached tokens do not depend on who is computed first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pydoc_data.topics import topics
from typing import Any

import openai
import requests
import sglang as sgl
from cases import ANYTHING, DRAFTS
from steps import Step, of_generate, of_meta, of_openai

TIMEOUT_S = 600
# A tool call has about 30; both are enough for several rounds.
TOKENS, FEW_TOKENS = 36, 24
GRAMMAR = "grammar"

Program = Callable[[str], Iterator[Step]]


def text_of(topic: str, characters: int = 600) -> str:
    return topics[topic].strip()[:characters]


# An agent


SYSTEM = "You answer questions about Python with the help of tools."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"topic": {"type": "string"}},
                "required": ["topic"],
            },
        },
    }
    for name, description in (
        ("look_up", "Text of a topic of the Python reference."),
        ("count_words", "How many words the text of a topic has."),
    )
]
MOST_TURNS = 4


def use_tool(name: str, arguments: dict[str, Any]) -> str:
    topic = arguments.get("topic")
    if topic not in topics:
        return f"There is no topic {topic}."
    return text_of(topic) if name == "look_up" else str(len(topics[topic].split()))


def example(topic: str, answer: str) -> list[dict[str, Any]]:
    """An exchange that shows the model how tools are used."""
    function = {"name": "look_up", "arguments": json.dumps({"topic": topic})}
    call = {"id": f"call_{topic}", "type": "function", "function": function}
    return [
        {"role": "user", "content": f"What does the reference say about {topic}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": text_of(topic)},
        {"role": "assistant", "content": answer},
    ]


EXAMPLES = [
    {"role": "system", "content": SYSTEM},
    *example("break", "The break statement ends the nearest enclosing loop."),
    *example("pass", "The pass statement does nothing when it is executed."),
]


def ask_model(client: openai.OpenAI, messages: list, **options) -> tuple[Any, list, Any]:
    """Text, tool calls as (name, arguments), and the reply."""
    reply = client.chat.completions.create(
        model="m", messages=messages, tools=TOOLS, max_tokens=TOKENS, temperature=0, **options
    )
    message = reply.choices[0].message
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or []]
    return (message.content, reply.choices[0].finish_reason), calls, reply


def ask_model_streaming(client: openai.OpenAI, messages: list) -> tuple[Any, list, Any]:
    """The same from a stream: pieces of text and of arguments put together."""
    text, reason, calls, chunk = "", None, {}, None
    for chunk in client.chat.completions.create(
        model="m",
        messages=messages,
        tools=TOOLS,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for piece in choice.delta.tool_calls or []:
                name, arguments = calls.get(piece.index, ("", ""))
                name += piece.function.name or ""
                calls[piece.index] = (name, arguments + (piece.function.arguments or ""))
    return (text, reason), [calls[index] for index in sorted(calls)], chunk


def agent(
    url: str, ask: Callable = ask_model, questions: Sequence[str] = ("while", "return")
) -> Iterator[Step]:
    """Questions that the model answers with what its tools return, in one conversation."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S)
    messages = list(EXAMPLES)
    for topic in questions:
        messages.append({"role": "user", "content": f"What does the reference say about {topic}?"})
        for turn in range(MOST_TURNS):
            (text, reason), calls, reply = ask(client, messages)
            yield of_openai(f"{topic}, turn {turn}", (text, reason, calls), reply)
            message: dict[str, Any] = {"role": "assistant", "content": text or ""}
            messages.append(message)
            if not calls:
                break
            message["tool_calls"] = []
            for number, (name, arguments) in enumerate(calls):
                call_id = f"call_{topic}_{turn}_{number}"
                function = {"name": name, "arguments": arguments}
                message["tool_calls"].append(
                    {"id": call_id, "type": "function", "function": function}
                )
                result = use_tool(name, json.loads(arguments))
                messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    if ask is ask_model:
        messages.append({"role": "user", "content": "What does the reference say about assert?"})
        (text, reason), calls, reply = ask_model(client, messages, tool_choice="required")
        yield of_openai("a tool is required", (text, reason, calls), reply, GRAMMAR)


def streaming_agent(url: str) -> Iterator[Step]:
    return agent(url, ask_model_streaming, ["while"])


# SGLang's frontend language


@sgl.function
def two_readers(s, document: str):
    """fork, join, select and regex over one document."""
    s += sgl.user_begin()
    s += f"Here is a text.\n\n{document}\n\nQuestion:"
    s.sync()  # fork computes the shared prefix once, but only of text that has been put together
    readers = s.fork(2)
    for reader, question in zip(readers, (" What is it about?", " Explain it."), strict=True):
        reader += question
        reader += sgl.user_end()
        reader += sgl.assistant(sgl.gen("answer", max_tokens=FEW_TOKENS, temperature=0))
    answers = [reader["answer"] for reader in readers]  # waits for both
    s["records"] = [reader.get_meta_info("answer") for reader in readers]
    readers.join()
    s += f" One said: {answers[0]}\nAnother said: {answers[1]}\nExplain what both mean."
    s += sgl.user_end()
    s += sgl.assistant(sgl.gen("both", max_tokens=FEW_TOKENS, temperature=0))
    s += sgl.user("Is the text about loops?")
    s += sgl.assistant(sgl.select("verdict", choices=["yes", "no", "maybe so"]))
    s += sgl.user("How good is the text? Give a mark from 1 to 6.")
    s += sgl.assistant(sgl.gen("mark", max_tokens=8, temperature=0, regex=r"Mark: [1-6]\."))


@sgl.function
def short_question(s, document: str, question: str):
    s += sgl.user_begin()
    s += f"Here is a text.\n\n{document}\n\nQuestion:{question}"
    s += sgl.user_end()
    s += sgl.assistant(sgl.gen("answer", max_tokens=FEW_TOKENS, temperature=0))


def frontend(url: str) -> Iterator[Step]:
    """A program with a fork, then a batch of programs over the same document."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name="chatml")
    document = text_of("while", 1500)
    state = two_readers.run(document, backend=backend)
    for number, info in enumerate(state["records"]):
        yield of_meta(f"reader {number}", state["answer"][number], info)
    for name, expect in (("both", DRAFTS), ("mark", GRAMMAR)):
        yield of_meta(name, state[name], state.get_meta_info(name), expect)
    chosen = (state["verdict"], state.get_meta_info("verdict"))
    yield Step("select", chosen, None, ANYTHING, None)
    questions = (" Name a keyword in it.", " Is it long?", " Does it have an example?")
    states = short_question.run_batch(
        [{"document": document, "question": question} for question in questions],
        backend=backend,
        num_threads=3,
    )
    for question, state in zip(questions, states, strict=True):
        yield of_meta(f"batch{question}", state["answer"], state.get_meta_info("answer"))


# SGLang's own endpoints, and lists of prompts


def native(url: str) -> Iterator[Step]:
    """Lists, several answers, streams and scores over one document."""

    def post(path: str, **body) -> Any:
        response = requests.post(url + path, json=body, timeout=TIMEOUT_S)
        assert response.status_code == 200, response.text
        return response.json()

    greedy = {"temperature": 0, "max_new_tokens": FEW_TOKENS}
    prefix = f"<|im_start|>user\nHere is a text.\n\n{text_of('import', 1800)}\n\nQuestion:"

    def asked(question: str) -> str:
        return f"{prefix} {question}<|im_end|>\n<|im_start|>assistant\n"

    # As the frontend does it before a fork: the prefix is computed, nothing is generated.
    nothing = {"max_new_tokens": 0}
    yield of_generate("prefix", post("/generate", text=prefix, sampling_params=nothing), ANYTHING)
    questions = ["What is a module?", "Explain the import statement.", "Which errors are there?"]
    prompts = [asked(question) for question in questions]
    params = [
        greedy,
        greedy | {"max_new_tokens": 20},
        greedy | {"max_new_tokens": TOKENS, "stop": ["."]},
    ]
    for number, reply in enumerate(post("/generate", text=prompts, sampling_params=params)):
        yield of_generate(f"list {number}", reply)
    several = post("/generate", text=asked("Summarize it."), sampling_params=greedy | {"n": 2})
    for number, reply in enumerate(several):
        yield of_generate(f"answer {number} of 2", reply)
    yield from stream(url, asked("Now quote it."), greedy)
    # Scores of given continuations: nothing, or one token, is generated.
    start = post("/generate", text=prefix, sampling_params=nothing)
    for count in (0, 1):
        replies = post(
            "/generate",
            text=[f"{prefix} {word}" for word in ("yes", "no", "perhaps not")],
            sampling_params={"temperature": 0, "max_new_tokens": count},
            return_logprob=True,
            return_text_in_logprobs=True,
            top_logprobs_num=2,
            token_ids_logprob=[500, 600],
            logprob_start_len=start["meta_info"]["prompt_tokens"] - 2,
        )
        for number, reply in enumerate(replies):
            yield of_generate(f"score {count}/{number}", reply, ANYTHING)
    scores = post(
        "/v1/score", model="m", query=prefix, items=[" yes", " no"], label_token_ids=[500, 600, 700]
    )
    logs = [[math.log(score) for score in row] for row in scores["scores"]]
    yield Step("/v1/score", logs, None, ANYTHING, None)
    # The completions endpoint with a list.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S)
    reply = client.completions.create(
        model="m", prompt=prompts[:2], max_tokens=FEW_TOKENS, temperature=0
    )
    texts = [(choice.text, choice.finish_reason) for choice in reply.choices]
    yield of_openai("completions", texts, reply)


def stream(url: str, prompt: str, sampling: dict[str, Any]) -> Iterator[Step]:
    body = {"text": prompt, "sampling_params": sampling, "stream": True}
    last = None
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=TIMEOUT_S) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                last = json.loads(line[len(b"data: ") :])
    yield of_generate("stream", last)


# In this order, each on an empty cache but the second, which finds what the first left.
PROGRAMS: dict[str, tuple[Program, bool]] = {
    "agent": (agent, True),
    "streaming agent": (streaming_agent, False),
    "frontend": (frontend, True),
    "native": (native, True),
}
