"""The functions that a request offers to the model, how its checkpoint writes calls of them, and the grammar of such calls.

    read_tools ──▶ Tools ──specs──▶ the chat template
                         ──grammar──▶ SamplingParams, where a call is asked for
                         ──parser──▶ one `ToolCallParser` for each choice

Pure functions over the fields of a request; imports neither HTTP nor the engine.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.doors.openai.tools.formats import check_nesting, check_size, followed_schema
from deploy.doors.openai.tools.tool_calls import HERMES, LLAMA, ToolCallParser, ToolFormat
from deploy.doors.openai.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import WHITE_SPACE

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

TOOL_FORMATS = {form.name: form for form in (HERMES, LLAMA)}

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

AS_TRAINED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""How models are shown calls: as Python's json module prints them."""


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """How one checkpoint writes calls. marked_by_tokens: `begin` and `end` are single tokens of its vocabulary, which a grammar
    must name as such."""

    form: ToolFormat
    marked_by_tokens: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, name: str | None = None) -> "ToolDialect | None":
        """Told by what the chat template shows the model; name: a key of `TOOL_FORMATS`, where that is known better. None: the
        checkpoint does not call tools, or in no format that is read here."""
        if tokenizer is None:
            return None
        form = _form_shown(tokenizer.chat_template) if name is None else TOOL_FORMATS[name]
        if form is None:
            return None
        marks = [mark for mark in (form.begin, form.end) if mark.startswith("<")]
        return cls(form, bool(marks) and all(map(tokenizer.has_token, marks)))


@dataclass(frozen=True, slots=True)
class Tools:
    """What one request offers. specs: as the client wrote them. schemas: of each function's arguments, by its name. strict: the
    functions whose schemas must be enforced as a whole, where they are at all.

    forced: one of these must be called; empty where the model decides. parallel: it may make several calls at once.
    """

    dialect: ToolDialect
    specs: Sequence[Mapping[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    strict: frozenset[str]
    forced: tuple[str, ...]
    parallel: bool

    def parser(self, new_id: Callable[[], str]) -> ToolCallParser:
        """For the output of one choice."""
        return ToolCallParser(self.dialect.form, self.schemas.keys(), new_id, parallel=self.parallel)

    def grammar(self, answer: Grammar | None, warnings: Warnings) -> Grammar | None:
        """What the output must match: calls, where one is forced; else calls or the answer, where that has a form of its own;
        else None: the model decides freely, and `strict` binds nobody. warnings: are told what is not enforced. Errors:
        RequestError, INVALID or TOO_LARGE."""
        if answer is not None and answer.kind != "json_schema":
            raise RequestError.invalid("a guided output leaves no room for calls: give tools or guide the output", "tools")
        if self.forced:
            grammar = Grammar("lark", f"start: calls\n{self._call_rules(warnings)}")
        elif answer is None:
            return None
        elif not self.dialect.form.begin:
            raise RequestError.invalid(
                f"in the {self.dialect.form.name} format a call cannot be told from an answer in JSON: leave response_format "
                "out, or set tool_choice to required or none",
                "response_format",
            )
        else:
            schema = _guided(json.loads(answer.text), {"whitespace_pattern": WHITE_SPACE})
            grammar = Grammar("lark", f"start: calls | answer\nanswer: %json {schema}\n{self._call_rules(warnings)}")
        check_size(grammar, "tools")
        return grammar

    def _call_rules(self, warnings: Warnings) -> str:
        """Each function's arguments are a schema of their own, so that references in it stay true."""
        form = self.dialect.form
        begin, end = self._mark(form.begin), self._mark(form.end) if form.begin else ""
        gap = json.dumps("\n") if form.begin else ""
        names = self.forced or tuple(self.schemas)
        more = f" ({json.dumps(form.join)} call)*" if self.parallel else ""
        lines = [
            f"calls: call{more}",
            f"call: {begin} {gap} ({' | '.join(f'call_{at}' for at in range(len(names)))}) {gap} {end}",
        ]
        for at, name in enumerate(names):
            head = json.dumps(f'{{"name": "{name}", "{form.arguments}": ')
            lines += [f'call_{at}: {head} arguments_{at} "}}"', f"arguments_{at}: %json {self._schema(name, warnings)}"]
        return "\n".join(lines)

    def _schema(self, name: str, warnings: Warnings) -> str:
        schema = followed_schema(self.schemas[name], f"tools: {name}", None if name in self.strict else warnings)
        return _guided({"type": "object", **schema}, AS_TRAINED)

    def _mark(self, text: str) -> str:
        return text if self.dialect.marked_by_tokens else json.dumps(text)


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
            "the chat template of this checkpoint shows no format of tool calls that is known here "
            f"({', '.join(TOOL_FORMATS)}): leave tools out, or name its format to the server (tool_format)",
            "tools",
        )
    return Tools(dialect, tools, schemas, frozenset(strict), forced, parallel_tool_calls is not False)


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


def _guided(schema: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    """JSON of the schema, and how what it allows is written, where the schema itself does not say."""
    return json.dumps({**schema, "x-guidance": {**how, **schema.get("x-guidance", {})}})


def _form_shown(template: str) -> ToolFormat | None:
    """Hermes and Qwen show their marks with JSON between them, Llama 3 a bare object with a name and parameters. The newer Qwen
    coders put XML between the same marks."""
    if HERMES.begin in template:
        return None if "<function=" in template else HERMES
    return LLAMA if '"name": ' in template and '"parameters": ' in template else None
