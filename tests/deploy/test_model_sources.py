"""A model by its id, from a server that speaks as Hugging Face's does: whoever reads it finds the same files, once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from deploy.config.load import EMBEDDED_MODEL, ConfigError, endpoint_config
from deploy.doors.python.llm import LLM
from deploy.frontend.service.model import ServedModel
from manta.commands import app
from scheduler.protocol.sampling import SamplingParams
from tests.shared.hub import Hub, hub_of

NAME = "org/tiny"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SMALL: dict[str, Any] = {"local": True, "kv_memory": "16MiB", "dtype": "float32", "threads": 1}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """With a cache of its own."""
    files = {path.name: path.read_bytes() for path in EMBEDDED_MODEL.iterdir() if path.is_file()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    with hub_of({NAME: files}, monkeypatch) as hub:
        yield hub


def test_it_answers_as_the_folder_does(hub: Hub) -> None:
    said: list[str] = []
    with LLM(NAME, progress=said.append, tensor_parallel_size=2, **SMALL) as llm:
        assert llm.config.revision == hub.commit(NAME)
        (output,) = llm.generate("def add(", GREEDY, progress=False)
    with LLM(EMBEDDED_MODEL, **SMALL) as llm:
        (same,) = llm.generate("def add(", GREEDY, progress=False)
    assert output.outputs[0].token_ids == same.outputs[0].token_ids
    assert hub.read.count("model.safetensors") == 1
    assert "README.md" not in hub.read
    size = (EMBEDDED_MODEL / "model.safetensors").stat().st_size / 1e9
    assert any(line.startswith(f"downloading {NAME} ━") and f"of {size:.2f} GB" in line for line in said), said


def test_a_plan_fetches_the_settings_of_the_model_alone(hub: Hub) -> None:
    result = CliRunner().invoke(app, ["plan", NAME, "--memory", "1GiB"])
    assert result.exit_code == 0, result.output
    assert hub.read == ["config.json"]
    folder = CliRunner().invoke(app, ["plan", str(EMBEDDED_MODEL), "--memory", "1GiB"])
    assert result.output == folder.output
    wrong = CliRunner().invoke(app, ["plan", "org/nmae"])
    assert wrong.exit_code == 2
    assert "org/nmae" in wrong.output


def test_a_front_end_reads_no_weights_and_its_model_has_the_id_for_a_name(hub: Hub) -> None:
    config = endpoint_config({"engine": {"model": NAME}})
    model = ServedModel.of(config.engine, config.serve)
    assert model.name == NAME
    assert model.tokenizer is not None
    assert "model.safetensors" not in hub.read


@pytest.mark.usefixtures("hub")
def test_what_is_not_there_says_so_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=rf"there is no {constants.ENDPOINT}/org/nmae"):
        LLM("org/nmae", **SMALL)
    with pytest.raises(ConfigError, match="has no revision 'v9'"):
        LLM(NAME, revision="v9", **SMALL)
    with pytest.raises(ConfigError, match="leave it out"):
        LLM(EMBEDDED_MODEL, revision="main", **SMALL)
