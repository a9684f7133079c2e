"""Whose `deploy`, `cluster` and so on a process means: Manta's own, wherever its script lies.

Python looks for a package beside the script first, and many a project has a folder of such a name. `claim` puts a finder before
all others that finds six names, and no others, beside this very file. Imports nothing of Manta's: it goes before everything.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOMS = ("kvcache", "scheduler", "workers", "cluster", "deploy", "simulator")
ROOT = Path(__file__).resolve().parents[1]


def claim() -> None:
    """From here on the six names are Manta's in this process. A second call does nothing.

    Errors: ImportError if this process has imported something else by one of them.
    """
    for room in ROOMS:
        loaded = sys.modules.get(room)
        if loaded is not None and (place := _place(loaded)) != ROOT / room:
            raise ImportError(
                f"Manta has a package {room!r}, and this process has imported {place} by that name: a process has one package "
                "of a name, so rename that one, or keep it out of the process that imports manta",
                name=room,
            )
    if OwnRooms not in sys.meta_path:
        sys.meta_path.insert(0, OwnRooms)
        sys.meta_path.append(NotOurs)


class OwnRooms:
    """Finds Manta's six packages where Manta is. A finder as `sys.meta_path` has them."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)], target) if path is None and name in ROOMS else None


class NotOurs:
    """Asked last, where no module was found: says why, if the one that was meant lies in a folder of the user's."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        room, _, below = name.partition(".")
        if room not in ROOMS or "." in below or path is None:
            return None
        theirs = PathFinder.find_spec(room, None, target)
        places = list(theirs.submodule_search_locations or ()) if theirs is not None else []
        if str(ROOT / room) in places or PathFinder.find_spec(name, places, target) is None:
            return None
        raise ModuleNotFoundError(
            f"No module named {name!r}: in a process that imports manta, {room!r} is a package of Manta's; to import that of "
            f"{places[0]} beside it, rename it",
            name=name,
        )


def _place(module: ModuleType) -> Path:
    """The folder of a package, or the file of a module."""
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
    return Path(places[0]).resolve()
