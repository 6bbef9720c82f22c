"""The parts of these pages that are read from the code, and MkDocs's hook that puts them in.

A page holds ``<!-- generated: NAME -->`` where the text of ``SECTIONS[NAME]`` belongs.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from sglang_vericache.compressors.base import ScoreInputs, Scorer
from sglang_vericache.compressors.registry import SCORERS
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.flags import CONFIG_HELP, FLAGS, SWITCH_HELP
from sglang_vericache.forecast.shape import KNOWN
from sglang_vericache.host_tier import CONTRADICTIONS
from sglang_vericache.kernels.pool_format import create_format
from sglang_vericache.metrics import DraftCounters, RowBytes, SpanCounters
from sglang_vericache.pool.sizing import draft_share_bytes
from sglang_vericache.prometheus import METRICS
from sglang_vericache.request_options import RequestOptions
from sglang_vericache.sources import (
    CONFIG,
    SWITCH,
    SWITCH_VARIABLE,
    key_of,
    option_of,
    variable_of,
)
from sglang_vericache.support import ACCEPTED, EXCLUDED, accepted_words

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """MkDocs calls this with the text of every page."""
    return MARKER.sub(lambda match: SECTIONS[match[1]](), markdown)


def attributes_of(documented: type) -> dict[str, str]:
    """The "Attributes:" of a docstring: name -> text; ``a, b: text`` describes both."""
    _, _, listed = (documented.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        start = re.match(r" {4,8}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif not line.strip():
            break
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "`") for name, text in found.items()}


def rows_of(metric: str) -> list[dict[str, Any]]:
    """The rows about ``metric`` in benchmarks/results."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row for row in rows if row["metric"] == metric]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def code(text: Any) -> str:
    """A code span; as HTML, because a bar would end the cell of a table."""
    return f"<code>{html.escape(str(text)).replace('|', '&#124;')}</code>"


def flags() -> str:
    defaults = {f.name: f.default for f in fields(VeriCacheConfig)}
    rows = [
        (code("--enable-vericache"), "", "off", SWITCH_HELP),
        (code(option_of(CONFIG)), code("FILE|JSON"), "none", CONFIG_HELP),
    ]
    for flag in FLAGS:
        default = defaults[flag.config_field]
        if isinstance(default, bool):
            default = "on" if default else "off"
        shown = "none" if default is None else code(default)
        rows.append((code(flag.option), code(flag.metavar), shown, flag.help))
    return table(("flag", "value", "default", "meaning"), rows)


def names() -> str:
    rows = [(code(SWITCH), "", code(SWITCH_VARIABLE))]
    rows.append((code(CONFIG), "", code(variable_of(CONFIG))))
    rows += [(code(f.name), code(key_of(f.name)), code(variable_of(f.name))) for f in FLAGS]
    return table(("keyword of `sgl.Engine`", "key in a config file", "environment variable"), rows)


def request_options() -> str:
    meanings = attributes_of(RequestOptions)
    rows = []
    for field in fields(RequestOptions):
        default = "the server's" if field.default is None else json.dumps(field.default)
        meaning = meanings[field.name].replace("; None: as the server's", "")
        rows.append((code(field.name), default, meaning))
    return table(("key", "default", "meaning"), rows)


def response_counters() -> str:
    meanings = attributes_of(DraftCounters)
    derived = {
        "tokens_per_round": "tokens that a round produced on average; null without rounds.",
        "rows_read": "draft_rows_read and full_rows_read together.",
        "bytes_read": "the same in bytes; the draft pool may store less of a row.",
        "bytes_full": "rows_full in bytes.",
    }
    described = DraftCounters().describe(RowBytes(1, 1))
    return table(("key", "meaning"), [(code(k), (meanings | derived)[k]) for k in described])


def span_counters() -> str:
    return table(
        ("key", "meaning"), [(code(k), text) for k, text in attributes_of(SpanCounters).items()]
    )


def metrics() -> str:
    rows = [(code(m.full_name), m.kind, code(m.label) if m.label else "", m.help) for m in METRICS]
    return table(("metric", "kind", "own label", "meaning"), rows)


def compressors() -> str:
    rows = []
    for name, scorer in SCORERS.items():
        parameters = [f"{code(f.name)} ({f.default})" for f in fields(scorer)]
        needs = ", ".join(sorted(scorer.needs)) or "nothing"
        cells = (code(name), _first_sentence(scorer), scorer.scope, needs, scorer.granularity)
        rows.append((*cells, ", ".join(parameters), _paper(scorer.paper)))
    head = ("name", "score of a token", "scope", "needs", "granularity", "parameters", "source")
    return table(head, rows)


def compressor_parameters() -> str:
    rows = []
    for name, scorer in SCORERS.items():
        meanings = attributes_of(scorer)
        rows += [
            (code(f"{name}:{f.name}={f.default}"), meanings[f.name])
            for f in fields(scorer)
            if f.default is not MISSING
        ]
    return table(("parameter and its default", "meaning"), rows)


def declarations() -> str:
    return table(
        ("class variable", "meaning"),
        [(code(k), text) for k, text in attributes_of(Scorer).items()],
    )


def score_inputs() -> str:
    rows = [(code(k), text) for k, text in attributes_of(ScoreInputs).items()]
    return table(("field", "meaning"), rows)


def _first_sentence(scorer: type) -> str:
    paragraph = (scorer.__doc__ or "").strip().split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(paragraph.split()), maxsplit=1)[0]


