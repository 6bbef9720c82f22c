"""What the demo writes with --json."""

from __future__ import annotations

import json
from dataclasses import fields

from sglang_vericache.demo.comparison import Run, as_json
from sglang_vericache.demo.programs import Record

COUNTERS = {"rounds": 2, "accepted": 5, "drafted": 32}


def record(counters: dict | None) -> Record:
    """A record whose other fields are of no interest."""
    values = {field.name: 1 for field in fields(Record)}
    values |= {"name": "summary", "text": "a b", "output_ids": [1, 2], "counters": counters}
    return Record(**values)


def test_as_json():
    """Catches a --json that fails after the whole demo has run."""
    reference, ours = (Run([record(c)], 1, 1.0) for c in (None, COUNTERS))
    written = json.loads(json.dumps(as_json(reference, ours)))
    assert written["drafting"] == {"summary": COUNTERS}
    assert written["problems"] == []
