"""Importing the package is cheap: SGLang loads it in every process, used or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = sorted(m for m in ("sglang", "torch", "triton", "transformers") if m in sys.modules)
cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
print(json.dumps([heavy, cuda]))
"""


def probe(*modules: str) -> tuple[list[str], bool]:
    """Heavy modules found after importing ``modules`` in a fresh interpreter, and whether CUDA
    was initialised."""
    command = [sys.executable, "-P", "-c", PROBE, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    heavy, cuda = json.loads(done.stdout)
    return heavy, cuda


@pytest.mark.parametrize(
    "module",
    [
        "sglang_vericache",
        "sglang_vericache.config",
        "sglang_vericache.flags",
        "sglang_vericache.sources",
        "sglang_vericache.request_options",
        "sglang_vericache.prometheus",
        "sglang_vericache.plugin",
        "sglang_vericache.server_fields",
        "sglang_vericache.cli",
    ],
)
def test_front_doors_import_nothing_heavy(module):
    """Catches an import at module level that makes every SGLang process, and every `--help`, pay
    for the plugin: not even torch is needed before the flag is used."""
    assert probe(module) == ([], False)


def test_tensor_code_needs_torch_only():
    """Catches pure modules that pull SGLang in by a detour, or touch a GPU when imported."""
    heavy, cuda = probe(
        "sglang_vericache.compressors.registry",
        "sglang_vericache.pool.sizing",
        "sglang_vericache.tree.view_builder",
        "sglang_vericache.rounds.accounting",
        "sglang_vericache.rounds.policy",
        "sglang_vericache.verify.accept",
        "sglang_vericache.verify.token_picker",
        "sglang_vericache.kernels.draft_attention",
    )
    assert "sglang" not in heavy and "transformers" not in heavy
    assert not cuda