def _paper(text: str) -> str:
    return re.sub(r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


# Of requests that all run at once, and of queues.
ALL_RUN = ("decode_rate", "fixed_set_rate", "closed_loop_rate")
SPEEDS = (*ALL_RUN, "queue_rate", "queue_rate_of_attached")


def speed() -> str:
    """Every row with its spread, all its flags and where it is from: a ratio alone misleads."""
    found = [row for metric in SPEEDS for row in rows_of(metric) if row["baseline"]]
    found.sort(key=lambda row: row["case"])  # stable: the metrics of a case in their order
    rows = [
        (
            row["case"] + _simulated(row),
            row["metric"].replace("_", " "),
            row["model"],
            row["gpu"],
            f"{row['baseline']:,.0f}",
            f"{row['value']:,.0f}",
            f"{row['value'] / row['baseline']:.2f}",
            row["tokens_per_round"] or "",
            html.escape(row["note"]).replace("|", "&#124;"),
            code(row["flags"]),
            f"{row['commit']}, {row['date']}",
        )
        for row in found
    ]
    if not rows:
        return "No row holds a speed yet."
    head = ("case", "metric", "model", "device", "without, tokens/s", "with", "ratio")
    rest = ("tokens a round", "repetitions and outputs", "flags", "commit and date")
    return table((*head, *rest), rows)


def exactness() -> str:
    rows = [
        (
            row["case"],
            row["model"],
            row["gpu"],
            code(row["flags"]),
            f"{row['value']:g} of {row['baseline']:g}",
            row["mismatches"],
            row["near_ties"],
        )
        for row in rows_of("identical_outputs")
    ]
    if not rows:
        return "No row holds such a comparison yet."
    head = ("case", "model", "device", "flags", "identical", "mismatches", "near ties")
    return table(head, rows)


def _simulated(row: dict[str, Any]) -> str:
    label = row["simulated_acceptance"]
    return "" if label is None else f" (simulated acceptance: {html.escape(label)})"


def rescored() -> str:
    """Level E1: first differences, and what the unmodified server says of our tokens."""
    rows = [
        (
            row["case"],
            row["model"],
            row["gpu"],
            f"{row['value']:g}",
            f"{row['baseline']:g}",
            row["near_ties"],
            row["mismatches"],
            html.escape(row["note"]).replace("|", "&#124;"),
            code(row["flags"]),
            f"{row['commit']}, {row['date']}",
        )
        for row in rows_of("first_differences")
    ]
    if not rows:
        return "No row holds such a comparison yet."
    head = ("case", "model", "device", "first differences in 1000 tokens", "without the flag")
    return table(
        (*head, "near ties", "mismatches", "compared", "flags", "commit and date"),
        rows,
    )


def selection() -> str:
    agreement = {r["case"]: r["value"] for r in rows_of("agreement_with_whole_covariance")}
    rows = [
        (row["case"], row["model"], f"{row['value']:.1%}", f"{agreement[row['case']]:.0%}")
        for row in rows_of("attention_lost")
    ]
    return table(
        ("case", "model", "attention lost", "same tokens as with the whole covariance"), rows
    )


def rooms() -> str:
    """The folders of the plugin by the first line of their docstring."""
    package = ROOT / "sglang_vericache"
    found = {f"sglang_vericache/{p.parent.name}/": p for p in sorted(package.glob("*/__init__.py"))}
    found["kernels/"] = ROOT / "kernels" / "__init__.py"
    return table(("folder", "holds"), [(code(k), _headline(path)) for k, path in found.items()])


def files() -> str:
    """The files beside the rooms."""
    paths = sorted((ROOT / "sglang_vericache").glob("*.py"))
    rows = [(code(path.name), _headline(path)) for path in paths if path.name[0] != "_"]
    return table(("file", "holds"), rows)


def _headline(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").replace("|", "&#124;")


def server_settings() -> str:
    """What SGLang's other flags may be beside ours."""
    rows = [(code(flag), accepted_words(attribute, values)) for attribute, values, flag in ACCEPTED]
    rows += [(code(flag), "left out") for _, flag in EXCLUDED]
    rows += [
        (code(flag), f"{'left out' if not value else value}, with `--vericache-offload`")
        for attribute, value, flag in CONTRADICTIONS
        if attribute not in {known for known, *_ in ACCEPTED}
    ]
    return table(("flag", "accepted"), rows)


def draft_shares() -> str:
    """Of the KV memory, for models of a known shape."""
    rows = []
    for shape in KNOWN.values():
        shares = []
        for name in ("bfloat16", "fp8_e4m3", "int4"):
            draft_row = shape.rows * create_format(name, torch.bfloat16, shape.head_dim).row_bytes(
                shape.head_dim
            )
            # For the share of a memory of 400,000 tokens, whose rows are equally large.
            budget = 400_000 * shape.token_bytes
            taken = draft_share_bytes(VeriCacheConfig(), budget, shape.token_bytes, draft_row)
            shares.append(f"{taken / budget:.0%}")
        rows.append((shape.name, f"{shape.token_bytes / 1024:.0f} KiB", *shares))
    return table(("model", "full KV of a token", "bfloat16", "fp8_e4m3", "int4"), rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "flags": flags,
    "names": names,
    "request-options": request_options,
    "response-counters": response_counters,
    "span-counters": span_counters,
    "metrics": metrics,
    "compressors": compressors,
    "compressor-parameters": compressor_parameters,
    "declarations": declarations,
    "score-inputs": score_inputs,
    "speed": speed,
    "exactness": exactness,
    "rescored": rescored,
    "selection": selection,
    "server-settings": server_settings,
    "draft-shares": draft_shares,
    "rooms": rooms,
    "files": files,
}
