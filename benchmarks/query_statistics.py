"""What ExpectedAttention loses by keeping a part of the covariance: ``python -m
benchmarks.query_statistics``.

The prompts of `benchmarks.acceptance` and their greedy continuation, by transformers in float32.
For each layer and kv head a fifth of the prompt is selected with all of the covariance and with
parts of it. Reported are the share of tokens that both select, sinks and recent tokens apart, and
the attention that the queries of the continuation really pay to what was not selected.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.acceptance import OUTPUT_TOKENS, prompts
from benchmarks.rows import Row, append
from sglang_vericache.compressors.base import ScoreInputs
from sglang_vericache.compressors.budget import ALWAYS_KEPT_TOKENS, Budget
from sglang_vericache.compressors.query_stats import Moments
from sglang_vericache.compressors.rotary import Rotary, turn_back
from sglang_vericache.compressors.scorers.expected_attention import ExpectedAttention
from sglang_vericache.compressors.scorers.keydiff import KeyDiff
from sglang_vericache.compressors.scorers.snapkv import SnapKV
from sglang_vericache.compressors.select import select_rows
from sglang_vericache.config import SINK_TOKENS
from sglang_vericache.demo.model import default_cache_dir, prepare_model

KEEP_RATIO = 0.2
WHOLE, OURS = "whole covariance", "within rotated pairs (covariance=1)"


@dataclass(frozen=True)
class Layer:
    """One layer after a prompt of ``prompt`` tokens and its continuation.

    Attributes:
        keys, values: ``[n, H, D]``; queries: ``[n, Hq, D]``, all after rotary embedding.
    """

    prompt: int
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    rotary: Rotary

    @property
    def scaling(self) -> float:
        return self.keys.shape[-1] ** -0.5

    @property
    def prefill_queries(self) -> torch.Tensor:
        """Before rotary embedding, behind the sinks."""
        return self.rotary.undo(self.queries[SINK_TOKENS : self.prompt], SINK_TOKENS)

    def inputs(self, **fields) -> ScoreInputs:
        keys, values = self.keys[: self.prompt], self.values[: self.prompt]
        return ScoreInputs(
            keys, values, 0, self.scaling, path_end=self.prompt, rotary=self.rotary, **fields
        )

    def paid(self) -> torch.Tensor:
        """``[H, prompt]`` mean attention of the continuation's queries."""
        total, heads, dim = self.keys.shape
        queries = self.queries[self.prompt :].view(total - self.prompt, heads, -1, dim)
        logits = torch.einsum("whgd,thd->hgwt", queries, self.keys) * self.scaling
        places = torch.arange(total)
        logits = logits.masked_fill(places > places[self.prompt :, None], float("-inf"))
        return logits.softmax(-1).mean(dim=(1, 2))[:, : self.prompt]


def layers_of(model, ids: list[int]) -> Iterator[Layer]:
    """All layers after ``ids`` and the model's greedy answer."""
    projected: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, i, out, to=to: to.append(out[0]))
        for layer, to in zip(model.model.layers, projected, strict=True)
    ]
    result = model(torch.tensor([ids]), use_cache=True)
    for _ in range(OUTPUT_TOKENS):
        token = int(result.logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        cache = result.past_key_values
        result = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    for layer, parts in zip(result.past_key_values.layers, projected, strict=True):
        keys, values = (x[0].transpose(0, 1) for x in (layer.keys, layer.values))
        total, _, dim = keys.shape
        positions = torch.arange(total + ExpectedAttention().future)[None]
        cos, sin = (x[0, :, : dim // 2] for x in model.model.rotary_emb(keys, positions))
        rotary = Rotary(torch.cat([cos, sin], dim=1))
        before = torch.cat(parts).view(total, -1, dim)
        after = turn_back(before, cos[:total, None], -sin[:total, None])
        yield Layer(len(ids), keys, values, after, rotary)


def selections(layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and scores ``[H, prompt]`` of everything that is compared."""
    queries, heads = layer.prefill_queries, layer.keys.shape[1]
    centred = queries - queries.mean(0)
    covariance = torch.einsum("nhi,nhj->hij", centred, centred) / len(queries)
    query_heads, dim, _ = covariance.shape
    pooled = covariance.view(heads, -1, dim, dim).mean(1)
    pooled = pooled.repeat_interleave(query_heads // heads, 0)
    yield WHOLE, scores(layer, queries.mean(0), covariance)
    yield "whole, pooled over a kv head", scores(layer, queries.mean(0), pooled)
    moments = Moments.of(queries, layer.rotary.pairs)
    yield OURS, ExpectedAttention(covariance=1).score(layer.inputs(query_stats=moments))
    yield "mean only", scores(layer, queries.mean(0), torch.zeros_like(covariance))
    places = torch.arange(layer.prompt)[-64:]
    window = {"queries": layer.queries[places], "query_positions": places}
    yield "SnapKV", SnapKV().score(layer.inputs(**window))
    yield "KeyDiff", KeyDiff().score(layer.inputs())


def scores(layer: Layer, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """ExpectedAttention of queries with ``mean`` ``[Hq, D]`` and ``covariance`` ``[Hq, D, D]``."""
    inputs = layer.inputs()
    heads = inputs.keys.shape[1]
    future = layer.rotary.average(layer.prompt, ExpectedAttention().future)
    turned = turn_back(inputs.keys, *future).repeat_interleave(len(mean) // heads, 1)
    logits = torch.einsum("thd,hd->ht", turned, mean) * layer.scaling
    spread = torch.einsum("thi,hij,thj->ht", turned, covariance, turned)
    logits = logits + layer.scaling**2 / 2 * spread
    logits[:, :SINK_TOKENS] = float("-inf")
    weight = logits.softmax(-1).view(heads, -1, layer.prompt).mean(1)
    return weight * inputs.values.norm(dim=-1).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    options = parser.parse_args()
    path = prepare_model(default_cache_dir())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    agreement: dict[str, list[float]] = defaultdict(list)
    lost: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for ids in prompts(AutoTokenizer.from_pretrained(path)):
            rows = Budget(KEEP_RATIO, None).path_rows(len(ids))
            for layer in layers_of(model, ids):
                paid = layer.paid()
                kept = {
                    name: torch.zeros_like(paid).scatter_(1, select_rows(s, rows, 0, len(ids)), 1)
                    for name, s in selections(layer)
                }
                for name, chosen in kept.items():
                    common = (chosen * kept[WHOLE]).sum(1) - ALWAYS_KEPT_TOKENS
                    agreement[name] += (common / (rows - ALWAYS_KEPT_TOKENS)).tolist()
                    lost[name] += (paid * (1 - chosen)).sum(1).tolist()
    for name, shares in agreement.items():
        agrees, loses = sum(shares) / len(shares), sum(lost[name]) / len(lost[name])
        baseline = sum(lost[WHOLE]) / len(lost[WHOLE])
        print(f"{name:32} agreement {agrees:.3f}, attention lost {loses:.4f}")
        if not options.no_rows:
            for metric, value, base in (
                ("agreement_with_whole_covariance", agrees, 1.0),
                ("attention_lost", loses, baseline),
            ):
                append(
                    "query_statistics.jsonl",
                    Row(
                        case=f"8 prompts of 2K, {name}",
                        metric=metric,
                        value=round(value, 4),
                        baseline=round(base, 4),
                        unit="share",
                        model=path.name,
                        flags=f"keep ratio {KEEP_RATIO}",
                        note="baseline: whole covariance; transformers, no server",
                    ),
                )


if __name__ == "__main__":
    main()
