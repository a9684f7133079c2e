"""`models:` in a configuration file: several models of one endpoint, each with what is its own and what all have in common."""

from pathlib import Path
from typing import Any

import pytest

from deploy.config.load import Config, ConfigError, load_config, model_config
from deploy.config.serve import ServeConfig, for_model
from deploy.serving.command import serve
from deploy.terminal.display import StartView

SEVERAL = """
engine: {block_size: 64, dtype: float32}
models:
  small:
    model: /models/small
  Org/Large:
    model: /models/large
    tensor_parallel_size: 2
    dtype: bfloat16
    tool_parser: hermes
    max_queued_tokens: 1000
serve: {port: 9000, tool_parser: none, max_choices: 3}
"""


def read(folder: Path, text: str, **flags: Any) -> Config:
    file = folder / "manta.yaml"
    file.write_text(text)
    return load_config(file, environ={}, **flags)


def test_each_model_has_its_own_and_what_all_have_in_common(tmp_path: Path) -> None:
    config = read(tmp_path, SEVERAL, engine={"block_size": 32}, serve={"port": 9001})
    (large,) = config.further
    assert (config.engine.model, config.engine.dtype, config.engine.tensor_parallel_size) == ("/models/small", "float32", 1)
    assert (large.engine.model, large.engine.dtype, large.engine.tensor_parallel_size) == ("/models/large", "bfloat16", 2)
    assert config.engine.block_size == large.engine.block_size == 32, "a flag holds for all"
    assert (config.serve.served_model_name, large.name) == ("small", "Org/Large")
    assert (config.serve.tool_parser, large.serve.tool_parser) == ("none", "hermes")
    assert (config.serve.max_queued_tokens, large.serve.max_queued_tokens) == (ServeConfig().max_queued_tokens, 1000)
    assert (config.serve.port, config.serve.max_choices, large.serve.port, large.serve.max_choices) == (9001, 3, 9001, 3)


def test_one_model_needs_no_models(tmp_path: Path) -> None:
    assert read(tmp_path, "engine: {model: /m}\nmodels:\n").further == ()
    only = read(tmp_path, "models: {only: {model: /m}}")
    assert (only.engine.model, only.serve.served_model_name, only.further) == ("/m", "only", ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {a: {model: /m, groups: 0}}", "models.a: groups=0 is below 1"),
        ("models: {a: {model: /m, gruops: 2}}", "unknown key 'models.a.gruops': did you mean 'models.a.groups'"),
        ("models: {a: {model: /m, port: 1}}", "unknown key 'models.a.port'"),
        ("models: {a: {model: /m, ray_address: auto}}", "unknown key 'models.a.ray_address'"),
        ("models: {a: {model: /m, tool_parser: mine}}", "models.a: tool_parser='mine' is unknown"),
        ("models: {a: {groups: 2}}", "models.a.model is missing"),
        ("models: {a: /m}", "models.a holds a str"),
        ("models: [a]", "models holds a list"),
        ("models: {1: {model: /m}}", "models: 1 is no name"),
        ("models: {a: {model: /m}}\nengine: {model: /n}", "model='/n' goes with one model"),
        ("models: {a: {model: /m}}\nserve: {served_model_name: n}", "served_model_name='n' goes with one model"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert said in str(refused.value)


def test_flags_of_one_model_do_not_go_with_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model='/n' goes with one model"):
        read(tmp_path, SEVERAL, engine={"model": "/n"})


def test_a_model_is_told_as_an_entry_of_its_own() -> None:
    endpoint = ServeConfig(port=9000, tool_parser="none", max_choices=3)
    added = model_config("q", {"model": "/m", "kv_memory": "1GiB", "reasoning_parser": "think"}, endpoint)
    assert (added.name, added.engine.kv_memory, added.serve.reasoning_parser) == ("q", 2**30, "think")
    assert (added.serve.tool_parser, added.serve.max_choices) == ("auto", 3), "what is a model's own is not the first's"
    with pytest.raises(ConfigError, match=r"models\.q\.model is missing"):
        model_config("q", {}, endpoint)


def test_front_ends_take_from_a_model_what_is_its_own_alone() -> None:
    endpoint, model = ServeConfig(max_choices=3, request_timeout_s=5), ServeConfig(max_choices=9, tool_parser="none")
    told = for_model(endpoint, model)
    assert (told.max_choices, told.request_timeout_s, told.tool_parser) == (3, 5, "none")


def test_several_models_of_one_process_are_refused(tmp_path: Path) -> None:
    config = read(tmp_path, SEVERAL, engine={"local": True})
    with pytest.raises(ConfigError, match="--local serves one model"):
        serve(config, StartView())
