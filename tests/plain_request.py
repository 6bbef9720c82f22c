"""A stand-in for SGLang's Req."""

from __future__ import annotations

from types import SimpleNamespace


def request(params: dict | None = None, **changes) -> SimpleNamespace:
    """What SGLang's Req of a greedy request without extras has, changed."""
    sampling = {
        "top_k": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "logit_bias": None,
    }
    fields = {
        "grammar": None,
        "custom_logit_processor": None,
        "return_logprob": False,
        "return_hidden_states": False,
        "return_sampling_mask": False,
        "lora_id": None,
        "multimodal_inputs": None,
        "input_embeds": None,
        "beam_group": None,
        "session": None,
    }
    params = SimpleNamespace(**(sampling | (params or {})))
    return SimpleNamespace(sampling_params=params, **(fields | changes))
