"""Phases for the tiny random model: every shape of request, cheaply."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cases import ANYTHING, Answers, Call, Phase

LENGTHS = (30, 63, 64, 65, 100, 257, 400, 511, 700, 1100, 1900, 3000)
OUTPUTS = (200, 1, 2, 64, 17, 40, 130, 5, 33, 90, 64, 48)
# Contexts shorter than the server's --vericache-min-context.
MIN_CONTEXT = 64
# These contexts are short: by default all of each would be kept, and drafts would never fail.
BY_RATIO = ("--vericache-keep-min", "0", "--vericache-grow-views", "off")
ANY_END = {"ignore_eos": True}
PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 1.0, "repetition_penalty": 1.3}


def tokens(seed: int, count: int) -> list[int]:
    """Ordinary token ids of the tokenizer, no special ones."""
    rng = random.Random(seed)
    return [rng.randrange(200, 48000) for _ in range(count)]


def breadth_phases(base: Answers, scale: int = 1) -> Iterable[Phase]:
    """About 100 requests for each unit of ``scale``.

    ``base`` holds the reference's answers so far: next turns and stops are made from them.
    """
    for repeat in range(scale):
        tag = f"{repeat}/" if repeat else ""
        yield _lengths(tag, repeat, 1, "alone", LENGTHS[2:8], OUTPUTS[2:8])
        yield _lengths(tag, repeat, 8, "together", LENGTHS, OUTPUTS)
        yield _shared_prefixes(tag, repeat)
        yield _next_turn(tag, repeat, base, "together", "turn2")
        yield _next_turn(tag, repeat, base, "turn2", "turn3")
        yield _identical(tag, repeat)
        yield _stops(tag, repeat, base)
        yield _streams(tag, repeat)
        yield _features(tag, repeat)
        yield from _penalties(tag, repeat)
        yield _lengths(tag, repeat, 8, "flushed", LENGTHS[6:], OUTPUTS[:6], flush=True)


def _lengths(tag, repeat, concurrency, name, lengths, outputs, flush=False) -> Phase:
    calls = [
        Call(f"{tag}{name}/{n}+{m}", tokens(1000 * repeat + n, n), m, ANY_END)
        for n, m in zip(lengths, outputs, strict=True)
    ]
    return Phase(name, calls, concurrency, flush)


def _shared_prefixes(tag, repeat) -> Phase:
    calls = []
    for group in range(3):
        prefix = tokens(7000 + 10 * repeat + group, 300 + 250 * group)
        for member in range(4):
            suffix = tokens(7100 + 100 * repeat + 10 * group + member, 9 + 23 * member)
            calls.append(Call(f"{tag}shared/{group}.{member}", prefix + suffix, 48, ANY_END))
    return Phase("shared", calls, 6)


def _next_turn(tag, repeat, base, previous, name) -> Phase:
    """The previous prompt and answer, and something new to say."""
    calls = []
    for n, m in zip(LENGTHS[3:9], OUTPUTS[3:9], strict=True):
        prompt = tokens(1000 * repeat + n, n) + base[f"{tag}together/{n}+{m}"].ids
        if previous == "turn2":
            prompt += tokens(8000 + n + repeat, 20) + base[f"{tag}turn2/{n}"].ids
            prompt += tokens(8500 + n + repeat, 6)
        else:
            prompt += tokens(8000 + n + repeat, 20)
        calls.append(Call(f"{tag}{name}/{n}", prompt, 40, ANY_END))
    return Phase(name, calls, 3)


def _identical(tag, repeat) -> Phase:
    prompt = tokens(9000 + repeat, 350)
    calls = [Call(f"{tag}identical/{i}", prompt, 36, ANY_END) for i in range(6)]
    # n = 4 answers with a list; the suite compares the first, the counters tell about spans.
    calls.append(Call(f"{tag}identical/n4", prompt[:-1], 36, {**ANY_END, "n": 4}))
    return Phase("identical", calls, 3)


def _stops(tag, repeat, base) -> Phase:
    """Stops that fall inside a round: on tokens and strings of known answers."""
    calls = []
    for n, m in zip(LENGTHS, OUTPUTS, strict=True):
        answer = base[f"{tag}together/{n}+{m}"]
        if len(answer.ids) < 30:
            continue
        prompt = tokens(1000 * repeat + n, n)
        token = answer.ids[len(answer.ids) // 2]
        text = answer.text[len(answer.text) // 3 :][:6]
        for kind, params in (
            ("token", {"stop_token_ids": [token]}),
            ("string", {**ANY_END, "stop": [text]}),
        ):
            calls.append(Call(f"{tag}stop/{kind}/{n}", prompt, m, params, expect=ANYTHING))
    return Phase("stops", calls, 4)


def _streams(tag, repeat) -> Phase:
    calls = [
        Call(f"{tag}stream/{n}", tokens(6000 + repeat + n, n), 70, ANY_END, {"stream": True})
        for n in (90, 300, 620, 1500)
    ]
    return Phase("streams", calls, 4)


def _features(tag, repeat) -> Phase:
    """What is decoded plainly, in one batch with requests that draft."""
    greedy = [
        Call(f"{tag}beside/{n}", tokens(5000 + repeat + n, n), 90, ANY_END) for n in (150, 480, 900)
    ]
    special = {
        "penalty": [("least", {"min_new_tokens": 30}, {})],
        "logit_bias": [("bias", {"logit_bias": {"500": 6.0, "600": 5.0}}, {})],
        "grammar": [("regex", {"regex": "(yes|no|maybe)( [a-z]{1,8}){3,9}"}, {})],
        "logprob": [("logprob", {}, {"return_logprob": True, "top_logprobs_num": 2})],
        "sampling": [
            ("temperature", {"temperature": 0.9}, {}),
            ("top_p", {"temperature": 0.7, "top_p": 0.8}, {}),
        ],
    }
    calls = list(greedy)
    for reason, kinds in special.items():
        for i, (name, params, options) in enumerate(kinds):
            calls.append(
                Call(
                    f"{tag}feature/{name}",
                    tokens(4000 + repeat + len(calls), 200 + 90 * i),
                    45,
                    {**ANY_END, **params},
                    options,
                    expect=reason,
                    compared=reason != "sampling",
                )
            )
    return Phase("features", calls, 8)


def _penalties(tag, repeat) -> Iterable[Phase]:
    """Each beside one request that drafts, and joined by none.

    Under overlap scheduling SGLang's penalties count the token before the last one, but the last
    one at the step after somebody's prefill, so a request that joins changes its neighbours'
    tokens in the unmodified server as well.
    """
    for i, (name, value) in enumerate(PENALTIES.items()):
        yield Phase(
            "penalties",
            [
                Call(
                    f"{tag}{name}",
                    tokens(4500 + repeat + i, 230 + 90 * i),
                    45,
                    {**ANY_END, name: value},
                    expect="penalty",
                )
            ],
            companion=Call(f"{tag}{name}/beside", tokens(4600 + repeat + i, 300 + i), 250, ANY_END),
        )


def penalties_together(base: Answers) -> Iterable[Phase]:
    """Penalties joined by others, for servers without overlap scheduling, where that is exact."""
    calls = [
        Call(
            f"together/{name}/{i}",
            tokens(4700 + 10 * i + j, 150 + 80 * i),
            60 + 10 * i,
            {**ANY_END, name: value},
            expect="penalty",
        )
        for i in range(2)
        for j, (name, value) in enumerate(PENALTIES.items())
    ]
    beside = [
        Call(f"together/beside/{i}", tokens(4800 + i, 200 + 90 * i), 90, ANY_END) for i in range(4)
    ]
    mixed = [call for pair in zip(calls, beside, strict=False) for call in pair] + calls[4:]
    yield Phase("penalties together", mixed, 5)
