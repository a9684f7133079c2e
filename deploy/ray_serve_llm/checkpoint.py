"""Where a model is that was named as Ray Serve LLM names it: a folder, or an id of Hugging Face's that this node's cache has.
Downloads nothing. Imports huggingface_hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from deploy.config.load import ConfigError

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_checkpoint(path: str, source: str) -> str:
    """The folder. path: where `source` was said. Errors: ConfigError."""
    if Path(source).is_dir() or not _ID.fullmatch(source):
        return source  # one that is not there has its own message, from whoever reads it
    try:
        return snapshot_download(source, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{path}={source!r} is neither a folder nor in this node's Hugging Face cache, and nothing is downloaded while "
            f"starting: run `hf download {source}` with HF_HOME on a volume that every node has, or name a folder that every "
            "node has"
        ) from error
