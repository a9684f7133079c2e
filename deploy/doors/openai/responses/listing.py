"""The items that a response was made from, as they are kept and as clients list them. Imports the schemas and the records."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from deploy.doors.openai.requests.unknown import shortened
from deploy.doors.openai.responses.asking.conversing import type_of
from deploy.doors.openai.responses.asking.schemas import Item
from deploy.doors.openai.responses.store.storing import StoredTurn
from deploy.doors.openai.responses.telling.records import ItemList
from deploy.frontend.errors import RequestError

PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
MOST_LISTED = 100

Order = Literal["asc", "desc"]


def input_of(items: Sequence[Item]) -> bytes:
    """A turn's input, in JSON: every item has an id and a type, so that it can be named."""
    return msgspec.json.encode(
        [
            msgspec.structs.replace(item, type=(kind := type_of(item)), id=item.id or f"{PREFIXES[kind]}_{uuid.uuid4().hex}")
            for item in items
        ]
    )


def conversation(turns: Sequence[StoredTurn]) -> list[Item]:
    """In order."""
    return [item for turn in turns for part in (turn.input, turn.output) for item in _items.decode(part)]


def listed(turns: Sequence[StoredTurn]) -> list[dict[str, Any]]:
    """What the last turn's response was made from: all before its output."""
    parts = [part for turn in turns for part in (turn.input, turn.output)][:-1]
    return [_listed(item) for part in parts for item in msgspec.json.decode(part)]


def page(items: list[dict[str, Any]], after: str | None, limit: int, order: Order) -> ItemList:
    """Errors: RequestError for an `after` that is not among them."""
    if order == "desc":
        items = items[::-1]
    if after is not None:
        place = next((at for at, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise RequestError.invalid(f"there is no item {shortened(after)!r} among these", "after")
        items = items[place + 1 :]
    shown = items[:limit]
    ends = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
    return ItemList(data=shown, first_id=ends[0], last_id=ends[1], has_more=len(items) > limit)


def _listed(item: dict[str, Any]) -> dict[str, Any]:
    """With the fields that OpenAI's types want of items, which a request may leave out."""
    shown = {"status": "completed", **item}
    match item["type"]:
        case "message":
            spoken = item.get("role") == "assistant"
            kind = "output_text" if spoken else "input_text"
            content = item["content"]
            parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
            shown["content"] = [{"annotations": [], **part} if part["type"] == "output_text" else part for part in parts]
        case "function_call":
            shown.setdefault("arguments", "{}")
        case "reasoning":
            shown.setdefault("summary", [])
    return shown


_items = msgspec.json.Decoder(list[Item])
