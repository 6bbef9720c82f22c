"""Stand-in for SGLang's kernel library on machines without a GPU.

The published wheel of sgl_kernel loads libcuda when it is imported, so SGLang's CPU engine dies
before it serves. With this folder in front of it on PYTHONPATH the import works; the few CPU
functions that a dense model reaches with the torch_native backend are here in torch, and any
other says its name when it is called. Both servers of a comparison get it alike.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import sys
import types

import torch

__path__: list[str] = []  # type: ignore[no-redef]  # a package without folders


class MissingKernel:
    """A name of the library that this stand-in does not have; calling it says so."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return MissingKernel(f"{self.__name__}.{attribute}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(
            f"{self.__name__} needs SGLang's compiled kernel library, which does not load on this "
            "machine (no libcuda). The stand-in for it serves dense models with "
            "--attention-backend torch_native only."
        )


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
) -> None:
    """Write each request's new slots into its row, from start to end offset."""
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc) -> None:
    """Copy rows of all buffers; the pools warm this up when they are built."""
    pairs = [(t, s) for t, s in zip(tgt_loc.tolist(), src_loc.tolist(), strict=True) if t != s]
    for pointer, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(pointer + source * stride, stride) for _, source in pairs]
        for (target, _), row in zip(pairs, rows, strict=True):
            ctypes.memmove(pointer + target * stride, row, stride)


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    return MissingKernel(f"sgl_kernel.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every ``import sgl_kernel.something`` gives a module of missing kernels."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def missing(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return MissingKernel(f"{spec.name}.{name}")

        module.__getattr__ = missing  # type: ignore[method-assign]  # PEP 562
        return module

    def exec_module(self, module) -> None:
        module.__path__ = []


if torch.cuda.is_available():
    raise ImportError(
        "the CPU stand-in for sgl_kernel is on PYTHONPATH of a machine with a GPU: remove "
        "sglang_vericache/cpu/kernel_library from it"
    )
sys.meta_path.insert(0, _Submodules())
