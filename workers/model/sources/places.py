"""Where on this node is kept what is neither the user's nor Hugging Face's: copies, and whose turn it is.

Imports huggingface_hub, which knows where libraries may keep such.
"""

import hashlib
from pathlib import Path

from huggingface_hub import cached_assets_path


def place(kind: str, model: str, download_dir: str | None) -> Path:
    """A folder of one model, which is there. Errors: OSError."""
    name = hashlib.sha256(model.encode()).hexdigest()[:16]
    assets = None if download_dir is None else Path(download_dir) / "assets"
    return cached_assets_path("manta", kind, name, assets_dir=assets)
