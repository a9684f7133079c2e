"""The functions that a request offers to the model, how its checkpoint writes calls of them, and the grammar of such calls.

    read_tools ──▶ Tools ──specs──▶ the chat template
                         ──grammar──▶ SamplingParams, where a call is asked for
                         ──parser──▶ one `ToolCallParser` for each choice, unless calls are left in the text

Pure functions over the fields of a request; imports neither HTTP nor the engine.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from deploy.doors.dialects.tools.families.format import CallGrammar, ToolFormat
from deploy.doors.dialects.tools.families.known import TOOL_FORMATS, format_shown
from deploy.doors.dialects.tools.formats import check_nesting, check_size, followed_schema, unenforced
from deploy.doors.dialects.tools.schemas import guided
from deploy.doors.dialects.tools.tool_calls import ToolCallParser
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import WHITE_SPACE

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

AUTO, NONE = "auto", "none"
"""Parsers beside the names of `TOOL_FORMATS`: the one of the format that the chat template shows, and none at all."""

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

AS_TRAINED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""How models are shown calls: as Python's json module prints them."""


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """How one checkpoint writes calls. form: None where they are left in the text. tokens: marks of the format that are single
    tokens of its vocabulary, by their ids."""

    form: ToolFormat | None
    tokens: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, parser: str = AUTO) -> "ToolDialect | None":
        """parser: a key of `TOOL_FORMATS`, AUTO or NONE. None: the checkpoint does not call tools, or in no format that is read
        here."""
        if parser == NONE:
            return cls(None)
        if tokenizer is None:
            return None
        form = format_shown(tokenizer.chat_template) if parser == AUTO else TOOL_FORMATS[parser]
        if form is None:
            return None
        return cls(form, {mark: id for mark in form.marks if (id := tokenizer.token_id(mark)) is not None})


@dataclass(frozen=True, slots=True)
class Tools:
    """What one request offers. specs: as the client wrote them. schemas: of each function's arguments, by its name. strict: the
    functions whose schemas must be enforced as a whole, where they are at all.

    forced: one of these must be called; empty where the model decides. parallel: it may make several calls at once, but not
    where one function is named.
    """

    dialect: ToolDialect
    specs: Sequence[Mapping[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    strict: frozenset[str]
    forced: tuple[str, ...]
    parallel: bool

    def parser(self, new_id: Callable[[], str]) -> ToolCallParser | None:
        """For the output of one choice. None: its calls are left in the text."""
        form = self.dialect.form
        return None if form is None else ToolCallParser(form, self.schemas, new_id, parallel=self.parallel)

    def grammar(self, answer: Grammar | None, warnings: Warnings) -> Grammar | None:
        """What the output must match: calls, where one is forced; else calls or the answer, where that has a form of its own;
        else None: the model decides freely, and `strict` binds nobody. warnings: are told what is not enforced. Errors:
        RequestError, INVALID or TOO_LARGE."""
        form = self.dialect.form
        if answer is not None and answer.kind != "json_schema":
            raise RequestError.invalid("a guided output leaves no room for calls: give tools or guide the output", "tools")
        if form is None or (answer is None and not self.forced):
            return answer
        names = self.forced or tuple(self.schemas)
        schemas = {name: self._schema(name, warnings) for name in names}
        check_size(Grammar("json_schema", json.dumps(schemas)), "tools")  # rules may repeat parts of them
        told = partial(self._unenforced, warnings=warnings)
        calls = form.rules(CallGrammar(schemas, told, self.dialect.tokens, parallel=self.parallel))
        if self.forced or answer is None:
            grammar = Grammar("lark", f"start: calls\n{calls}")
        elif not form.begins:
            raise RequestError.invalid(
                f"in the {form.name} format a call cannot be told from an answer in JSON: leave response_format out, or set "
                "tool_choice to required or none",
                "response_format",
            )
        else:
            schema = json.dumps(guided(json.loads(answer.text), {"whitespace_pattern": WHITE_SPACE}))
            grammar = Grammar("lark", f"start: calls | answer\nanswer: %json {schema}\n{calls}")
        check_size(grammar, "tools")
        return grammar

    def _schema(self, name: str, warnings: Warnings) -> Mapping[str, Any]:
        schema = followed_schema(self.schemas[name], f"tools: {name}", None if name in self.strict else warnings)
        return guided({"type": "object", **schema}, AS_TRAINED)

    def _unenforced(self, name: str, what: str, warnings: Warnings) -> None:
        """Errors: RequestError, if all of the function's schema must be enforced."""
        said = unenforced(f"tools: {name}", what)
        if name in self.strict:
            raise RequestError(Fault.UNPROCESSABLE, f"{said}, and it is strict", param="tools", code="invalid_grammar")
        warnings.add(said)


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None, parallel_tool_calls: bool | None,
    dialect: ToolDialect | None,
) -> Tools | None:  # fmt: skip
    """Errors: RequestError INVALID with the path of the field. None: the model is to know of no tools."""
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise RequestError.invalid("tool_choice asks for a call, and no tools are given: add them", "tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise RequestError.invalid(f"tools must be a list of at most {MAX_TOOLS} functions", "tools")
    schemas: dict[str, Mapping[str, Any]] = {}
    strict = set()
    for position, tool in enumerate(tools):
        name, schema = _read_function(tool, f"tools[{position}]")
        if name in schemas:
            raise RequestError.invalid(f"tools[{position}]: there is a function {name!r} already: rename one", "tools")
        schemas[name] = schema
        if tool["function"].get("strict"):
            strict.add(name)
    forced = _read_choice(tool_choice, tuple(schemas))
    if tool_choice == "none":
        return None
    if dialect is None:
        raise RequestError.invalid(
            "the chat template of this checkpoint shows no format of tool calls that is known here. Leave tools out, or start "
            f"the server with --tool-parser and what the model writes ({', '.join(TOOL_FORMATS)}, or none to have calls left "
            "in the text), or with --chat-template and a template that shows tools",
            "tools",
        )
    if forced and dialect.form is None:
        raise RequestError.invalid(
            "this server leaves calls in the text (--tool-parser none), so none can be asked for: set tool_choice to auto",
            "tool_choice",
        )
    parallel = parallel_tool_calls is not False and not isinstance(tool_choice, Mapping)
    return Tools(dialect, tools, schemas, frozenset(strict), forced, parallel)


def _read_function(tool: Mapping[str, Any], path: str) -> tuple[str, Mapping[str, Any]]:
    """A function's name and the schema of its arguments."""
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}}:
            pass
        case _:
            raise RequestError.invalid(
                f'{path} is not a function: write {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}', path
            )
    if not NAME.fullmatch(name):
        raise RequestError.invalid(
            f"{path}: {name[:80]!r} is no name of a function: use 1 to 64 letters, digits, _ or -", f"{path}.function.name"
        )
    schema = rest.get("parameters")
    where = f"{path}.function.parameters"
    if schema is None:
        return name, NO_PARAMETERS
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError.invalid(f"{where} must be a JSON schema of type object", where)
    check_nesting(schema, where)
    return name, schema


def _read_choice(choice: str | Mapping[str, Any] | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """The functions of which one must be called."""
    match choice:
        case None | "none" | "auto":
            return ()
        case "required":
            return names
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise RequestError.invalid(f"tool_choice asks for {name[:80]!r}, which is not among the tools", "tool_choice")
            return (name,)
    raise RequestError.invalid(
        'tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}', "tool_choice"
    )
