"""A start waits for a download for as long as it goes on, and a node downloads once whatever its groups and ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from huggingface_hub import constants

from cluster.engine import EngineError
from cluster.fleet.group import GroupHandle
from deploy import LLM, SamplingParams
from tests.shared.hub import Hub, hub_of
from workers.config import ResolvedWorker, WorkerConfig
from workers.model.sources.progress import DOWNLOADING

TINY = Path(__file__).parents[3] / "examples" / "tiny"
NAME = "org/tiny"
TOOK_S = 1000.0


class Call:
    """What a remote call returns."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self) -> Any:
        return self._answer


class Downloading:
    """A rank whose download comes in so many steps, one each time when it is asked, and then takes no more."""

    def __init__(self, steps: int) -> None:
        self.fetch = Call(self)
        self.steps, self.step = steps, 0

    @property
    def phase(self) -> Call:
        self.step = min(self.step + 1, self.steps)
        return Call((DOWNLOADING, self.step, 1000))


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A group with one such rank, whose fetch ends after 20 looks of 10 seconds each."""
    now = [0.0]
    looks = [0]

    def wait(pending: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        now[0] += 10.0
        looks[0] += 1
        return (pending, []) if looks[0] == 20 else ([], pending)

    def get(reference: Any, _: float) -> Any:
        return TOOK_S if isinstance(reference, Downloading) else reference

    monkeypatch.setattr("cluster.fleet.group.ray.wait", wait)
    monkeypatch.setattr("cluster.fleet.group.time.monotonic", lambda: now[0])
    monkeypatch.setattr("cluster.fleet.group._get", get)

    def made(steps: int) -> GroupHandle:
        handle = GroupHandle(3, 0, WorkerConfig(model=NAME), ResolvedWorker(), "text")
        handle._ranks = [Downloading(steps)]
        return handle

    return made  # type: ignore[return-value]


def test_a_download_that_goes_on_is_waited_for(fetching: Any) -> None:
    handle = fetching(20)
    assert handle._fetch(patience_s=15.0) == TOOK_S, "which is added to the time that the start has"
    assert (handle.phase.phase, handle.phase.done) == (DOWNLOADING, 20)


def test_one_that_brings_nothing_more_is_not(fetching: Any) -> None:
    with pytest.raises(EngineError, match=r"group 3: nothing more of org/tiny has come .* for 45 s: .* raise start_timeout_s"):
        fetching(4)._fetch(patience_s=45.0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """That processes which start from now on find, too."""
    with hub_of({NAME: {path.name: path.read_bytes() for path in TINY.iterdir()}}, monkeypatch) as hub:
        monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


@pytest.mark.ray
@pytest.mark.slow
def test_two_groups_of_two_ranks_download_once(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"dtype": "float32", "kv_memory": "32MiB", "block_size": 16}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM(
        NAME, progress=said.append, groups=2, tensor_parallel_size=2, download_dir=str(tmp_path), **options
    ) as llm:
        (output,) = llm.generate("def add(", params, progress=False)
        assert llm.config.revision == hub.commit(NAME)
    assert not ray.is_initialized()
    with LLM(TINY, local=True, **options) as llm:
        (same,) = llm.generate("def add(", params, progress=False)
    assert output.outputs[0].token_ids == same.outputs[0].token_ids
    assert hub.read.count("model.safetensors") == 1
