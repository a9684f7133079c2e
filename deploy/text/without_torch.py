"""transformers without torch, for processes that do nothing but tokenise: most of what its import takes is torch's.

For processes of Manta's own alone: transformers knows of no model in them.
"""

import logging
import sys


def import_without_torch() -> None:
    """Does nothing where either of them is imported already."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    disabled = logging.root.manager.disable
    sys.modules["torch"] = None  # type: ignore[assignment]  # what Python itself takes for: there is no such module
    logging.disable(logging.WARNING)  # that PyTorch was not found
    try:
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        logging.disable(disabled)
        del sys.modules["torch"]
