"""Request and response records in the OpenAPI document. Imports msgspec and the records only."""

from typing import Any

import msgspec

from deploy.doors.openai.errors import ErrorBody

REFERENCE = "#/components/schemas/{name}"

ERRORS = {
    400: "A field is wrong, or misspelt; `param` names it.",
    401: "No API key, or an unknown one.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not called JSON.",
    422: "A grammar or a schema that cannot be compiled.",
    429: "The queue is full; `Retry-After` says when to come again.",
    503: "No group is up; `Retry-After` says when to come again.",
    504: "The request did not end before its deadline.",
}


def body_of(request: type[msgspec.Struct]) -> dict[str, Any]:
    """A route's `openapi_extra` for a JSON body."""
    return {"requestBody": {"required": True, "content": _json(request)}}


def answers(
    response: type[msgspec.Struct], streamed: bool = False, error: type[msgspec.Struct] = ErrorBody
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`. streamed: also as server-sent events. error: the body of what is no success."""
    content = _json(response) | ({"text/event-stream": {}} if streamed else {})
    success: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", "content": content}}
    return success | {status: {"description": words, "content": _json(error)} for status, words in ERRORS.items()}


def add_schemas(document: dict[str, Any], *records: type[msgspec.Struct], strict: bool) -> None:
    """Puts the records, and what they are made of, where the references point. strict: fields not known here are refused."""
    _, schemas = msgspec.json.schema_components((*records, ErrorBody), ref_template=REFERENCE)
    for schema in schemas.values() if not strict else ():
        if schema.get("additionalProperties") is False:
            del schema["additionalProperties"]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)


def _json(record: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=record.__name__)}}}
