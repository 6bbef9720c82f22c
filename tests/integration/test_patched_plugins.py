"""Patches 0001 and 0002: what a plugin can declare and register."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import msgspec
import patched_sglang
import pytest
import torch

patched_sglang.required()

from sglang.srt.plugins import load_plugins, load_server_args_plugins  # noqa: E402

load_plugins()

from sglang.srt.arg_groups.fields import collect_input_fields  # noqa: E402
from sglang.srt.arg_groups.fields.model import Model  # noqa: E402
from sglang.srt.arg_groups.overrides import resolution_result  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, get_spec, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs, prepare_server_args  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402
from sglang.srt.speculative.spec_registry import CustomSpecAlgo  # noqa: E402
from test_bad_input import DENSE  # noqa: E402

from sglang_vericache.flags import NAMES, config_of  # noqa: E402
from sglang_vericache.server_fields import VeriCacheFields  # noqa: E402

COMMON = {"device": "cpu", "skip_tokenizer_init": True, "log_level": "error"}
FLAGS = ("--device", "cpu", "--skip-tokenizer-init", "--log-level", "error")


@pytest.fixture
def model(tmp_path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    return str(tmp_path)


def from_command_line(model):
    return prepare_server_args(
        ["--model-path", model, *FLAGS, "--enable-vericache", "--vericache-horizon", "5"]
    )


def from_file(model):
    with open(f"{model}/config.yaml", "w") as file:
        file.write("enable-vericache: true\nvericache-horizon: 5\n")
    return prepare_server_args(["--model-path", model, *FLAGS, "--config", f"{model}/config.yaml"])


def from_keywords(model):
    return ServerArgs(model_path=model, **COMMON, enable_vericache=True, vericache_horizon=5)


@pytest.mark.parametrize("start", [from_command_line, from_file, from_keywords])
def test_the_flag_on_every_way_to_start(start, model):
    """Catches a way that does not know the fields, or whose values are not resolved."""
    record = start(model)
    record.resolve_once()
    assert resolution_result(record, "speculative_algorithm") == "VERICACHE"
    assert resolution_result(record, "speculative_num_draft_tokens") == 6
    assert resolution_result(record, "attention_backend") == "torch_native"
    assert record.speculative_algorithm is None, "the operator's input was changed"
    assert config_of(record).horizon == 5


def test_fields_reach_other_processes_and_the_bags(model):
    """Catches fields that are lost when a record is pickled for the scheduler."""
    record = from_command_line(model)
    record.resolve_once()
    copy = pickle.loads(pickle.dumps(record))
    assert config_of(copy) == config_of(record)
    publish(copy, role="scheduler", ranks=SpawnRanks(world_rank=0))
    assert get_spec().enable_vericache is True and get_spec().vericache_horizon == "5"
    assert get_spec().vericache_stagger is None
    assert copy.resolved_dict()["enable_vericache"] is True


def test_without_the_flag(model):
    """Catches a plugin that acts on servers that did not ask for it."""
    record = prepare_server_args(["--model-path", model, *FLAGS])
    record.resolve_once()
    assert resolution_result(record, "speculative_algorithm") is None
    assert config_of(record) is None


def test_plugins_are_selected_as_usual(monkeypatch):
    """Catches fields of a plugin that SGLANG_PLUGINS leaves out."""
    assert load_server_args_plugins() == [VeriCacheFields]
    monkeypatch.setenv("SGLANG_PLUGINS", "none")
    assert load_server_args_plugins() == []


def test_fields_come_last_and_collide_loudly():
    """Catches an extension that moves positional arguments, or redefines a field of SGLang."""
    names = [field.name for field in msgspec.structs.fields(ServerArgs)]
    assert names[-len(NAMES) :] == list(NAMES)

    class Colliding(msgspec.Struct):
        _NS_PATH = "spec"
        model_path: str = ""

    with pytest.raises(ValueError, match="'model_path' is declared by both"):
        collect_input_fields([Model, Colliding])


def test_a_registered_algorithm_has_what_the_scheduler_calls():
    """Catches the AttributeError at start-up that every registered algorithm had."""
    SpeculativeAlgorithm.register("PATCHED_TEST")(lambda server_args: object)
    algorithm = SpeculativeAlgorithm.from_string("patched_test")
    assert type(algorithm) is CustomSpecAlgo
    assert not algorithm.need_topk() and not algorithm.carries_draft_hidden_states()
    assert algorithm.get_platform_worker_cls() is None
    pool = SimpleNamespace(size=4, req_to_token=torch.zeros(5, 8, dtype=torch.int32))
    future_map = algorithm.create_future_map(torch.device("cpu"), pool)
    assert future_map.spec_algo is algorithm


def test_answers_follow_the_predicates():
    """Catches a subclass that says it is EAGLE and is not treated so."""

    class Like(CustomSpecAlgo):
        def is_eagle(self) -> bool:
            return True

    algorithm = Like("LIKE", lambda server_args: object)
    assert algorithm.need_topk() and algorithm.carries_draft_hidden_states()


@pytest.mark.parametrize("missing", ["create_future_map", "need_topk", "is_uno"])
def test_an_incomplete_class_is_refused(missing):
    """Catches a check that only looks at predicates."""
    members = {name: value for name, value in vars(CustomSpecAlgo).items() if name != missing}
    incomplete = type("Incomplete", (), members)
    with pytest.raises(TypeError, match=missing):
        SpeculativeAlgorithm.register("PATCHED_BAD", spec_class=incomplete)
