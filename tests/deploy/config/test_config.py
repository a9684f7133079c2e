"""Settings: one tree, flags over file over defaults; whatever cannot be used is named with what to write instead."""

import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from cluster.config import EngineConfig
from deploy.config.load import (
    EMBEDDED_MODEL,
    OPENMP_SPIN,
    ConfigError,
    bound_openmp_spin,
    endpoint_config,
    engine_config,
    load_config,
    parse_size,
    read_api_keys,
    read_key_priorities,
    read_operators,
    sampling_params,
)
from deploy.config.serve import ServeConfig, model_name
from deploy.doors.python.llm import LLM


def written(folder: Path, text: str) -> Path:
    file = folder / "manta.yaml"
    file.write_text(text)
    return file


def test_flags_over_file_over_defaults(tmp_path: Path) -> None:
    file = written(
        tmp_path, "engine:\n  groups: 2\n  kv_memory: 1GiB\n  dtype: float32\nsampling: {temperature: 0.5, stop: END}\n"
    )
    config = load_config(file, {"groups": 3, "dtype": None}, {"top_k": 4}, environ={})
    assert (config.engine.groups, config.engine.kv_memory, config.engine.dtype) == (3, 2**30, "float32")
    assert (config.sampling.temperature, config.sampling.top_k, config.sampling.stop) == (0.5, 4, ("END",))
    assert config.sampling.max_tokens == 128
    assert config.engine.model == str(EMBEDDED_MODEL)


def test_an_endpoint_has_a_section(tmp_path: Path) -> None:
    file = written(tmp_path, "serve: {port: 9000, max_request_bytes: 1MiB, cors_origins: [http://a.example]}\n")
    serve = load_config(file, environ={}, serve={"port": 9001, "host": None}).serve
    assert (serve.port, serve.host, serve.max_request_bytes) == (9001, "127.0.0.1", 2**20)
    assert serve.cors_origins == ("http://a.example",)
    assert endpoint_config({"serve": {"port": 9002}, "engine": {"groups": 2}}).serve.port == 9002
    assert load_config(environ={}).serve == ServeConfig()


def test_api_keys_come_from_the_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the notebook\nfirst\n\n second \n")
    config = ServeConfig(host="0.0.0.0", api_key_file=str(file))
    assert read_api_keys(config, {"MANTA_API_KEYS": "third, first,"}) == ("third", "first", "second")
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert read_api_keys(config, {}) == ("first", "second")
    assert read_api_keys(ServeConfig(), {}) == ()
    with pytest.raises(ConfigError, match="use ASCII ones"):
        read_api_keys(ServeConfig(), {"MANTA_API_KEYS": "Schlüssel"})
    with pytest.raises(ConfigError, match=r"cannot read the API keys in .*nowhere"):
        read_api_keys(ServeConfig(api_key_file=str(tmp_path / "nowhere")), {})


