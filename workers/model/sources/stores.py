"""A model by URL, in any store that fsspec knows: what is needed of it is copied into a folder of this node.

    ASSETS/manta/models/URL/LISTING.json    what there was in the store, when somebody looked
                           /LISTING/        the copy: a file is in it once all of it is

A listing is named by the sizes and marks (etags, or what else a store has) of all that could be needed: what changes under the
same URL is another listing, beside the old one, whose other files it shares. Credentials are found where each store's package
looks. Imports fsspec.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from workers.model.config.fields import CheckpointError
from workers.model.sources.files import CONFIG_FILE, Need, is_setting, lacking, module_files, weight_files
from workers.model.sources.places import place
from workers.model.sources.progress import Progress
from workers.model.sources.turns import turn

logger = logging.getLogger(__name__)

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
EXTRA = "pip install 'manta-serve[cloud]'"

MARKS = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "sha256", "generation", "mtime", "LastModified", "last_modified",
    "Last-Modified", "created",
)  # fmt: skip
"""By which stores show that a file is another one, the best first."""

DEPTH = 2
"""Below the URL: modules of sentence-transformers, and templates, have folders of their own."""

THREADS = 8
_LISTING = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a store. mark: of its content; "" where the store has none."""

    size: int
    mark: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Files by their paths below the URL."""

    files: dict[str, StoredFile]

    @property
    def name(self) -> str:
        told = sorted((name, entry.size, entry.mark) for name, entry in self.files.items())
        return hashlib.sha256(repr(told).encode()).hexdigest()[:24]

    def save(self, home: Path) -> None:
        text = json.dumps({name: [entry.size, entry.mark] for name, entry in self.files.items()}, indent=1)
        scratch = home / f".{self.name}.{os.getpid()}.{threading.get_ident()}"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(home / f"{self.name}.json")

    @classmethod
    def load(cls, file: Path) -> "Listing":
        """Errors: OSError, ValueError."""
        return cls({name: StoredFile(*entry) for name, entry in json.loads(file.read_text(encoding="utf-8")).items()})


def find(url: str, revision: str | None, need: Need, download_dir: str | None, report: Progress) -> Path:
    """The copy's folder, whose name is its listing. revision: a listing's name; None: of what is there now.
    Errors: CheckpointError."""
    if revision is not None and not _LISTING.fullmatch(revision):
        raise CheckpointError(f"revision={revision!r} is of an id at Hugging Face, and model={url!r} is a URL: leave it out")
    try:
        copy = _Copy(url, download_dir)
        listing = copy.listing(revision)
        if copy.lacks(listing, need):
            with turn(copy.home / "lock", report) as tell:
                copy.fetch(listing, need, tell)
    except CheckpointError:
        raise
    except Exception as error:  # each store has errors of its own
        raise CheckpointError(f"model={url!r} cannot be read: {error or type(error).__name__}") from error
    return copy.folder(listing)


class _Copy:
    """Of one URL. home: all that this node keeps of it."""

    def __init__(self, url: str, download_dir: str | None) -> None:
        self._url = url.rstrip("/")
        self.home = place("models", self._url, download_dir)

    def folder(self, listing: Listing) -> Path:
        return self.home / listing.name

    def listing(self, name: str | None) -> Listing:
        """Errors: CheckpointError, those of stores."""
        if name is not None:
            with contextlib.suppress(OSError, ValueError):
                return Listing.load(self.home / f"{name}.json")
        try:
            found = self._look()
        except (CheckpointError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if name is not None or (kept := self._newest()) is None:
                raise
            logger.warning("%s cannot be reached (%s): the copy of what it was is read", self._url, error)
            return kept
        if name not in (None, found.name):
            raise CheckpointError(
                f"{self._url} has changed since this endpoint started, and this node has no copy of what it was: deploy it anew"
            )
        found.save(self.home)
        self.folder(found).mkdir(exist_ok=True)
        return found

    def _newest(self) -> Listing | None:
        """Of what was seen before."""
        files = sorted(self.home.glob("*.json"), key=lambda file: file.stat().st_mtime)
        return Listing.load(files[-1]) if files else None

    def lacks(self, listing: Listing, need: Need) -> list[str]:
        """Names of files that are needed, there, and not here. Errors: CheckpointError."""
        names = [CONFIG_FILE]
        if need >= Need.SETTINGS:
            names += [name for name in listing.files if is_setting(name)]
            names += module_files(self.folder(listing))
        lacks = self._absent(listing, names)
        if need == Need.WEIGHTS and not lacks:  # else nobody knows yet which they are
            lacks = self._absent(listing, weight_files(self.folder(listing)))
        return lacks

    def fetch(self, listing: Listing, need: Need, report: Progress) -> None:
        """Errors: CheckpointError, those of stores."""
        fs, root = open_store(self._url)
        while names := self.lacks(listing, need):
            names = [name for name in names if not self._shared(listing, name)]
            self._copy(fs, root, listing, names, report)
        if missing := lacking(self.folder(listing), need):
            raise CheckpointError(
                f"{self._url} has no {missing[0]}: only checkpoints in safetensors, with their config.json, are read"
            )

    def _absent(self, listing: Listing, names: Iterable[str]) -> list[str]:
        folder = self.folder(listing)
        return [name for name in dict.fromkeys(names) if name in listing.files and not (folder / name).is_file()]

    def _look(self) -> Listing:
        """What the store has now, of what could be needed. Errors: CheckpointError, those of stores."""
        fs, root = open_store(self._url)
        fs.invalidate_cache()
        found = fs.find(root, maxdepth=DEPTH, detail=True)
        below = {path[len(root) :].strip("/"): info for path, info in found.items()}
        wanted = {name: info for name, info in below.items() if _could_be_needed(name)}
        if CONFIG_FILE not in wanted:
            raise CheckpointError(
                f"model={self._url!r}: there is no {CONFIG_FILE} below it ({len(found)} other files), so no checkpoint in "
                "Hugging Face format: check the URL"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            entries = pool.map(lambda name: _entry(fs, f"{root}/{name}", wanted[name]), wanted)
            return Listing(dict(zip(wanted, entries, strict=True)))

    def _shared(self, listing: Listing, name: str) -> bool:
        """Whether an older copy has the same file, which is then this one's too."""
        entry = listing.files[name]
        for file in self.home.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                theirs = self.home / file.stem / name
                if entry.mark and Listing.load(file).files.get(name) == entry and theirs.is_file():
                    ours = self.folder(listing) / name
                    ours.parent.mkdir(parents=True, exist_ok=True)
                    ours.hardlink_to(theirs)
                    return True
        return False

    def _copy(self, fs: Any, root: str, listing: Listing, names: list[str], report: Progress) -> None:
        copying = _Copying(sum(listing.files[name].size for name in names), report)

        def copy(name: str) -> None:
            target = self.folder(listing) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f"{target.name}.incomplete")
            fs.get_file(f"{root}/{name}", str(scratch), callback=copying.of_file())
            if scratch.stat().st_size != listing.files[name].size or _now(fs, f"{root}/{name}") != listing.files[name]:
                scratch.unlink()
                raise CheckpointError(f"{self._url}/{name} has changed while it was read: start again")
            scratch.replace(target)

        with ThreadPoolExecutor(THREADS) as pool:
            under_way = [pool.submit(copy, name) for name in names]
            try:
                for each in as_completed(under_way):
                    each.result()
            except BaseException:
                copying.stopped = True
                pool.shutdown(cancel_futures=True)
                raise


