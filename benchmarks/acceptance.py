"""How far drafts stand on a real model and real text: ``python -m benchmarks.acceptance``.

Eight chat prompts of about 2,000 tokens, of the kinds of the acceptance study (needle questions,
summaries, code, later turns), greedy. Tokens a round are reported for all of them and for those
whose output repeats at most 30 % of its 8-grams: loops make drafts look better than they are.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from pathlib import Path
from typing import Any

import requests
from transformers import AutoTokenizer

from benchmarks.rows import Row, append
from sglang_vericache.compressors.registry import SCORERS
from sglang_vericache.demo.model import default_cache_dir, prepare_model
from sglang_vericache.demo.server import Server, reach_directly

PROMPT_TOKENS, OUTPUT_TOKENS = 2000, 192
MOST_REPEATED = 0.3
NEEDLE = " The secret number for Lisbon is 48213. Remember it. "


def prompts(tokenizer) -> list[list[int]]:
    """Token ids of eight prompts."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    prose = tokenizer.encode(
        "\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False
    )
    code = tokenizer.encode(inspect.getsource(textwrap) + inspect.getsource(argparse))

    def text(tokens: list[int], start: int) -> str:
        return tokenizer.decode(tokens[start : start + PROMPT_TOKENS])

    def with_needle(document: str) -> str:
        middle = document.index(". ", len(document) // 2) + 1
        return document[:middle] + NEEDLE + document[middle:]

    chats = [
        [
            with_needle(text(prose, 0)) + "\n\nWhat is the secret number for Lisbon? Then say what "
            "the rest of the text is about."
        ],
        [
            with_needle(text(prose, 9000)) + "\n\nName the secret number for Lisbon and summarize "
            "the text around it."
        ],
        [text(prose, 20000) + "\n\nSummarize the text above in five sentences."],
        [text(prose, 31000) + "\n\nWhat is the text above about? Explain it to a beginner."],
        [text(code, 0) + "\n\nExplain in words what the code above does."],
        [text(code, 2500) + "\n\nWhich functions does the code above define, and what for?"],
        [
            text(prose, 42000) + "\n\nWhat is the text above about?",
            "It is about rules of the Python language.",
            "Which rules exactly? Name and explain three of them.",
        ],
        [
            text(prose, 53000) + "\n\nSummarize the text above.",
            "The text describes a part of the Python language.",
            "Say it again with more detail and an example.",
        ],
    ]
    made = []
    for chat in chats:
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles, chat, strict=False)]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        made.append(tokenizer.encode(rendered, add_special_tokens=False))
    return made


def repeated_share(ids: list[int], width: int = 8) -> float:
    """Share of the n-grams of ``ids`` that occurred before."""
    grams = [tuple(ids[i : i + width]) for i in range(len(ids) - width + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def run(server: Server, made: list[list[int]]) -> list[dict]:
    replies = []
    for ids in made:
        body: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS},
        }
        reply = requests.post(server.url + "/generate", json=body, timeout=900)
        reply.raise_for_status()
        replies.append(reply.json())
    return replies


def report(flags: str, model: Path, expected: list[dict], found: list[dict], rows: bool) -> None:
    """Print a table of the prompts, and append a row for all and one for those without loops."""
    honest = {"rounds": 0, "tokens": 0}
    total = {"rounds": 0, "tokens": 0}
    mismatches = 0
    print(
        f"\n{flags}\n{'prompt':>7} {'output':>7} {'repeated':>9} {'tokens a round':>15} identical"
    )
    for a, b in zip(expected, found, strict=True):
        info, repeated = b["meta_info"]["vericache"], repeated_share(b["output_ids"])
        same = a["output_ids"] == b["output_ids"]
        mismatches += not same
        for sums in (total, honest) if repeated <= MOST_REPEATED else (total,):
            sums["rounds"] += info["rounds"]
            sums["tokens"] += info["accepted"] + info["rounds"]
        print(
            f"{b['meta_info']['prompt_tokens']:7} {len(b['output_ids']):7} {repeated:9.0%} "
            f"{info['tokens_per_round']:15} {'yes' if same else 'NO'}"
        )
    for name, sums in (("all", total), ("outputs without loops", honest)):
        value = sums["tokens"] / max(sums["rounds"], 1)
        print(f"tokens a round, {name}: {value:.2f}", flush=True)
        if rows:
            append(
                "acceptance.jsonl",
                Row(
                    case=f"8 prompts of 2K, {name}",
                    metric="tokens_per_round",
                    value=round(value, 3),
                    unit="tokens",
                    model=model.name,
                    flags=flags,
                    tokens_per_round=round(value, 3),
                    mismatches=mismatches,
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--flags",
        default="--vericache-keep-ratio 0.2 --vericache-keep-min 0 --vericache-horizon 16",
        help="of our server, beside the switch and the compressor",
    )
    parser.add_argument(
        "--compressors",
        nargs="+",
        metavar="NAME",
        default=["snapkv"],
        help="a server for each of these, or `all`",
    )
    parser.add_argument("--no-rows", action="store_true", help="print only")
    options = parser.parse_args()
    names = list(SCORERS) if options.compressors == ["all"] else options.compressors
    reach_directly()
    cache = default_cache_dir()
    model = Path(prepare_model(cache))
    made = prompts(AutoTokenizer.from_pretrained(str(model)))
    common = ("--max-total-tokens", "20000")
    reference_env = {"SGLANG_PLUGINS": "none"}
    with Server("reference", model, cache / "reference.log", common, reference_env) as server:
        expected = run(server, made)
    for name in names:
        flags = ("--enable-vericache", "--vericache-compressor", name, *options.flags.split())
        with Server("vericache", model, cache / "vericache.log", (*common, *flags)) as server:
            found = run(server, made)
        report(" ".join(flags), model, expected, found, not options.no_rows)


if __name__ == "__main__":
    main()
