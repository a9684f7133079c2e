"""A model by its id: from the cache, from a server that speaks as Hugging Face's does, or refused with where was looked."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.shared.hub import Hub, hub_of, put_into_cache
from workers.config import GroupsConfig
from workers.model.config.fields import CheckpointError
from workers.model.sources.files import Need
from workers.model.sources.find import find_checkpoint, pinned

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
MODULES = json.dumps([{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]).encode()
FILES = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b"t" * 1000,
    "tokenizer.model": b"m",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool.jinja": b"{{ y }}",
    "modules.json": MODULES,
    "1_Pooling/config.json": b'{"pooling_mode_lasttoken": true}',
    "model.safetensors.index.json": INDEX,
    SHARDS[0]: b"a" * 200_000,
    SHARDS[1]: b"b" * 100_000,
    "consolidated.safetensors": b"c" * 300_000,
    "pytorch_model.bin": b"p",
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": b"g",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"o",
    "onnx/config.json": b"{}",
    "trainer_state.json": b"{}",
    "README.md": b"r",
}
SETTINGS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
    "additional_chat_templates/tool.jinja", "modules.json", "1_Pooling/config.json", "model.safetensors.index.json",
}  # fmt: skip
NAME = "org/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of({NAME: dict(FILES)}, monkeypatch) as hub:
        yield hub


@pytest.fixture
def config(tmp_path: Path) -> GroupsConfig:
    return GroupsConfig(model=NAME, download_dir=str(tmp_path / "cache"))


def test_what_is_needed_is_downloaded_and_nothing_else(hub: Hub, config: GroupsConfig) -> None:
    folder = find_checkpoint(config, Need.CONFIG)
    assert _files(folder) == {"config.json"}
    folder = find_checkpoint(config, Need.SETTINGS)
    assert _files(folder) == SETTINGS
    told: list[tuple[int, int]] = []
    folder = find_checkpoint(config, Need.WEIGHTS, lambda done, total: told.append((done, total)))
    assert _files(folder) == SETTINGS | {*SHARDS}
    assert (folder / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]
    assert told[-1] == (300_000, 300_000)
    assert sorted(hub.read) == sorted(SETTINGS | {*SHARDS}), "and each file once"


def test_what_is_there_is_not_asked_for_again(
    hub: Hub, config: GroupsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = pinned(config)
    assert exact.revision == hub.commit(NAME)
    monkeypatch.chdir(tmp_path)
    assert pinned(replace(exact, download_dir="cache")) == exact, "for processes in other folders"
    folder = find_checkpoint(exact, Need.WEIGHTS)
    asked = len(hub.asked)
    assert find_checkpoint(exact, Need.WEIGHTS) == folder
    assert pinned(exact) == exact
    assert len(hub.asked) == asked


def test_a_branch_that_moves_leaves_what_was_pinned_as_it_was(hub: Hub, config: GroupsConfig) -> None:
    exact = pinned(config)
    old = find_checkpoint(exact, Need.WEIGHTS)
    hub.repos[NAME]["config.json"] = b'{"new": 1}'
    assert pinned(config).revision == hub.commit(NAME) != exact.revision
    assert (find_checkpoint(config) / "config.json").read_bytes() == b'{"new": 1}'
    assert find_checkpoint(exact, Need.WEIGHTS) == old
    assert (old / "config.json").read_bytes() == b"{}"


def test_an_interrupted_download_does_not_count_and_goes_on(
    hub: Hub, config: GroupsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = pinned(config)
    hub.cut[SHARDS[1]] = 1000
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's own tries
    with pytest.raises(CheckpointError, match="could not be read"):
        find_checkpoint(exact, Need.WEIGHTS)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
            find_checkpoint(exact, Need.WEIGHTS)
    hub.cut.clear()
    folder = find_checkpoint(exact, Need.WEIGHTS)
    assert (folder / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]


@pytest.mark.usefixtures("hub")
def test_settings_that_were_interrupted_do_not_count(
    config: GroupsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = pinned(config)
    (find_checkpoint(exact) / "tokenizer.json").unlink()
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            find_checkpoint(exact)
    assert "tokenizer.json" in _files(find_checkpoint(exact))


def test_a_cache_that_others_have_filled_serves_offline(config: GroupsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.download_dir is not None
    snapshot = put_into_cache(Path(config.download_dir), NAME, FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(config, Need.WEIGHTS) == snapshot
    assert pinned(config).revision == "c" * 40
    (snapshot / SHARDS[1]).unlink()
    assert find_checkpoint(config) == snapshot, "front ends read no weights"
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]} is not in .*HF_HUB_OFFLINE forbids"):
        find_checkpoint(config, Need.WEIGHTS)


def test_without_a_network_the_cache_serves(config: GroupsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.download_dir is not None
    snapshot = put_into_cache(Path(config.download_dir), NAME, FILES)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's own tries
    with hub_of({}, monkeypatch):
        pass  # nobody listens at this port any more
    assert find_checkpoint(config, Need.WEIGHTS) == snapshot
    assert pinned(config).revision == "c" * 40
    other = GroupsConfig(model="org/other", download_dir=config.download_dir)
    with pytest.raises(CheckpointError, match=rf"{config.download_dir}.* http://127.* could not be read"):
        find_checkpoint(other)


def test_what_is_not_there_says_where_was_looked(hub: Hub, config: GroupsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(model: str, revision: str | None = None) -> str:
        with pytest.raises(CheckpointError) as refused:
            find_checkpoint(GroupsConfig(model=model, revision=revision, download_dir=config.download_dir))
        return str(refused.value)

    said = refusal("org/nmae")
    assert str(Path("org/nmae").absolute()) in said
    assert str(config.download_dir) in said
    assert f"there is no {constants.ENDPOINT}/org/nmae" in said
    assert "has no revision 'v2'" in refusal(NAME, "v2")
    hub.gated.add(NAME)
    assert "gated" in refusal(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "hf download org/nmae" in refusal("org/nmae")


def test_a_repository_without_safetensors_says_so(hub: Hub, config: GroupsConfig) -> None:
    for name in [*SHARDS, "model.safetensors.index.json"]:
        del hub.repos[NAME][name]
    with pytest.raises(CheckpointError, match=r"model\.safetensors is neither in .* only checkpoints in safetensors"):
        find_checkpoint(config, Need.WEIGHTS)


def test_a_single_file_is_read_without_an_index(hub: Hub, config: GroupsConfig) -> None:
    del hub.repos[NAME]["model.safetensors.index.json"]
    hub.repos[NAME]["model.safetensors"] = b"s"
    assert {each for each in _files(find_checkpoint(config, Need.WEIGHTS)) if each.endswith("rs")} == {"model.safetensors"}


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
