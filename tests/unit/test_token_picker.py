"""TokenPicker: the same tokens however the rows are cut, and only inside its own forward."""

from __future__ import annotations

import pytest
import torch

from sglang_vericache.verify.token_picker import TokenPicker, active_picker

VOCABULARY, HIDDEN = 50, 8


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 16, 17, 1000])
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_chunks_do_not_change_the_picks(rows, chunk_rows):
    """Catches a last chunk that is dropped, chunks out of order, more logits alive than allowed."""
    # Integers, so that the oracle's own product is exact in any order of summation.
    hidden = torch.randint(-9, 9, (rows, HIDDEN)).double()
    head = torch.randint(-9, 9, (HIDDEN, VOCABULARY)).double()
    sizes = []

    def logits_of(chunk: torch.Tensor) -> torch.Tensor:
        sizes.append(len(chunk))
        return chunk @ head

    picker = TokenPicker(chunk_rows)
    picker.pick(hidden, logits_of)
    products = (hidden @ head).tolist()
    assert picker.tokens.tolist() == [row.index(max(row)) for row in products]
    assert max(sizes) <= chunk_rows and sum(sizes) == rows


def test_active_only_inside():
    """Catches a picker that stays active and takes the logits of SGLang's own forwards."""
    assert active_picker() is None
    picker = TokenPicker(4)
    with picker.active() as inside:
        assert inside is picker
        assert active_picker() is picker
    assert active_picker() is None


def test_nesting_restores_the_outer():
    """Catches an inner forward that switches the outer's picker off."""
    outer, inner = TokenPicker(4), TokenPicker(4)
    with outer.active():
        with inner.active():
            assert active_picker() is inner
        assert active_picker() is outer
    assert active_picker() is None


def test_a_failed_forward_restores_too():
    """Catches a picker left behind by an exception, for the next batch to run into."""
    with pytest.raises(RuntimeError, match="forward"), TokenPicker(4).active():
        raise RuntimeError("forward")
    assert active_picker() is None


def test_tokens_of_an_earlier_forward_are_forgotten():
    """Catches a forward that picks nothing and passes off the last one's tokens as its own."""
    picker = TokenPicker(4)
    with picker.active():
        picker.pick(torch.ones(2, 3), lambda hidden: hidden)
    assert picker.tokens.tolist() == [0, 0]
    with picker.active() as picked:
        assert picked.tokens is None
