"""A model by its id at Hugging Face: from this node's cache, else into it. Token, endpoint, cache and offline mode are found
where huggingface_hub always looks. Imports huggingface_hub, and tqdm, through which it says how far it is.
"""

import glob
import io
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from workers.model.config.fields import CheckpointError
from workers.model.sources.files import (
    CONFIG_FILE,
    OTHER_FILES,
    SETTING_FILES,
    Need,
    lacking,
    module_files,
    weight_files,
)
from workers.model.sources.places import place
from workers.model.sources.progress import Progress
from workers.model.sources.turns import turn

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def find(model: str, revision: str | None, need: Need, download_dir: str | None, report: Progress) -> Path:
    """The snapshot's folder, whose name is its commit. revision: a branch, tag or commit; what a branch is now is asked, and
    where nobody can be asked the cache knows what it was. Errors: CheckpointError that says where was looked."""
    hub = _Hub(model, revision, download_dir)
    try:
        if constants.HF_HUB_OFFLINE:
            return hub.local(need)
        if revision is not None and _COMMIT.fullmatch(revision) and (folder := hub.cached(need)) is not None:
            return folder
        if need != Need.WEIGHTS:  # some megabytes at most, file by file under huggingface_hub's own locks
            return hub.fetch(need, report)
        with turn(place("locks", model, download_dir) / "lock", report) as tell:
            return hub.fetch(need, tell)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the library, and what it speaks HTTP with, raise
        raise CheckpointError(hub.complaint(error)) from error


class _Hub:
    """One id, and where it is looked for."""

    def __init__(self, model: str, revision: str | None, download_dir: str | None) -> None:
        self._model, self._revision = model, revision
        self._cache = download_dir or constants.HF_HUB_CACHE
        self._url = f"{constants.ENDPOINT}/{model}"

    def local(self, need: Need) -> Path:
        """Asks nobody. Errors: CheckpointError, huggingface_hub's."""
        return self._files(need, {"local_files_only": True})

    def cached(self, need: Need) -> Path | None:
        """If it is there whole, as far as anybody can tell without asking."""
        try:
            return self.local(need)
        except LocalEntryNotFoundError:
            return None
        except CheckpointError:  # the files that say which others there are may be of an interrupted download
            return None

    def fetch(self, need: Need, report: Progress) -> Path:
        """What is missing is downloaded, the settings first. Errors: CheckpointError, huggingface_hub's."""
        return self._files(need, {}, report)

    def _files(self, need: Need, how: dict[str, Any], report: Progress = lambda *_: None) -> Path:
        if need == Need.CONFIG:
            folder = self._snapshot([CONFIG_FILE], **how)
        else:
            folder = self._snapshot(list(SETTING_FILES), ignore_patterns=list(OTHER_FILES), **how)
            self._fetch_named(folder, module_files(folder), lambda *_: None, how)
        if need == Need.WEIGHTS:
            self._fetch_named(folder, weight_files(folder), report, how)
        if missing := lacking(folder, need):
            if how:
                raise LocalEntryNotFoundError(f"{missing[0]} is not in {folder}")
            raise CheckpointError(
                f"model={self._model!r}: {missing[0]} is neither in {folder} nor at {self._url}: only checkpoints in "
                "safetensors, with their config.json, are read"
            )
        return folder

    def _fetch_named(self, folder: Path, names: list[str], report: Progress, how: dict[str, Any]) -> None:
        """What is here already needs no network, which may be why it is here."""
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            self._snapshot([CONFIG_FILE, *map(glob.escape, missing)], folder.name, report, **how)

    def _snapshot(
        self, patterns: list[str], revision: str | None = None, report: Progress = lambda *_: None, **how: Any
    ) -> Path:
        found = snapshot_download(
            self._model, revision=revision or self._revision, cache_dir=self._cache, allow_patterns=patterns,
            tqdm_class=_bars(report), **how,
        )  # fmt: skip
        return Path(found)

    def complaint(self, error: Exception) -> str:
        """Where was looked, and what to do."""
        looked = f"model={self._model!r} is no folder ({Path(self._model).absolute()})"
        if isinstance(error, GatedRepoError):
            return f"{looked}; {self._url} is gated: accept its terms there, then set HF_TOKEN or run `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{looked}, it is not in the cache {self._cache}, and there is no {self._url}, or only for those who may read "
                "it: check the name; of a private model set HF_TOKEN or run `hf auth login`"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{self._url} has no revision {self._revision!r}: name a branch, a tag or a commit of it"
        if isinstance(error, HFValidationError):
            return f"{looked}, and no id at Hugging Face ({error})"
        if constants.HF_HUB_OFFLINE:
            return (
                f"{looked}, it is not whole in the cache {self._cache} ({_first_line(error)}), and HF_HUB_OFFLINE forbids to "
                f"download it: unset that, or run `hf download {self._model}` where there is a network"
            )
        return f"{looked}, it is not whole in the cache {self._cache}, and {self._url} could not be read: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0] if lines else type(error).__name__


def _bars(report: Progress) -> type[Any]:
    """A class of bars that draw nothing and say how far they are. There are several for the same bytes (on their way, in the
    file), and one that counts files."""
    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})
            if options.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if bars:
                report(int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars)))
            return None

    return Bar
