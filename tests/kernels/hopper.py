"""Compiling recorded launches for an H100 on a machine without one.

The interpreter runs Python: it accepts kernels that do not compile, and knows neither registers nor
shared memory. Triton brings its own assembler, so all of that can be seen without a GPU.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_BYTES = 227 * 1024  # that a program can have
# Of a multiprocessor; and what each program on it takes beside its own shared memory.
REGISTERS, THREADS, SHARED_BYTES_SM, RESERVED_BYTES = 65536, 2048, 228 * 1024, 1024
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


def record_launches(monkeypatch) -> list[Launch]:
    """Launches are written down from now on instead of run."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        options = {name: named.pop(name) for name in OPTIONS & named.keys()}
        launches.append(Launch(self, named, options))

    monkeypatch.setattr(JITFunction, "run", run)
    return launches


def compile_for_hopper(launch: Launch, folder: Path) -> Compiled:
    """Compile as `launch` would on an H100, and read what the assembler says of it."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name], aligned = _type_of(value, parameter)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    name = launch.function.fn.__name__
    return Compiled(name, int(registers), int(stack), kernel.metadata.shared, kernel.asm["ptx"])


def _type_of(value: Any, parameter) -> tuple[str, bool]:
    """Type in the signature, and whether a multiple of 16 may be assumed."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        known = not parameter.do_not_specialize_on_alignment
        return POINTERS[value.dtype], known and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    return "i32", value % 16 == 0 and not parameter.do_not_specialize
