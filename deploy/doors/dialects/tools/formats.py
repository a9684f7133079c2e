"""What an output must look like: OpenAI's `response_format` and vLLM's `guided_` fields as one `Grammar`.

Pure functions over the fields of a request; imports the grammar's wire type, and llguidance through `workers.sampling.grammar`.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLTokenizer

from deploy.doors.dialects.tools.schemas import followed, target
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import GrammarError, check

MAX_GRAMMAR_BYTES = 128 << 10
"""A grammar travels to every rank of a group and is compiled there; this much takes about 0.1 s."""

MAX_NESTING = 256
"""llguidance follows definitions by recursion, on the stack of the thread that calls it: a chain of some 1,000 levels ends the
process (8 MiB of stack; a quarter of that with 2 MiB)."""

MAX_LARK_LEVELS = 500
"""The same for grammars in Lark, where a level costs less."""

MAX_NAMES = 4000
"""Names and literals in a Lark grammar. Where all rules are alternatives of each other, compiling them takes time with the
square of this: 0.6 s for so many, a minute for nine times as many, and nothing can interrupt it."""

MAX_REFERENCES = 2000
"""The same for the references in a JSON schema."""

MAX_MESSAGE_CHARACTERS = 600
"""The library's messages repeat the line of the grammar that they speak of."""

REFERENCE_KEYS = ("$ref", "$dynamicRef", "$recursiveRef")

NAME = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\\n]|\\.)*/|\w+')

ANY_OBJECT: dict[str, Any] = {"type": "object"}


def grammar_of(
    response_format: Mapping[str, Any] | None = None,
    guided_regex: str | None = None,
    guided_choice: Sequence[str] | None = None,
    guided_json: str | Mapping[str, Any] | None = None,
    guided_grammar: str | None = None,
    structured_outputs: Mapping[str, Any] | None = None,
    warnings: Warnings | None = None,
) -> Grammar | None:
    """The grammar that a request asks for; None where any text will do. guided_grammar: in llguidance's Lark.
    structured_outputs: one of the same four, or any object. warnings: are told what of a schema is not enforced; without them,
    as with its own `strict`, all of it must be.

    Errors: RequestError, INVALID or TOO_LARGE, with the field's name.
    """
    guides = {
        "guided_regex": guided_regex, "guided_choice": guided_choice, "guided_json": guided_json,
        "guided_grammar": guided_grammar,
        **{f"structured_outputs.{name}": value for name, value in (structured_outputs or {}).items()},
    }  # fmt: skip
    asked = {"response_format": _response_grammar(response_format, warnings)}
    asked |= {name: _guided(name, value, warnings) for name, value in guides.items() if value is not None}
    given = {name: grammar for name, grammar in asked.items() if grammar is not None}
    if structured_outputs is not None and not any(name in given for name in guides if "." in name):
        said = "structured_outputs asks for nothing: give one of json, regex, choice, grammar, json_object"
        raise RequestError.invalid(said, "structured_outputs")
    if len(given) > 1:
        raise RequestError.invalid(f"{' and '.join(given)} exclude each other: give one of them", [*given][1])
    for name, grammar in given.items():
        check_size(grammar, name)
        return grammar
    return None


def validate(grammar: Grammar, tokenizer: LLTokenizer, param: str | None = None) -> tuple[str, ...]:
    """Compiles the grammar against the checkpoint's vocabulary, so that no worker meets one that it cannot follow. Returns what
    of a lenient schema it does not hold an output to.

    Milliseconds; up to 0.2 s for a large schema: call it in a thread. Errors: RequestError UNPROCESSABLE.
    """
    try:
        return check(grammar, tokenizer)
    except GrammarError as error:
        message = textwrap.shorten(str(error), MAX_MESSAGE_CHARACTERS, placeholder=" ...")
        raise RequestError(Fault.UNPROCESSABLE, message, param=param, code="invalid_grammar") from None


