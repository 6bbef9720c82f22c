"""Getting SGLang's CPU engine to run where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

import torch

from sglang_vericache.config import VeriCacheConfigError

KERNEL_LIBRARY = Path(__file__).parent / "kernel_library"
# SGLang caches is_cpu() before plugins load, so the switch must be set when Python starts.
SWITCH = "SGLANG_USE_CPU_ENGINE"
_ONCE = "_SGLANG_VERICACHE_RESTARTED"


def environment(base: dict[str, str]) -> dict[str, str]:
    """``base`` with what the CPU engine needs, the same for both servers of a comparison."""
    path = [str(KERNEL_LIBRARY), *filter(None, base.get("PYTHONPATH", "").split(os.pathsep))]
    return base | {SWITCH: "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def in_use() -> bool:
    """Whether SGLang runs its CPU engine in this process."""
    return os.environ.get(SWITCH) == "1"


def uses_stand_in() -> bool:
    spec = importlib.util.find_spec("sgl_kernel")
    return spec is not None and str(KERNEL_LIBRARY) in str(spec.origin)


def _missing() -> bool:
    return not torch.cuda.is_available() and not in_use()


def ensure_server() -> None:
    """Restart this command once with the CPU engine's environment, where a GPU is missing."""
    if not _missing():
        return
    if os.environ.get(_ONCE):
        raise VeriCacheConfigError(f"{SWITCH} did not survive a restart: set it in the shell.")
    command = [sys.executable, *sys.orig_argv[1:]]
    print(
        f"No GPU: restarting with SGLang's CPU engine ({SWITCH}=1 and a stand-in for sgl_kernel).",
        file=sys.stderr,
        flush=True,
    )
    os.execve(sys.executable, command, environment(dict(os.environ)) | {_ONCE: "1"})


def ensure_library_user() -> None:
    """A user's own process cannot be restarted: say what to type.

    Raises:
        VeriCacheConfigError: the CPU engine is needed and not on.
    """
    if _missing():
        values = environment({})
        line = " ".join(f"{key}={shlex.quote(value)}" for key, value in values.items())
        raise VeriCacheConfigError(
            f"No GPU, and SGLang's CPU engine must be on before Python starts. Start with: "
            f"{line} python {shlex.quote(sys.argv[0] or 'your_program.py')}"
        )


def default_attention_backend() -> str | None:
    """The backend where SGLang's own default (intel_amx) needs kernels the stand-in lacks."""
    return "torch_native" if in_use() and uses_stand_in() else None
