"""Tables and plots say what the rows say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import render, rows, tables
from benchmarks.latest import latest_table
from benchmarks.rows import Row

ROW = Row(
    case="smol-1k-x32",
    metric="decode_rate",
    value=150.0,
    baseline=100.0,
    unit="tokens/s",
    model="smol",
    flags="--dtype bfloat16 --enable-vericache --vericache-draft-dtype int4",
    tokens_per_round=7.54,
    gpu="H100",
    commit="abcdef1",
    sglang="0.5.23",
    date="2026-01-02",
)
BLOCK = "before\n<!-- table: serving -->\nold\n<!-- /table -->\nafter\n"


def cells(text: str, case: str) -> list[dict[str, str]]:
    lines = [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:] if case in line[0]]


def test_newest():
    """Catches an old figure beside, or in place of, its repetition; and a repetition that
    replaces what was measured with other flags or on another machine."""
    later = replace(ROW, value=160.0)
    older = replace(ROW, value=1.0, date="2026-01-01")
    other_flags, other_gpu = replace(ROW, flags="--a"), replace(ROW, gpu="H200")
    other_metric = replace(ROW, metric="whole")
    turned = replace(ROW, flags="--enable-vericache --vericache-draft-dtype int4 --dtype bfloat16")
    shown = tables.newest([turned, ROW, other_flags, other_gpu, later, older, other_metric])
    assert shown == [later, other_flags, other_gpu, other_metric]


def test_order_of_cases():
    """Catches a table whose order is that of the measurements."""
    names = ("mine", "smol-1k-x1", "smol-7k7-x256")
    shown = tables.newest([replace(ROW, case=name) for name in names])
    assert [row.case for row in shown] == ["smol-7k7-x256", "smol-1k-x1", "mine"]


def test_serving_table():
    """Catches a factor that is upside down, and a goal that is not shown beside it."""
    text = tables.table("serving", [ROW, replace(ROW, flags=ROW.flags.replace("int4", "fp8"))])
    first, second = cells(text, "smol-1k-x32")
    assert first["factor"] == "1.50" and first["wanted"] == "0.98"
    assert first["without"] == "100" and first["with"] == "150"
    assert first["metric"] == "decode rate" and first["unit"] == "tokens/s"
    assert first["tokens a round"] == "7.5" and first["commit"] == "abcdef1"
    assert first["flags"] == "`--vericache-draft-dtype int4`"
    assert second["flags"] == "`--vericache-draft-dtype fp8`"
    assert "All with `--dtype bfloat16 --enable-vericache`." in text


def test_factor_of_times():
    """Catches a time that counts as gained because it is longer."""
    for unit in ("ms", "s", "in 1000 tokens"):
        assert tables.factor(replace(ROW, value=50.0, unit=unit)) == 2.0
    assert tables.factor(replace(ROW, value=0.0, unit="in 1000 tokens")) is None


@pytest.mark.parametrize("name", ["serving", "acceptance"])
def test_simulated_acceptance_shows_in_its_row(name):
    """Catches an imposed acceptance that passes for a measured one."""
    imposed = replace(ROW, case="imposed", simulated_acceptance="trace of 8B")
    text = tables.table(name, [ROW, imposed])
    assert "simulated acceptance: trace of 8B" in cells(text, "imposed")[0]["case"]
    assert "simulated" not in cells(text, "smol-1k-x32")[0]["case"]


def test_other_tables():
    """Catches columns that nobody fills, and a zero that passes for an empty cell."""
    row = replace(ROW, baseline=None, mismatches=0, flags="keep ratio 0.2", value=0.12345)
    (line,) = cells(tables.table("acceptance", [row]), "smol")
    assert line["mismatches"] == "0" and line["value"] == "0.1235"
    assert line["flags"] == "`keep ratio 0.2`"
    assert "baseline" not in line and "near ties" not in line


def test_fill():
    """Catches text around a block that is lost, and a second run that changes something."""

    def rows_of(name):
        return {"serving": [ROW], "acceptance": []}[name]

    text = BLOCK + BLOCK.replace("serving", "acceptance")
    once = render.fill(text, rows_of, ["serving", "acceptance"])
    assert once.count("before") == once.count("after") == 2 and "old" not in once
    assert "| 1.50 |" in once and "Nothing measured yet." in once
    assert render.fill(once, rows_of, ["serving", "acceptance"]) == once


@pytest.mark.parametrize(
    "text, says",
    [
        (BLOCK.replace("serving", "other"), "other"),
        (BLOCK.replace("<!-- /table -->", ""), "no <!-- /table -->"),
        (BLOCK.replace("<!-- /table -->", "") + BLOCK, "no <!-- /table -->"),
    ],
)
def test_bad_blocks(text, says):
    """Catches a block without an end that swallows the text up to the next one."""
    with pytest.raises(render.RenderError, match=says):
        render.fill(text, lambda _: [ROW], ["serving"])


def test_render_and_check(monkeypatch, tmp_path):
    """Catches a check that writes, and a link that only works from one folder."""
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(render, "read", lambda _: [ROW])
    monkeypatch.setattr(render, "known_tables", lambda: ["serving"])
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    for path in (readme, page):
        path.write_text(BLOCK)
    assert render.render_all(check=True, plots=False) == 1
    assert readme.read_text() == page.read_text() == BLOCK
    assert render.render_all(check=False, plots=False) == 0
    assert "](benchmarks/results/serving.jsonl)" in readme.read_text()
    assert "](../benchmarks/results/serving.jsonl)" in page.read_text()
    assert render.render_all(check=True, plots=False) == 0


def test_rows_of_the_repository():
    """Catches a results file with a line that is no row, or without its commit."""
    for name in tables.known_tables():
        for row in rows.read(f"{name}.jsonl"):
            assert row.commit and row.date and row.sglang and row.command, name


def test_plots(tmp_path):
    """Catches files that differ although the rows do not, and a hidden simulation."""
    pytest.importorskip("matplotlib")
    from benchmarks.plotting import draw

    imposed = replace(ROW, case="imposed", simulated_acceptance="trace")
    first = draw({"serving": [ROW, imposed]}, tmp_path / "a")
    second = draw({"serving": [ROW, imposed]}, tmp_path / "b")
    names = ("serving.svg", "serving.png", "speed-over-context.svg", "speed-over-context.png")
    assert [path.name for path in first] == list(names)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"simulated acceptance: trace" in first[0].read_bytes()
    assert draw({"serving": []}, tmp_path / "c") == []


def test_points_over_sizes():
    """Catches a latency among the rates, an ad-hoc case without sizes, and a hidden simulation."""
    pytest.importorskip("matplotlib")
    from benchmarks.plotting import _over_sizes, _points

    rows_ = [
        ROW,
        replace(ROW, case="8b-32k-x12", model="8B", simulated_acceptance="trace"),
        replace(ROW, case="ad-hoc"),
        replace(ROW, case="smol-mix", metric="between_tokens_p99", unit="ms"),
    ]
    points = _points(rows_)
    assert [(p.case.context, p.case.requests, p.simulated) for p in points] == [
        (1024, 32, False),
        (32768, 12, True),
    ]
    for panel in _over_sizes(points).axes:
        # One scatter a point; before the legend's entries, in the order of the models.
        real, hollow = panel.collections[:2]
        assert len(real.get_facecolor()) == 1 and len(hollow.get_facecolor()) == 0


def test_the_latest_rows_of_a_case_are_one_line():
    """Catches an older row beside a newer one of another device, rates of other conditions in the
    place of the main one, and a simulation that does not show."""
    older = replace(ROW, date="2026-11-01", gpu="H100", value=1.0)
    newer = replace(ROW, date="2026-11-02", gpu="H200", baseline=100.0, value=150.0)
    whole = replace(newer, metric="fixed_set_rate", value=50.0)
    shape = replace(newer, case="8b-32k-x12", simulated_acceptance="trace")
    latency = replace(newer, case="smol-mix", metric="first_token_p99", unit="ms")
    queue = replace(newer, case="x", metric="queue_rate", simulated_acceptance="trace")
    text = latest_table([newer, older, whole, shape, latency, queue])
    lines = [line for line in text.splitlines() if "H" in line]
    assert len(lines) == 4 and "H100" not in text
    assert "x (simulated acceptance: trace), queue rate" in lines[3]
    assert "| 1.50 | 0.98 | 0.50 | - |" in lines[0]
    assert "simulated acceptance: trace" in lines[1] and "smol-mix, first token p99" in lines[2]
    assert latest_table([]) == "Nothing measured yet."


def test_the_readme_has_its_table():
    """Catches an edit that takes the measured table with it: nothing else would miss the block."""
    text = (render.ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: latest -->\n| case |" in text
