"""Tests that import SGLang on a machine without a GPU."""

from __future__ import annotations

import pytest

from sglang_vericache.cpu import engine


def required() -> None:
    """Skip the calling test file in a process that SGLang's CPU engine was not switched on for;
    test_cpu_engine.py runs it in one of its own."""
    if not engine.in_use():
        pytest.skip(
            f"needs {engine.SWITCH}=1 from the start; test_cpu_engine.py runs this file",
            allow_module_level=True,
        )
