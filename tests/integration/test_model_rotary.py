"""ModelRotary against SGLang's own rotary embeddings: undone, or refused with a sentence."""

from __future__ import annotations

import cpu_engine
import pytest
import torch

cpu_engine.required()

from sglang.srt.layers.rotary_embedding import get_rope  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402

from sglang_vericache.config import VeriCacheConfigError  # noqa: E402
from sglang_vericache.draft.rotary import ModelRotary  # noqa: E402

DIM, LONGEST = 64, 300
# A rotation forth and back of numbers of size one in float32.
TOLERANCE = 3e-6

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
UNDONE = {
    "none": {},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "interleaved": {"is_neox_style": False},
    "partial": {"rotary_dim": 32},
    "partial interleaved": {"rotary_dim": 32, "is_neox_style": False},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 100,
        }
    },
}
REFUSED = {
    "mrope": ({"rope_type": "default", "mrope_section": [8, 12, 12]}, "MRotaryEmbedding"),
    "longrope": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0] * 32,
            "long_factor": [2.0] * 32,
            "original_max_position_embeddings": 100,
        },
        "Phi3LongRoPEScaledRotaryEmbedding",
    ),
}


def embedding(**settings) -> torch.nn.Module:
    arguments = {
        "head_size": DIM,
        "rotary_dim": DIM,
        "max_position": LONGEST,
        "base": 10000,
        "is_neox_style": True,
        "dtype": torch.float32,
    }
    return get_rope(**(arguments | settings))


class RadixAttention(torch.nn.Module):
    """SGLang's attention layer, as far as ModelRotary looks: its name and its number."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id


def model(*embeddings: torch.nn.Module | None) -> torch.nn.Module:
    """A model with one attention block an embedding; the last layer comes first."""
    blocks = []
    for layer_id, rotary_emb in enumerate(embeddings):
        block = torch.nn.Module()
        block.attn, block.rotary_emb = RadixAttention(layer_id), rotary_emb
        blocks.insert(0, block)
    return torch.nn.ModuleList(blocks)


@pytest.mark.parametrize("kind", UNDONE)
def test_undone(kind):
    """Catches a kind whose table is laid out or scaled unlike we think: what SGLang applies to a
    query, we take back."""
    module = embedding(**UNDONE[kind])
    rotary = ModelRotary(model(module))[0]
    before = torch.randn(LONGEST, 3, DIM)
    flat, _ = module.forward_native(
        torch.arange(LONGEST), before.flatten(1).clone(), torch.zeros(LONGEST, DIM)
    )
    after = flat.view_as(before)
    assert (after - before).abs().max() > 0.5
    undone = rotary.undo(after[250:], 250)
    torch.testing.assert_close(undone, rotary.canonical(before[250:]), rtol=0, atol=TOLERANCE)


def test_layers_have_their_own():
    """Catches layers in the order of modules instead of their numbers, as where a model lists a
    block twice."""
    made = ModelRotary(model(embedding(base=10000), embedding(base=500), embedding(base=20)))
    assert len(made) == 3
    for layer, base in enumerate((10000, 500, 20)):
        assert torch.equal(made[layer].table, embedding(base=base).cos_sin_cache)


def test_a_table_that_grew_is_seen():
    """Catches a table taken at start: SGLang replaces it to reserve room for long contexts."""
    module = embedding(base=777)
    made = ModelRotary(model(module))
    before = len(made[0].table)
    module._ensure_cos_sin_cache_length(5000)
    assert len(made[0].table) > 5000 > before


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    """Catches statistics of queries that were turned back wrongly: they would only be worse."""
    scaling, name = REFUSED[kind]
    with pytest.raises(VeriCacheConfigError, match=f"layer 1 has {name}") as error:
        ModelRotary(model(embedding(), embedding(rope_scaling=scaling)))
    assert "--vericache-compressor" in str(error.value) and "snapkv" in str(error.value)


def test_no_embedding_is_refused():
    """Catches layers without rotary embedding, or with one under a name that we do not know."""
    with pytest.raises(VeriCacheConfigError, match="layer 0 has none that is known"):
        ModelRotary(model(None))


def test_an_embedding_with_its_own_forward_is_refused():
    """Catches a kind that is new in SGLang taken for the plain one."""

    class New(RotaryEmbedding):
        def forward_cuda(self, positions, query, key):
            raise NotImplementedError

    with pytest.raises(VeriCacheConfigError, match="layer 0 has New"):
        ModelRotary(model(New(DIM, DIM, LONGEST, 10000, True, torch.float32)))