def schema_grammar(schema: str | Mapping[str, Any], param: str, warnings: Warnings | None = None) -> Grammar:
    """A JSON schema, as an object or as text. warnings: None where all of it must be enforced. Errors: RequestError INVALID."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError.invalid(f"{param} is not valid JSON: {error}", param) from None
    if not isinstance(schema, Mapping):
        raise RequestError.invalid(f"{param} must be a JSON schema, which is an object, not {type(schema).__name__}", param)
    check_nesting(schema, param)
    return Grammar("json_schema", json.dumps(followed_schema(schema, param, warnings), ensure_ascii=False))


def followed_schema(schema: Mapping[str, Any], param: str, warnings: Warnings | None) -> dict[str, Any]:
    """In words that the compiler follows. Its nesting must have been checked. warnings: as above."""
    if warnings is None:
        return followed(schema, lambda _: None, strict=True)
    return followed(schema, lambda what: warnings.add(unenforced(param, what)), strict=False)


def unenforced(param: str, what: str) -> str:
    """A warning. param: the field with the schema."""
    return f"{param}: not enforced: {what}"


def check_size(grammar: Grammar, param: str) -> None:
    """Errors: RequestError TOO_LARGE."""
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        message = f"{param} makes a grammar of {size} bytes, and {MAX_GRAMMAR_BYTES} are allowed: make it smaller"
        raise RequestError(Fault.TOO_LARGE, message, param=param)


def check_nesting(schema: Mapping[str, Any], param: str) -> None:
    """Bounds how deep a compiler that follows references can get. Errors: RequestError INVALID."""
    references = [*_references(schema)]
    if len(references) > MAX_REFERENCES:
        raise RequestError.invalid(
            f"{param} has {len(references)} references, and {MAX_REFERENCES} are allowed: make it smaller", param
        )
    levels = _levels(schema) + sum(_levels(target(schema, ref)) for ref in set(references))
    if levels > MAX_NESTING:
        raise RequestError.invalid(
            f"{param} nests {levels} levels, those of what its references point to included, and {MAX_NESTING} are allowed: "
            "flatten it",
            param,
        )


def _response_grammar(response_format: Mapping[str, Any] | None, warnings: Warnings | None) -> Grammar | None:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return schema_grammar(ANY_OBJECT, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": schema, **rest}}:
            return schema_grammar(schema, "response_format.json_schema.schema", None if rest.get("strict") else warnings)
        case {"type": "json_schema"}:
            raise RequestError.invalid(
                'response_format: json_schema needs the schema, as {"type": "json_schema", "json_schema": {"name": ..., '
                '"schema": ...}}',
                "response_format.json_schema",
            )
    raise RequestError.invalid(
        "response_format must be an object whose type is text, json_object or json_schema", "response_format"
    )


def _guided(name: str, value: Any, warnings: Warnings | None) -> Grammar | None:
    """name: the field's, whose last word says what it holds. Errors: RequestError."""
    match re.split("[_.]", name)[-1]:
        case "regex":
            return Grammar("regex", value)
        case "choice":
            return _choice_grammar(value, name)
        case "json":
            return schema_grammar(value, name, warnings)
        case "grammar":
            return _lark_grammar(value, name)
    return schema_grammar(ANY_OBJECT, name) if value else None  # json_object


def _choice_grammar(choices: Sequence[str], param: str) -> Grammar:
    """One of a few texts, as a regular expression: no text can break out of an escaped one."""
    if not choices or not all(choices):
        raise RequestError.invalid(f"{param} must be a list of texts that are not empty", param)
    return Grammar("regex", "|".join(map(re.escape, choices)))


def _lark_grammar(text: str, param: str) -> Grammar:
    """A level of a Lark grammar takes a line, a bracket or an operator at least."""
    names = sum(1 for _ in NAME.finditer(text))
    if names > MAX_NAMES:
        raise RequestError.invalid(
            f"{param} has {names} names and literals, and {MAX_NAMES} are allowed: make it smaller", param
        )
    levels = text.count("\n") + sum(map(text.count, "([{"))
    if levels > MAX_LARK_LEVELS:
        raise RequestError.invalid(
            f"{param} has {levels} lines and brackets, and {MAX_LARK_LEVELS} are allowed: make it smaller", param
        )
    return Grammar("lark", text)


def _levels(value: Any) -> int:
    """Objects and arrays inside one another."""
    levels, layer = 0, [value]
    while layer := [part for part in layer if isinstance(part, Mapping | list)]:
        levels += 1
        layer = [inner for part in layer for inner in (part.values() if isinstance(part, Mapping) else part)]
    return levels


def _references(schema: Any) -> Iterator[str]:
    """Every reference in a schema, to wherever it points."""
    layer = [schema]
    while layer:
        part = layer.pop()
        if isinstance(part, Mapping):
            yield from (ref for key in REFERENCE_KEYS if isinstance(ref := part.get(key), str))
            layer += part.values()
        elif isinstance(part, list):
            layer += part
