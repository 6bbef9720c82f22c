"""The documentation says what the code says. MkDocs is not needed: `make docs` runs that."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from sglang_vericache import PINNED_SGLANG
from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.registry import SCORERS
from sglang_vericache.config import VeriCacheConfig
from sglang_vericache.flags import FLAGS, NAMES
from sglang_vericache.prometheus import METRICS
from sglang_vericache.sources import option_of, variable_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
# A sentence of the source with this in place of what it fills in; pages write it so as well.
GAP = "…"


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
BUILT = {name: generate.on_page_markdown(text) for name, text in PAGES.items()}


def test_flags():
    """Catches a flag, key or variable that is missing, and a default that is not the real one."""
    page = BUILT["flags.md"]
    defaults = {f.name: f.default for f in fields(VeriCacheConfig)}
    for name in NAMES:
        assert f"<code>{option_of(name)}</code>" in page
        assert f"<code>{name}</code>" in page
        assert variable_of(name) in page or name == "enable_vericache"
    assert "SGLANG_VERICACHE_ENABLE" in page
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines()}
    for flag in FLAGS:
        line, default = lines[f"<code>{flag.option}</code>"], defaults[flag.config_field]
        assert flag.help in line
        words = {"None": "none", "True": "<code>on</code>", "False": "<code>off</code>"}
        shown = words.get(str(default), f"<code>{default}</code>")
        assert f"| {shown} |" in line and line.count("|") == 5


def test_metrics():
    """Catches a metric or a counter that the page does not explain."""
    for metric in METRICS:
        line = next(x for x in BUILT["metrics.md"].splitlines() if f"{metric.full_name}<" in x)
        assert metric.help in line and f"| {metric.kind} |" in line
    assert "scored_without" in BUILT["metrics.md"] and "rows_full" in BUILT["metrics.md"]


@pytest.mark.parametrize("name", SCORERS)
def test_compressors(name):
    """Catches a compressor or a parameter without a line."""
    page, scorer = BUILT["compressors.md"], SCORERS[name]
    line = next(x for x in page.splitlines() if x.startswith(f"| <code>{name}</code>"))
    assert f"| {scorer.scope} |" in line and scorer.granularity in line
    assert f"https://arxiv.org/abs/{scorer.paper.split()[-1]}" in line
    for field in fields(scorer):
        assert f"<code>{name}:{field.name}={field.default}</code>" in page


@pytest.mark.parametrize("page", PAGES)
def test_everything_is_generated(page):
    """Catches a marker that stays in the page, a value left blank, and an unfilled placeholder."""
    assert "<!--" not in re.sub(r"`[^`]*`", "", BUILT[page])
    assert not re.search(r"%[A-Z]{3,}%|\bTODO\b|MISSING", BUILT[page])
    assert "/work/" not in BUILT[page] and "/tmp" not in BUILT[page]


def test_unknown_marker():
    """Catches a marker with a spelling mistake that would be left out silently."""
    with pytest.raises(KeyError):
        generate.on_page_markdown("<!-- generated: flag -->")


def test_every_section_is_shown():
    """Catches generated text that no page asks for."""
    asked = {name for text in PAGES.values() for name in generate.MARKER.findall(text)}
    assert asked == set(generate.SECTIONS)


def test_rows(tmp_path, monkeypatch):
    """Catches a ratio without its spread, or without a flag that explains it; a metric that is left
    out; a missing folder."""
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.speed().startswith("No row") and generate.exactness().startswith("No row")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    row = {
        "case": "c",
        "metric": "decode_rate",
        "value": 50.0,
        "baseline": 200.0,
        "model": "m",
        "gpu": "g",
        "flags": "--enable-metrics --enable-vericache --vericache-horizon 8",
        "simulated_acceptance": None,
        "tokens_per_round": 3.5,
        "note": "2 repetitions (40-60)",
        "commit": "abc",
        "date": "2026-01-01",
    }
    (results / "a.jsonl").write_text(json.dumps(row) + "\n")
    last = generate.speed().splitlines()[-1]
    assert last.startswith(
        "| c | decode rate | m | g | 200 | 50 | 0.25 | 3.5 | 2 repetitions (40-60) |"
    )
    assert row["flags"] in last and "abc, 2026-01-01" in last
    (results / "a.jsonl").write_text(json.dumps(row | {"simulated_acceptance": "of 8B"}) + "\n")
    assert "| c (simulated acceptance: of 8B) |" in generate.speed()
    both = [row | {"metric": metric} for metric in ("closed_loop_rate", "fixed_set_rate")]
    (results / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in both))
    fixed, loop = generate.speed().splitlines()[-2:]
    assert fixed.startswith("| c | fixed set rate") and loop.startswith("| c | closed loop rate")


def test_rescored_rows(tmp_path, monkeypatch):
    """Catches a mismatch or a near tie that the page does not show."""
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.rescored().startswith("No row")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    row = {
        "case": "c",
        "metric": "first_differences",
        "value": 2.5,
        "baseline": 2.0,
        "model": "m",
        "gpu": "g",
        "flags": "--a",
        "near_ties": 17,
        "mismatches": 3,
        "note": "512 outputs",
        "commit": "abc",
        "date": "2026-01-01",
    }
    (results / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert "| c | m | g | 2.5 | 2 | 17 | 3 | 512 outputs |" in generate.rescored()


def test_example_compressor(monkeypatch):
    """Catches an example that does not run, or breaks the rules it stands beside."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGES["writing-a-compressor.md"], re.DOTALL)
    namespace = {"__name__": "docs_example"}
    monkeypatch.setitem(sys.modules, "docs_example", type(sys)("docs_example"))
    exec(compile(source, "writing-a-compressor.md", "exec"), namespace)
    scorer = namespace["ValueNorm"]()
    keys, values = torch.randn(7, 3, 8), torch.randn(7, 3, 8)
    scores = scorer.score(ScoreInputs(keys, values, 0, 1.0))
    wanted = [[float(values[t, h].square().sum() ** 0.5) for t in range(7)] for h in range(3)]
    torch.testing.assert_close(scores, torch.tensor(wanted))
    layers = scorer.score(ScoreInputs(keys.expand(2, 7, 3, 8), values.expand(2, 7, 3, 8), 0, 1.0))
    assert torch.equal(layers, scores.expand(2, 3, 7))
    with pytest.raises(ValueError, match="order=0"):
        namespace["ValueNorm"](order=0)


