"""From what a model was called to the folder of its files, on this node. Everybody who reads a checkpoint asks here first.

    folder    as it is                                       (`naming`)
    id        from Hugging Face's cache, else downloaded     (`hub`)
    URL       from a copy on this node, else copied          (`stores`)

Imports huggingface_hub and fsspec where they are needed; no torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from workers.config import GroupsConfig
from workers.model.config.fields import CheckpointError
from workers.model.sources.files import Need
from workers.model.sources.naming import folder_of, kind_of
from workers.model.sources.progress import Progress

C = TypeVar("C", bound=GroupsConfig)


def find_checkpoint(config: GroupsConfig, need: Need = Need.SETTINGS, report: Progress = lambda *_: None) -> Path:
    """A folder that has what is needed. report: of a download. What may be in a folder of the user's own is found by whoever
    reads it. Errors: CheckpointError that says where was looked, and what to do."""
    kind = kind_of(config.model)
    if kind == "folder":
        if config.revision is not None:
            raise CheckpointError(
                f"revision={config.revision!r} is of an id at Hugging Face, and model={config.model!r} is a folder: leave it "
                "out, or check the id"
            )
        return folder_of(config.model)
    if kind == "id":
        from workers.model.sources import hub

        return hub.find(config.model, config.revision, need, config.download_dir, report)
    from workers.model.sources import stores

    return stores.find(config.model, config.revision, need, config.download_dir, report)


def pinned(config: C) -> C:
    """The same for ever, and for processes in whatever folder: what a branch, or a URL, is at this moment, whatever it becomes
    while they start one after another. A folder stays what it is. Errors: as `find_checkpoint`."""
    if kind_of(config.model) == "folder":
        return config
    if config.download_dir is not None:
        config = replace(config, download_dir=str(Path(config.download_dir).expanduser().absolute()))
    return replace(config, revision=find_checkpoint(config).name)
