"""A model by URL: what is needed is copied, whole files alone count, and what changes in the store is another copy."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.shared.servers import answering
from tests.workers.model.sources.test_hub import FILES, SETTINGS, SHARDS
from workers.config import GroupsConfig
from workers.model.config.fields import CheckpointError
from workers.model.sources.files import Need
from workers.model.sources.find import find_checkpoint, pinned
from workers.model.sources.turns import turn

URL = "memory://bucket/models/name"


class Store(MemoryFileSystem):  # type: ignore[misc]
    """read: files that were asked for. fails: how many of the next reads break off half-way."""

    protocol = "counted"
    cachable = False
    read: ClassVar[list[str]] = []
    fails = 0
    reachable = True

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **options: Any) -> None:
        Store.read.append(rpath.removeprefix("/bucket/models/name/"))
        if Store.fails and rpath.endswith(".safetensors"):
            Store.fails -= 1
            Path(lpath).write_bytes(self.cat_file(rpath)[:100])
            raise ConnectionError("the line was cut")
        super().get_file(rpath, lpath, callback=callback, **options)

    def find(self, path: str, **options: Any) -> Any:
        if not Store.reachable:
            raise ConnectionError("nobody is there")
        return super().find(path, **options)


@pytest.fixture
def store() -> Iterator[Store]:
    fsspec.register_implementation("memory", Store, clobber=True)
    Store.read, Store.fails, Store.reachable = [], 0, True
    fs = Store()
    for name, content in FILES.items():
        fs.pipe_file(f"/bucket/models/name/{name}", content)
    yield fs
    fs.store.clear()
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


@pytest.fixture
def config(tmp_path: Path) -> GroupsConfig:
    return GroupsConfig(model=URL, download_dir=str(tmp_path / "cache"))


def test_what_is_needed_is_copied_and_nothing_else(store: Store, config: GroupsConfig) -> None:
    assert _files(find_checkpoint(config, Need.CONFIG)) == {"config.json"}
    assert _files(find_checkpoint(config, Need.SETTINGS)) == SETTINGS
    told: list[tuple[int, int]] = []
    folder = find_checkpoint(config, Need.WEIGHTS, lambda done, total: told.append((done, total)))
    assert _files(folder) == SETTINGS | {*SHARDS}
    assert (folder / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]
    assert told[-1] == (300_000, 300_000)
    assert sorted(store.read) == sorted(SETTINGS | {*SHARDS}), "and each file once"


def test_a_file_that_changes_is_seen_and_what_was_pinned_stays(store: Store, config: GroupsConfig) -> None:
    exact = pinned(config)
    old = find_checkpoint(exact, Need.WEIGHTS)
    store.pipe_file("/bucket/models/name/config.json", b"[]")  # as long as before
    store.read.clear()
    new = find_checkpoint(config, Need.WEIGHTS)
    assert (new / "config.json").read_bytes() == b"[]"
    assert store.read == ["config.json"], "the others are shared with the older copy"
    assert find_checkpoint(exact, Need.WEIGHTS) == old
    assert (old / "config.json").read_bytes() == b"{}"
    elsewhere = GroupsConfig(model=URL, revision=exact.revision, download_dir=f"{config.download_dir}-of-another-node")
    with pytest.raises(CheckpointError, match="has changed since"):
        find_checkpoint(elsewhere, Need.WEIGHTS)


def test_an_interrupted_copy_does_not_count_and_goes_on(store: Store, config: GroupsConfig) -> None:
    Store.fails = 1
    with pytest.raises(CheckpointError, match=r"memory://bucket/models/name.*the line was cut"):
        find_checkpoint(config, Need.WEIGHTS)
    store.read.clear()
    folder = find_checkpoint(config, Need.WEIGHTS)
    assert [(folder / name).read_bytes() == FILES[name] for name in SHARDS] == [True, True]
    assert not SETTINGS & {*store.read}, "what was whole is not read again"


@pytest.mark.usefixtures("store")
def test_a_file_that_changes_while_it_is_read_does_not_count(
    config: GroupsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(self: Store, rpath: str, lpath: str, **options: Any) -> None:
        MemoryFileSystem.get_file(self, rpath, lpath, **options)
        if rpath.endswith(SHARDS[1]):
            self.pipe_file(rpath, FILES[SHARDS[1]].upper())

    monkeypatch.setattr(Store, "get_file", changing)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors has changed while it was read"):
        find_checkpoint(config, Need.WEIGHTS)


def test_processes_of_one_node_copy_once(store: Store, config: GroupsConfig) -> None:
    ready = threading.Barrier(4)
    found: list[Path] = []

    def rank() -> None:
        ready.wait()
        found.append(find_checkpoint(config, Need.WEIGHTS))

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert sorted(store.read) == sorted(SETTINGS | {*SHARDS})


def test_who_waits_sees_how_far_the_other_one_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    far, waited = threading.Event(), threading.Event()

    def other() -> None:
        with turn(tmp_path / "lock", lambda *_: None) as tell:
            tell(0, 0)
            far.set()
            waited.wait()

    def seen(done: int, total: int) -> None:
        told.append((done, total))
        waited.set()

    thread = threading.Thread(target=other)
    thread.start()
    far.wait()
    with turn(tmp_path / "lock", seen):
        assert told[0] == (0, 0)
    thread.join()


@pytest.mark.usefixtures("store")
def test_a_store_that_cannot_be_reached_is_as_it_was(config: GroupsConfig) -> None:
    folder = find_checkpoint(config, Need.WEIGHTS)
    Store.reachable = False
    assert find_checkpoint(config, Need.WEIGHTS) == folder
    with pytest.raises(CheckpointError, match="nobody is there"):
        find_checkpoint(GroupsConfig(model=f"{URL}2", download_dir=config.download_dir))


@pytest.mark.usefixtures("store")
def test_what_cannot_be_read_says_why(config: GroupsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(model: str, revision: str | None = None) -> str:
        with pytest.raises(CheckpointError) as refused:
            find_checkpoint(GroupsConfig(model=model, revision=revision, download_dir=config.download_dir))
        return str(refused.value)

    assert "no config.json below it" in refusal("memory://bucket/models")
    assert "Protocol not known" in refusal("nothing://bucket/models")
    assert "revision='main'" in refusal(URL, "main")
    assert "leave it out" in refusal("file:///models/x", "main")
    monkeypatch.setattr(fsspec.core, "url_to_fs", _not_installed)
    assert "s3:// needs s3fs: pip install 'manta-serve[cloud]'" in refusal("s3://bucket/name")
    assert "gs:// needs gcsfs" in refusal("gs://bucket/name")


def test_a_web_server_with_an_index_is_a_store(tmp_path: Path, config: GroupsConfig) -> None:
    for name, content in FILES.items():
        (tmp_path / "site" / "name" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / "name" / name).write_bytes(content)
    with answering(partial(_Site, directory=str(tmp_path / "site"))) as port:  # type: ignore[arg-type]
        url = f"http://127.0.0.1:{port}/name"
        folder = find_checkpoint(GroupsConfig(model=url, download_dir=config.download_dir), Need.WEIGHTS)
        assert _files(folder) == SETTINGS | {*SHARDS}
        assert (folder / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]


def test_a_local_url_is_the_folder_itself(tmp_path: Path) -> None:
    assert find_checkpoint(GroupsConfig(model=f"file://{tmp_path}"), Need.WEIGHTS) == tmp_path


class _Site(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _not_installed(url: str) -> None:
    raise ImportError(f"Install what {url} takes")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