def test_a_model_has_the_name_that_it_was_given_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-8B-rev7").mkdir()
    (tmp_path / "latest").symlink_to("Qwen3-8B-rev7")
    monkeypatch.chdir(tmp_path)
    assert [model_name(None, path) for path in (str(tmp_path / "latest"), "latest/", "./latest/.")] == ["latest"] * 3
    assert model_name("mine", "latest") == "mine"
    monkeypatch.chdir(tmp_path / "Qwen3-8B-rev7")
    assert model_name(None, ".") == "Qwen3-8B-rev7"
    monkeypatch.chdir(tmp_path)
    assert model_name(None, "Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert model_name(None, "Qwen/Qwen3-8B") == "Qwen3-8B", "a folder that is there is one"
    assert [model_name(None, url) for url in ("s3://bucket/models/q3/", f"file://{tmp_path}/latest")] == ["q3", "latest"]


def test_a_line_of_the_key_file_is_a_key_and_what_is_said_of_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    lines = ["\ufeffone # of ann's\r", "two#2\t# its key has a #", " #three", "four priority=-7  # batch"]
    lines += ["five priority=3 operator", "six operator # me", ""]
    file.write_text("\n".join(lines))
    config = ServeConfig(api_key_file=str(file))
    assert read_api_keys(config, {}) == ("one", "two#2", "four", "five", "six")
    assert read_key_priorities(config) == {"four": -7, "five": 3}
    assert read_operators(config) == ("five", "six")
    assert read_key_priorities(ServeConfig()) == {}
    assert read_operators(ServeConfig()) == ()
    wrong = "two", "priority=high", "priority=1 priority=2", "priority=-99999999999", "operators", "priority=1operator"
    for line in (f"one {words}" for words in wrong):
        file.write_text(f"zero\n{line}\n")
        with pytest.raises(ConfigError, match="line 2: behind the key may stand") as refused:
            read_api_keys(config, {})
        assert "one" not in str(refused.value).replace("nothing", ""), "a key is told nobody"


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("0:0:0:0:0:0:0:1", True), ("::ffff:127.0.0.1", True),
     ("localhost", True), ("LOCALHOST", True), ("::1234", False), ("127.evil.example", False), ("127.1", False),
     ("localhost.evil.example", False), ("::ffff:10.0.0.1", False), ("0.0.0.0", False), ("::", False), ("", False),
     ("10.0.0.1", False), ("[::1]", False)],
)  # fmt: skip
def test_only_addresses_of_this_machine_for_itself_are_loopback(host: str, own: bool) -> None:
    assert ServeConfig(host=host).on_loopback == own


def test_an_endpoint_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "127.evil.example"):
        with pytest.raises(ConfigError, match=r"there is no API key: .*--no-auth"):
            read_api_keys(ServeConfig(host=host), {})
        assert read_api_keys(ServeConfig(host=host, auth=False), {}) == ()
        assert read_api_keys(ServeConfig(host=host), {"MANTA_API_KEYS": "k"}) == ("k",)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert read_api_keys(ServeConfig(host=host), {}) == ()


def test_a_ray_job_joins_the_cluster_that_it_runs_on() -> None:
    inside = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert load_config(environ=inside).engine.ray_address == "10.0.0.1:6379"
    assert load_config(engine={"ray_address": "auto"}, environ=inside).engine.ray_address == "auto"
    assert load_config(engine={"local": True}, environ=inside).engine.ray_address is None


def test_environment_names_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "engine: {groups: 5}\n")
    assert load_config(environ={"MANTA_CONFIG": str(file)}).engine.groups == 5
    assert load_config(environ={}).engine.groups == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engin: {}", "unknown key 'engin': did you mean 'engine'?"),
        (
            "engine: {tensor_parallel: 2}",
            "unknown key 'engine.tensor_parallel': did you mean 'engine.tensor_parallel_size'?",
        ),
        ("sampling: {temprature: 2}", "did you mean 'sampling.temperature'?"),
        ("engine: {zzz: 2}", "known are model, revision"),
        ("engine: {page_size: 16}", "did you mean 'engine.block_size'?"),
        ("engine: {gpu_memory_utilization: 0.9}", "did you mean 'engine.gpu_memory_fraction'?"),
        ("engine: {batch_size: 8}", "unknown key 'engine.batch_size': known are"),
        ("engine: {groups: two}", "groups: expected `int`, got `str`"),
        ("engine: {groups: 0}", "groups=0 is below 1: raise it"),
        ("engine: {block_size: 48}", "block_size=48 is not a power of two from 16 up"),
        ("engine: {dtype: int8}", "dtype='int8' is unknown: choose one of auto, bfloat16"),
        ("engine: {kv_memory: 4 gigs}", "write bytes, or a number with a unit"),
        ("engine: {gpu_memory_fraction: 90}", "outside (0, 1]"),
        ("engine: {host_kv_memory: -1}", "host_kv_memory=-1 is below 0"),
        ("engine: {host_kv_memory: 1GiB, enable_prefix_caching: false}", "enable_prefix_caching is off"),
        ("engine: {max_num_seqs: 100000}", "is above 65536"),
        ("engine: {local: true, ray_address: auto}", "exclude each other"),
        ("sampling: {temperature: -1}", "temperature=-1.0 is outside"),
        ("engine: [1]", "engine holds a list"),
        ("serve: {prot: 80}", "unknown key 'serve.prot': did you mean 'serve.port'?"),
        ("serve: {port: 70000}", "port=70000 is outside [0, 65535]"),
        ("serve: {max_request_bytes: 8 apples}", "max_request_bytes='8 apples' is not a size"),
        ("just words", "holds a str: write the sections engine, serve, sampling"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), environ={})
    assert message in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nowhere"):
        load_config(tmp_path / "nowhere.yaml", environ={})


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (7, 7),
        ("4GiB", 2**32),
        ("512 MiB", 2**29),
        ("1.5g", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("4096", 4096),
        ("1k", 1024),
    ],
)
def test_sizes(given: int | str, size: int) -> None:
    assert parse_size("kv_memory", given) == size


