"""Fields of requests that this server does not know: of another one, of a later day, or misspelt.

Imports msgspec, the search for names that were meant, and the door's errors; no HTTP.
"""

from functools import cache
from typing import Any

import msgspec

from deploy.config.faults import FieldFault, meant
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError

SHOWN_CHARACTERS = 80
MOST_UNKNOWN = 64
"""Names of one request, each of which is compared with all that are known."""

UNKNOWN = "unknown_parameter"


def without_unknown(value: Any, kind: type[msgspec.Struct], warnings: Warnings) -> Any:
    """The same JSON, as it was decoded, without the fields that this kind of record does not have, nor those in it; `warnings`
    are told of each that was not null. Errors: RequestError for a name that is like one that is known, and for too many."""
    _Sieve(warnings).clean(value, kind, "", "")
    return value


def shortened(name: str) -> str:
    """What a client made up, short enough to be looked at and told again."""
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}..."


class _Sieve:
    """Of one request."""

    def __init__(self, warnings: Warnings) -> None:
        self._warnings = warnings
        self._unknown: set[tuple[type[msgspec.Struct], str]] = set()

    def clean(self, value: Any, kind: type[msgspec.Struct], path: str, place: str) -> None:
        """path: of the value, as in `messages[0].`; place: without the numbers. Errors: RequestError."""
        if not isinstance(value, dict):
            return
        known = _fields(kind)
        for name in [*value]:
            if name not in known:
                self._check(name, kind, path)
                if value.pop(name) is not None:
                    self._warnings.add(f"the field {place}{shortened(name)} is not known here, and ignored")
            elif (inner := known[name]) is not None:
                part = value[name]
                if isinstance(part, list):
                    for at, item in enumerate(part):
                        self.clean(item, inner, f"{path}{name}[{at}].", f"{place}{name}[].")
                else:
                    self.clean(part, inner, f"{path}{name}.", f"{place}{name}.")

    def _check(self, name: str, kind: type[msgspec.Struct], path: str) -> None:
        """Errors: RequestError."""
        if (kind, name) in self._unknown:
            return
        self._unknown.add((kind, name))
        if len(self._unknown) > MOST_UNKNOWN:
            said = f"there are more than {MOST_UNKNOWN} unknown fields: leave them out"
            raise RequestError(Fault.INVALID, said, code=UNKNOWN)
        known = _fields(kind)
        if meant(shortened(name), known) is not None:
            fault = FieldFault(shortened(name), "", "unknown")
            where = f"{path}{fault.path}"
            raise RequestError(Fault.INVALID, fault.words(known), param=where, code=UNKNOWN)


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """By name; with the record that each holds, or holds a list of, if one that has no unknown fields."""
    return {field.name: _record_in(msgspec.inspect.type_info(field.type)) for field in msgspec.structs.fields(kind)}


def _record_in(info: msgspec.inspect.Type) -> type[msgspec.Struct] | None:
    match info:
        case msgspec.inspect.StructType(cls=cls, forbid_unknown_fields=True):
            return cls
        case msgspec.inspect.ListType(item_type=item):
            return _record_in(item)
        case msgspec.inspect.UnionType(types=types):
            return next((found for each in types if (found := _record_in(each)) is not None), None)
        case msgspec.inspect.Metadata(type=inner):
            return _record_in(inner)
    return None
