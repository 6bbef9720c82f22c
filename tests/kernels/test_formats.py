"""Pool formats against their definitions, written out in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pools import relative_error

from sglang_vericache.kernels.formats import FORMATS, create_format
from sglang_vericache.kernels.formats.hadamard import rotate, rotation_block
from sglang_vericache.kernels.formats.int4 import pack_codes, unpack_codes
from sglang_vericache.kernels.pool_format import DenseFormat, Fp8Format, Int4Format, PoolStorage

HEAD_DIMS = {64: 64, 80: 16, 96: 32, 128: 128, 256: 256}  # with the block that is rotated
DIMS = pytest.mark.parametrize("dim", HEAD_DIMS, ids=str)


def hadamard_matrix(dim: int) -> np.ndarray:
    """Sylvester's matrix on the diagonal, normalised."""
    block = HEAD_DIMS[dim]
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(dim // block), matrix) / np.sqrt(block)


@DIMS
def test_rotation(dim):
    """Catches butterflies in the wrong order, a missing norm, and blocks that run into each
    other."""
    assert rotation_block(dim) == HEAD_DIMS[dim]
    vectors = torch.randn(3, 2, dim)
    wanted = vectors.double().numpy() @ hadamard_matrix(dim)
    # float32 sums of at most 256 numbers of size 1.
    np.testing.assert_allclose(rotate(vectors, HEAD_DIMS[dim]).numpy(), wanted, atol=2e-6)


@DIMS
def test_rotating_twice_is_nothing(dim):
    """Catches a decode that rotates on instead of back."""
    vectors = torch.randn(5, dim)
    block = HEAD_DIMS[dim]
    torch.testing.assert_close(rotate(rotate(vectors, block), block), vectors, atol=2e-6, rtol=0)


@DIMS
def test_int4_is_within_half_a_step(dim):
    """Catches codes that are cut instead of rounded, a scale over 16 steps instead of 15, key and
    value scales exchanged, and nibbles unpacked in another order than packed."""
    keys, values = torch.randn(7, 3, dim), 5 * torch.randn(7, 3, dim) + 2
    stored = Int4Format().encode(keys, values)
    decoded = Int4Format().decode(stored)
    for part, (given, found) in enumerate(zip((keys, values), decoded, strict=True)):
        rotated = given.double().numpy() @ hadamard_matrix(dim)
        error = np.abs(found.double().numpy() @ hadamard_matrix(dim) - rotated)
        step = (rotated.max(-1) - rotated.min(-1)) / 15
        # Half a step; scale and zero in float16 (11 bits) move a number by less than 2 % of one.
        assert (error <= 0.52 * step[..., None]).all()
        found_step = stored["scales"][..., 2 * part].double().numpy()
        np.testing.assert_allclose(found_step, step, rtol=2**-10)


@pytest.mark.parametrize("name", FORMATS)
def test_stored_keys_are_turned_at_most(name):
    """Catches a basis that is not orthogonal, or another one for each row: lengths and angles
    between keys are what scorers of any basis read."""
    pool_format = create_format(name, torch.float32, 64)
    keys, values = torch.randn(2, 7, 50, 3, 64)
    stored = pool_format.encode(keys, values)
    plain = pool_format.decode(stored)[0].float()
    seen = pool_format.stored_keys({n: t for n, t in stored.items() if n != "values"}).float()
    assert seen.shape == plain.shape
    products = [torch.einsum("thd,shd->hts", k[3], k[3]) for k in (seen, plain)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dim", "least", "most"), [(64, 0.08, 0.10), (128, 0.09, 0.11)])
def test_int4_quantisation_error(dim, least, most):
    """The error of a normal vector of 64 or 128 numbers in 16 levels between its extremes, about
    9 and 10 %: catches a bit that is lost, which doubles it."""
    keys = torch.randn(500, 2, dim)
    found, _ = Int4Format().decode(Int4Format().encode(keys, keys))
    assert least < relative_error(found, keys) < most


def test_rotation_spreads_outliers():
    """Catches quantisation without the rotation: one dimension 50 times the others would leave
    them the same code."""
    keys = torch.randn(500, 2, 128)
    keys[..., 17] *= 50
    found, _ = Int4Format().decode(Int4Format().encode(keys, keys))
    others = torch.arange(128) != 17
    assert relative_error(found[..., others], keys[..., others]) < 0.8
    plain_step = (keys.amax(-1) - keys.amin(-1)) / 15
    assert plain_step.median() > 2, "one code for everything else"


@pytest.mark.parametrize(
    "number", [0.0, 1.0, -3.25, 1e-6, 3e5], ids=["zero", "one", "negative", "tiny", "huge"]
)
def test_int4_of_equal_numbers(number):
    """Catches a division by the range of numbers that are all equal, and infinities from numbers
    beyond float16."""
    keys = torch.full((2, 1, 64), number)
    found, _ = Int4Format().decode(Int4Format().encode(keys, keys))
    assert found.isfinite().all()
    if number < 1e5:
        # All of it is in the rotation's first number, which is the largest: code 15.
        torch.testing.assert_close(found, keys, rtol=2**-8, atol=1e-7)


def test_int4_words():
    """The layout that the kernels read: plane p of a block in nibble p, from the lowest."""
    codes = torch.arange(32, dtype=torch.int32)[None] % 16  # two blocks of 16
    words = pack_codes(codes, 16)
    assert words.dtype == torch.int16
    expected = [0xC840, 0xD951, 0xEA62, 0xFB73] * 2
    assert [word & 0xFFFF for word in words[0].tolist()] == expected
    assert torch.equal(unpack_codes(words, 16), codes.float())


def test_int4_needs_a_block():
    """Catches a head_dim whose rotation would be none."""
    for call in (
        Int4Format().row_bytes,
        lambda dim: PoolStorage(Int4Format(), 1, 1, 1, dim, "cpu"),
    ):
        with pytest.raises(ValueError, match="head_dim=72"):
            call(72)


def test_fp8_rounds_to_nearest_even_and_saturates():
    """Catches truncation, infinities or not-a-number from overflow, and a lost sign."""
    ordinary = {0.0: 0.0, 1.0: 1.0, 1.0625: 1.0, 1.1875: 1.25, -1.0625: -1.0, 447.0: 448.0}
    beyond = {449.0: 448.0, 1e9: 448.0, -1e9: -448.0}
    # Below 2^-6 numbers are multiples of 2^-9.
    subnormal = {0.6 * 2**-9: 2.0**-9, 0.5 * 2**-9: 0.0, 1.5 * 2**-9: 2 * 2.0**-9, 1e-6: 0.0}
    given, wanted = zip(*(ordinary | beyond | subnormal).items(), strict=True)
    keys = torch.tensor(given)[None]
    found, _ = Fp8Format().decode(Fp8Format().encode(keys, keys))
    assert found[0].tolist() == list(wanted)
    nothing, _ = Fp8Format().decode(Fp8Format().encode(keys * float("nan"), keys))
    assert nothing.isnan().all()


@pytest.mark.parametrize(
    ("pool_format", "bytes_128"),
    [(DenseFormat(torch.bfloat16), 512), (Fp8Format(), 256), (Int4Format(), 136)],
    ids=["bf16", "fp8", "int4"],
)
def test_row_bytes(pool_format, bytes_128):
    """Catches a size without scales, or with padding."""
    assert pool_format.row_bytes(128) == bytes_128
    for dim in HEAD_DIMS:
        storage = PoolStorage(pool_format, 3, 20, 2, dim, "cpu")
        stored = sum(
            tensor[0, 0].numel() * tensor.element_size() for tensor in storage.tensors.values()
        )
        assert storage.row_bytes == 3 * stored


@pytest.mark.parametrize("pool_format", [Fp8Format(), Int4Format()], ids=lambda f: f.name)
@DIMS
def test_layers_start_aligned(pool_format, dim):
    """Catches layers that kernels would read a byte at a time."""
    storage = PoolStorage(pool_format, 3, 20, 1, dim, "cpu")
    for tensor in storage.tensors.values():
        assert tensor.shape[1] == 21
        for layer in tensor:
            assert layer.data_ptr() % 16 == 0 and layer.is_contiguous()


def test_registry():
    """Catches a name of the flag without a format, and "auto" that ignores the model's dtype, or
    takes a format that its heads do not fit."""
    assert create_format("auto", torch.float32, 64) == DenseFormat(torch.float32)
    assert create_format("auto", torch.float16, 112) == DenseFormat(torch.float16)
    for dtype, dim in itertools.product((torch.float16, torch.bfloat16), HEAD_DIMS):
        assert create_format("auto", dtype, dim) == Int4Format()
    assert create_format("int4", torch.float32, 64) == Int4Format()
    for name in FORMATS:
        if name != "auto":
            assert create_format(name, torch.bfloat16, 64).name == name
    with pytest.raises(ValueError, match=r"'int3'.*auto.*fp8_e4m3, int4"):
        create_format("int3", torch.bfloat16, 64)
