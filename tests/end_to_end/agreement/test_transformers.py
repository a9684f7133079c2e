"""Decoders of transformers' classes in the engine: the same tokens as transformers, with one rank and two, blocks of 16 and of
256, prefixes hit, sequences preempted. `python -m benchmarks.models` runs all model types so; here are some."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models.compare import SETTINGS, Reference, Setting, compare
from benchmarks.models.zoo import MORE, ZOO, make
from workers.config import ReadingConfig
from workers.model.reading import read_model

DOCS = Path(__file__).resolve().parents[3] / "docs" / "models.md"
KINDS = ("gemma4_text", "deepseek_v3", "gemma2")
"""Layers of two shapes and shared keys; values narrower than keys, and experts; windows and caps."""


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    path = make(request.param, tmp_path_factory.mktemp(request.param))
    return path, Reference(path)


@pytest.mark.few(3)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_tokens(checkpoint: tuple[Path, Reference], setting: Setting) -> None:
    path, reference = checkpoint
    outcome = compare(path, reference, setting)
    assert outcome.wrong == ()
    assert outcome.hits > 0
    assert outcome.preemptions > 0 or not setting.small


def test_what_is_served_natively_can_be_served_so_too(tmp_path: Path) -> None:
    path = make("qwen3", tmp_path / "qwen3")
    reference = Reference(path)
    for implementation in ("native", "transformers"):
        assert compare(path, reference, SETTINGS[0], implementation).wrong == ()


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Windows in all layers, and in one of two; they begin within blocks, and are far shorter than the prompts."""


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    path = make(request.param, tmp_path_factory.mktemp("windowed") / request.param, **WINDOWED[request.param])
    return path, Reference(path)


@pytest.mark.few(2)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_windows_natively(windowed: tuple[Path, Reference], setting: Setting) -> None:
    """Where every layer has one, a sequence holds too little for anybody to be preempted."""
    path, reference = windowed
    outcome = compare(path, reference, setting, "native")
    assert outcome.wrong == ()
    assert outcome.hits > 0
    assert outcome.preemptions > 0 or not setting.small or path.name == "mistral"


def test_the_page_has_every_model_type(tmp_path: Path) -> None:
    """Each with its class, and not one that is another's."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|.*\|$", DOCS.read_text(), re.MULTILINE))
    assert list(rows) == sorted(ZOO | MORE)
    for kind in KINDS:
        how = ReadingConfig(model_implementation="transformers")
        assert rows[kind] == read_model(make(kind, tmp_path / kind), how).architecture
