"""Four-bit integers after a Hadamard rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_vericache.kernels.formats.base import PoolFormat
from sglang_vericache.kernels.formats.hadamard import rotate, rotation_block

LARGEST_CODE = 15
CODE_STEP = 1 / LARGEST_CODE
# Smaller blocks spread too little, and their quarters are too short for aligned loads.
SMALLEST_BLOCK = 16
# Slots are allocated in multiples of this, so that layers of any row size start aligned.
SLOT_MULTIPLE = 16
HALF_LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Int4Format(PoolFormat):
    """Rotated keys and values, quantised asymmetrically for each token and kv head.

    number = zero + scale * code, code in 0..15. Storage tensors:

    - ``keys``, ``values``: ``[..., D / 4]`` int16, four codes a word. Within each rotation block of
      b dimensions, nibble p (from the lowest) of word j is the code of dimension p * b / 4 + j, so
      a nibble plane is a quarter of the block. Words, because tensor cores take 16-bit operands: a
      tile of words is loaded in the operand's layout, and one AND makes operands of two codes.
    - ``scales``: ``[..., 4]`` float16: scale and zero of the key, scale and zero of the value. One
      8-byte load fetches them.
    """

    @property
    def name(self) -> str:
        return "int4"

    def row_bytes(self, head_dim: int) -> int:
        _check(head_dim)
        return 2 * (head_dim // 4) * torch.int16.itemsize + 4 * torch.float16.itemsize

    def allocate(
        self, layers: int, slots: int, heads: int, head_dim: int, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        _check(head_dim)
        padded = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE

        def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
            whole = torch.zeros((layers, padded, heads, width), dtype=dtype, device=device)
            return whole[:, :slots]

        return {
            "keys": zeros(head_dim // 4, torch.int16),
            "values": zeros(head_dim // 4, torch.int16),
            "scales": zeros(4, torch.float16),
        }

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        block = _check(keys.shape[-1])
        key_codes, key_scales = _quantise(rotate(keys, block))
        value_codes, value_scales = _quantise(rotate(values, block))
        return {
            "keys": pack_codes(key_codes, block),
            "values": pack_codes(value_codes, block),
            "scales": torch.cat([key_scales, value_scales], dim=-1),
        }

    def decode(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        block = _check(4 * stored["keys"].shape[-1])
        scales = stored["scales"].float()
        values = scales[..., 3:4] + scales[..., 2:3] * unpack_codes(stored["values"], block)
        return rotate(self.stored_keys(stored), block), rotate(values, block)

    def stored_keys(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        block = _check(4 * stored["keys"].shape[-1])
        scales = stored["scales"].float()
        return scales[..., 1:2] + scales[..., 0:1] * unpack_codes(stored["keys"], block)


def pack_codes(codes: torch.Tensor, block: int) -> torch.Tensor:
    """``[..., D]`` int32 codes 0..15 -> ``[..., D / 4]`` int16, as described at Int4Format."""
    first, second, third, fourth = torch.unflatten(codes, -1, (-1, 4, block // 4)).unbind(-2)
    words = first | (second << 4) | (third << 8) | (fourth << 12)
    return words.flatten(-2).to(torch.int16)


def unpack_codes(words: torch.Tensor, block: int) -> torch.Tensor:
    """Inverse of `pack_codes`: ``[..., D / 4]`` int16 -> ``[..., D]`` float32."""
    blocks = torch.unflatten(words.to(torch.int32), -1, (-1, block // 4))
    planes = [(blocks >> shift) & LARGEST_CODE for shift in (0, 4, 8, 12)]
    return torch.stack(planes, dim=-2).flatten(-3).float()


def _quantise(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[..., D]`` float32 -> codes ``[..., D]`` int32, scale and zero ``[..., 2]`` float16."""
    least, most = numbers.aminmax(dim=-1, keepdim=True)
    zero = least.clamp(-HALF_LIMIT, HALF_LIMIT).half()
    # A product, because torch divides by a number in different ways on CPU and GPU.
    scale = ((most - least) * CODE_STEP).clamp(max=HALF_LIMIT).half()
    # Codes are chosen for the rounded scale and zero, which are the ones read back. Where all
    # numbers are equal the scale is 0 and so is every code.
    divisor = torch.where(scale > 0, scale, 1).float()
    codes = ((numbers - zero.float()) / divisor + 0.5).floor().clamp(0, LARGEST_CODE)
    return codes.to(torch.int32), torch.cat([scale, zero], dim=-1)


def _check(head_dim: int) -> int:
    """The rotation block of ``head_dim``."""
    block = rotation_block(head_dim)
    if block < SMALLEST_BLOCK:
        raise ValueError(
            f"head_dim={head_dim} is no multiple of {SMALLEST_BLOCK}: the int4 format cannot "
            "rotate it"
        )
    return block