@pytest.mark.parametrize("given", ["", "GiB", "4 XiB", "-1GiB", "4GiB extra"])
def test_bad_sizes(given: str) -> None:
    with pytest.raises(ConfigError, match="kv_memory="):
        parse_size("kv_memory", given)


def test_sampling_from_json() -> None:
    params = sampling_params({"logit_bias": {"5": 1.0}, "stop": ["a", "b"], "temperature": 0})
    assert (params.logit_bias, params.stop, params.temperature) == ({5: 1.0}, ("a", "b"), 0)


def test_llm_has_the_defaults_of_the_engine() -> None:
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    for name, parameter in signature(LLM.__init__).parameters.items():
        if name in defaults and name != "model":
            assert parameter.default == defaults[name], name


def test_llm_names_the_nearest_option() -> None:
    with pytest.raises(ConfigError, match="unknown key 'tensor_parallel': did you mean 'tensor_parallel_size'"):
        engine_config({"tensor_parallel": 2})


def test_front_door_imports_nothing_heavy() -> None:
    check = "import sys, manta.commands; sys.exit(bool({'torch', 'ray', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": OPENMP_SPIN}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_openmp_spins_briefly_unless_the_user_has_said(before: dict[str, str], after: dict[str, str]) -> None:
    bound_openmp_spin(before)
    assert before == after


@pytest.mark.parametrize(
    ("given", "named"),
    [({"app_name": ""}, "app_name=''"), ({"route_prefix": "qwen"}, "='qwen'"), ({"route_prefix": "/qwen/"}, "/qwen")],
)
def test_an_application_needs_a_name_and_a_path(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ServeConfig(**given)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "route_prefix": "/qwen"}, "http://127.0.0.1:8000/qwen"),
        ({"host": "::", "port": 80}, "http://[::1]:80"),
        ({"host": "node-7"}, "http://node-7:8000"),
    ],
)
def test_where_a_client_on_this_machine_reaches_it(given: dict[str, Any], url: str) -> None:
    assert ServeConfig(**given).base_url == url


@pytest.mark.parametrize(
    ("lora", "said"),
    [(["sql"], "NAME=FOLDER"), (["=/a"], "NAME=FOLDER"), (["sql="], "NAME=FOLDER"), (["s\nql=/a"], "printable"),
     ([f"{'n' * 257}=/a"], "printable"), (["sql=/a", "sql=/b"], "a name twice"), ({"a=b": "/a"}, "without '='"),
     ({0: "/a"}, "cannot name")],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_with_adapters_is_said_by_itself(lora: Any, said: str) -> None:
    complaints = {"NAME=FOLDER", "printable", "a name twice", "without '='"}
    with pytest.raises(ConfigError, match=said) as refused:
        engine_config({"lora": lora})
    assert not any(other in str(refused.value) for other in complaints - {said, "without '='"})
