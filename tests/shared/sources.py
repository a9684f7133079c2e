"""Python's sources as trees, for tests of how they are written."""

import ast
import gc
from pathlib import Path


def parsed(path: Path) -> ast.Module:
    """CPython 3.11 counts how deep a tree is for all threads in one place, and fails where another one parses meanwhile. It has
    its turn in the midst of a parse by a collection of garbage alone, through what is called back then, as Hypothesis is."""
    was = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        if was:
            gc.enable()
