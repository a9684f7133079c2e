"""What kind of name a model was given by. Looks at the disk, asks nobody. Imports nothing of Manta."""

import re
from pathlib import Path
from typing import Literal

Kind = Literal["folder", "id", "url"]

_URL = re.compile(r"[A-Za-z][\w+.-]*://.+")
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LOCAL = "file://"


def kind_of(model: str) -> Kind:
    """A folder that is there is one, whatever it looks like; what looks like no id (org/name) is a folder that is missing."""
    if _URL.fullmatch(model):
        return "folder" if model.startswith(_LOCAL) else "url"
    return "id" if _ID.fullmatch(model) and not Path(model).is_dir() else "folder"


def folder_of(model: str) -> Path:
    """Of a model of that kind."""
    return Path(model.removeprefix(_LOCAL))


def wherever(model: str) -> str:
    """The same model for a process that works in another folder."""
    return str(folder_of(model).absolute()) if kind_of(model) == "folder" else model