def sentences_of_the_source() -> list[str]:
    """Every text in the source, GAP where it fills something in."""
    found = []
    for folder in ("sglang_vericache", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", GAP) for part in node.values]
                    found.append("".join(p if isinstance(p, str) else GAP for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sd]|%\.\d+f", GAP, node.value))
    return found


SENTENCES = sentences_of_the_source()
QUOTED = re.findall(r"^### `(.*)`$", PAGES["troubleshooting.md"], re.MULTILINE)


def occurs(quoted: str) -> bool:
    """Whether a sentence of the source reads so, its gaps filled with anything."""
    pattern = ".+?".join(map(re.escape, quoted.strip(GAP).split(GAP)))
    return any(re.search(pattern, sentence, re.DOTALL) for sentence in SENTENCES)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_sentences(quoted):
    """Catches a sentence that was reworded: nobody would find it by searching."""
    assert occurs(quoted)


def test_quotes_are_compared():
    """Catches a comparison that holds for everything."""
    assert len(QUOTED) >= 30 == len(set(QUOTED[:30]))
    assert PAGES["troubleshooting.md"].count("\n### ") == len(QUOTED)
    assert not occurs("--enable-vericache needs sglang==…, lost …")
    assert not occurs("… is outside [0, 1]")


def test_reasons():
    """Catches a reason for plain tokens that the page lacks, and one that no longer exists."""
    tree = ast.parse((ROOT / "sglang_vericache" / "support.py").read_text())
    constants = {
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    function = next(n for n in tree.body if getattr(n, "name", "") == "_extra_of")
    pairs = [n for n in ast.walk(function) if isinstance(n, ast.Tuple) and len(n.elts) == 2]
    constants |= {p.elts[1].value for p in pairs if isinstance(p.elts[1], ast.Constant)}
    section = PAGES["metrics.md"].split("## Reasons for plain tokens")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == constants


def test_pages_are_listed():
    """Catches a page that the menu lacks."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [name for entry in settings["nav"] for name in entry.values()]
    assert sorted(listed) == sorted(PAGES) and settings["strict"] is True


def test_the_image_is_the_pinned_release():
    """Catches an image of another SGLang than the one that the package asks for."""
    (tag,) = re.findall(
        r"^FROM lmsysorg/sglang:v(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"sglang=={tag}" in project["dependencies"] and tag == PINNED_SGLANG
    assert f"SGLang {tag}" in PAGES["index.md"]
