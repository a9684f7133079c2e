"""What msgspec finds wrong with a value, and where in it; and which name was meant by one that nothing has. Imports msgspec.

The one place that takes its messages apart: the path, and which field is unknown or missing, are nowhere else in its errors.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from msgspec import ValidationError, inspect

OTHER_NAMES = {
    "page_size": "block_size",
    "host_pages": "host_kv_memory",
    "swap_space": "host_kv_memory",
    "gpu_memory_utilization": "gpu_memory_fraction",
    "data_parallel_size": "groups",
    "max_seq_len": "max_model_len",
    "max_new_tokens": "max_tokens",
    "input_ids": "prompt_token_ids",
    "user": "tenant",
}
"""What settings and fields are called elsewhere, or were here."""

OF_OTHER_DOORS = {
    "max_tokens": ("max_output_tokens", "max_completion_tokens"),
    "max_completion_tokens": ("max_tokens", "max_output_tokens"),
    "max_output_tokens": ("max_tokens",),
    "response_format": ("text", "output_config"),
    "stop": ("stop_sequences",),
    "stop_sequences": ("stop",),
    "messages": ("input", "prompt"),
    "seed": (),
}
"""What the same field is called by one of the APIs that are spoken here, and by the others. One that is left out in silence
would be missed: an output without a bound, or without a form. It is no misspelling of anything."""

ALIKE, SLIP, SHORT_SLIP, SHORT = 0.75, 0.8, 0.6, 4
"""How alike two names must be, 0 to 1, for the one to be a misspelling of the other; and each word of it and one of the other,
those of up to so many letters less. Names that share most of their letters may mean different things: `load_format` and
`log_format`, `pipeline_parallel_size` and `tensor_parallel_size`."""

_NAME = re.compile(r"[^.\[\]]+")
_JOINT = re.compile(r"[^a-z0-9]+")
_MESSAGE = re.compile(
    r"(?P<said>Object (?:contains|missing) (?P<kind>unknown|required) field `(?P<field>(?s:.*?))`|(?s:.*?))"
    r"(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?"
)


class FieldFault(NamedTuple):
    """path: of the field, as in `messages[0].role`; empty for the value as a whole. said: msgspec's words about it, or those of
    a check of the record's own. kind: "unknown" or "required", of a field that should not be there, or should; else None."""

    path: str
    said: str
    kind: str | None

    def words(self, known: Collection[str]) -> str:
        """What to tell whoever sent the value. known: names of its fields, one of which may have been meant."""
        match self.kind:
            case "unknown":
                near = meant(self.path, known)
                return f"unknown field {self.path!r}: {f'did you mean {near!r}?' if near else 'leave it out'}"
            case "required":
                return f"{self.path} is missing"
            case _:
                return f"{self.path or 'the body'}: {self.said[:1].lower()}{self.said[1:]}".replace("`", "")

    def with_choices(self, kind: type) -> "FieldFault":
        """Of a record of this kind: where the field has a few values alone, they are told."""
        if not self.said.startswith("Invalid enum value"):
            return self
        choices = _choices(inspect.type_info(kind), _NAME.findall(self.path))
        return self._replace(said=f"{self.said}: use one of {', '.join(choices)}")


def where(error: ValidationError) -> FieldFault:
    match = _MESSAGE.fullmatch(str(error))
    assert match is not None, "it matches any text"
    path = ".".join(name for name in (match["path"], match["field"]) if name)
    return FieldFault(path, match["said"], match["kind"])


def meant(name: str, known: Collection[str]) -> str | None:
    """Which of the names was meant by one that is not among them; None if none is like it."""
    for other in (OTHER_NAMES.get(name), *OF_OTHER_DOORS.get(name, ())):
        if other in known:
            return other
    if name in OF_OTHER_DOORS:
        return None
    close = difflib.get_close_matches(name, known, n=len(known) or 1, cutoff=ALIKE)
    return next((other for other in close if _is_slip(name, other)), None)


def _choices(info: inspect.Type, path: list[str]) -> Iterator[str]:
    """path: names of fields and indices of lists."""
    match info:
        case inspect.Metadata(type=inner):
            yield from _choices(inner, path)
        case inspect.UnionType(types=types):
            for each in types:
                yield from _choices(each, path)
        case inspect.LiteralType(values=values) if not path:
            yield from (repr(value) for value in values)
        case inspect.ListType(item_type=item) if path:
            yield from _choices(item, path[1:])
        case inspect.StructType(fields=fields) if path:
            for field in fields:
                if field.encode_name == path[0]:
                    yield from _choices(field.type, path[1:])


def _is_slip(name: str, other: str) -> bool:
    """Each word of the name stands in the other too, in this order, but for slips in its letters; or only joints differ."""
    given, wanted = (_JOINT.split(each.lower()) for each in (name, other))
    rest = iter(wanted)
    return "".join(given) == "".join(wanted) or all(any(_alike(word, each) for each in rest) for word in given)


def _alike(word: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, word, other).ratio() >= (SHORT_SLIP if len(word) <= SHORT else SLIP)
