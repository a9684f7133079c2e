"""What msgspec finds wrong with a value, and where in it. Imports msgspec.

The one place that takes its messages apart: the path, and which field is unknown or missing, are nowhere else in its errors.
"""

import re
from typing import NamedTuple

from msgspec import ValidationError

_MESSAGE = re.compile(
    r"(?P<said>Object (?:contains|missing) (?P<kind>unknown|required) field `(?P<field>.*?)`|(?s:.*?))"
    r"(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?"
)


class FieldFault(NamedTuple):
    """path: of the field, as in `messages[0].role`; empty for the value as a whole. said: msgspec's words about it, or those of
    a check of the record's own. kind: "unknown" or "required", of a field that should not be there, or should; else None."""

    path: str
    said: str
    kind: str | None


def where(error: ValidationError) -> FieldFault:
    match = _MESSAGE.fullmatch(str(error))
    assert match is not None, "it matches any text"
    path = ".".join(name for name in (match["path"], match["field"]) if name)
    return FieldFault(path, match["said"], match["kind"])