class _Copying:
    """Several files at a time, one sum. stopped: the others end too."""

    def __init__(self, total: int, report: Progress) -> None:
        self.stopped = False
        self._done, self._total, self._report = 0, total, report
        self._lock = threading.Lock()

    def of_file(self) -> Any:
        copying = self

        class Copied(fsspec.Callback):  # type: ignore[misc]
            seen = 0

            def relative_update(self, inc: int = 1) -> None:
                copying._add(inc)

            def absolute_update(self, value: int) -> None:
                copying._add(value - self.seen)
                self.seen = value

        return Copied()

    def _add(self, done: int) -> None:
        if self.stopped:
            raise InterruptedError("another file could not be read")
        with self._lock:
            self._done += done
            self._report(self._done, self._total)


def open_store(url: str) -> tuple[Any, str]:
    """Its file system, and the path there. Errors: CheckpointError."""
    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        how = f"{package}: {EXTRA}" if package is not None else f"a package that is not installed: {error}"
        raise CheckpointError(f"model={url!r}: {scheme}:// needs {how}") from error
    except ValueError as error:
        raise CheckpointError(f"model={url!r}: {error}") from error
    return fs, str(path).rstrip("/")


def _could_be_needed(name: str) -> bool:
    return is_setting(name) or name.endswith((f"/{CONFIG_FILE}", ".safetensors"))


def _now(fs: Any, path: str) -> StoredFile | None:
    """As a listing says it, since stores write the same mark differently elsewhere."""
    folder = path.rpartition("/")[0]
    fs.invalidate_cache(folder)
    found = next((info for info in fs.ls(folder, detail=True) if info["name"].strip("/") == path.strip("/")), None)
    return None if found is None else _entry(fs, path, found)


def _entry(fs: Any, path: str, info: dict[str, Any]) -> StoredFile:
    """info: what a listing says of it; where that is too little the store is asked for this file alone."""
    if info.get("size") is None or not any(info.get(mark) for mark in MARKS):
        info = fs.info(path)
    mark = next((f"{name}={info[name]}" for name in MARKS if info.get(name)), "")
    return StoredFile(int(info["size"]), mark)
