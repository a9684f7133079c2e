"""Tools of a checkpoint that writes calls as Llama 3 does, and an answer in JSON beside tools."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL, bound_openmp_spin
from deploy.frontend.clusters import LocalCluster
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.dialects.conftest import LLAMA_TEMPLATE
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, MODEL, PATIENCE_S, Host, ScriptedCluster
from tests.deploy.frontend.fake_engine import FakeEngine

LEVEL = {"type": "object", "properties": {"level": {"enum": [1, 2, 3]}}, "required": ["level"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "set_lamp", "parameters": LEVEL}},
    {"type": "function", "function": {"name": "all_off"}},
]
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Light, please."}],
    "tools": TOOLS,
    "max_tokens": 200,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "level", "schema": LEVEL}}

Address = Callable[[Path], str]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that ships with Manta, with another chat template."""
    folder = tmp_path_factory.mktemp("llama")
    for file in EMBEDDED_MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llama(host: Host, llama_folder: Path) -> Iterator[openai.OpenAI]:
    bound_openmp_spin()
    cluster = LocalCluster(EngineConfig(model=str(llama_folder), local=True, kv_memory=KV_MEMORY_BYTES, threads=1))
    address = host.serve(host.service(cluster, llama_folder))
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as opened:
        yield opened


def test_required_calls(llama: openai.OpenAI) -> None:
    for choice in llama.chat.completions.create(
        **ASKED, tool_choice="required", parallel_tool_calls=False, n=4, seed=1
    ).choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments["level"] in (1, 2, 3) if call.function.name == "set_lamp" else arguments == {}


def test_several_calls_of_its_own_accord(host: Host, llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    output = '{"name": "set_lamp", "parameters": {"level": 2}}; {"name": "all_off", "parameters": {}}'
    engine = FakeEngine([*tokenizer.encode(output), *tokenizer.encode("<|im_end|>")])
    address = host.serve(host.service(ScriptedCluster(engine), llama_folder))
    told: dict[int, list[str]] = {}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        for chunk in client.chat.completions.create(**ASKED, stream=True):
            assert not chunk.choices[0].delta.content
            for call in chunk.choices[0].delta.tool_calls or ():
                told.setdefault(call.index, []).append((call.function.name or "") + call.function.arguments)
    assert ["".join(parts) for parts in told.values()] == ['set_lamp{"level": 2}', "all_off{}"]
    assert chunk.choices[0].finish_reason == "tool_calls"


def test_an_answer_in_json_needs_a_format_that_marks_calls(llama: openai.OpenAI, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be told from an answer in JSON"):
        llama.chat.completions.create(**ASKED, response_format=FORM)
    asked = ASKED | {"response_format": FORM, "parallel_tool_calls": False, "n": 8, "seed": 1}
    for choice in client.chat.completions.create(**asked).choices:
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        levels = [call.function.arguments for call in calls if call.function.name == "set_lamp"]
        for text in levels if calls else [choice.message.content]:
            assert json.loads(text)["level"] in (1, 2, 3)
