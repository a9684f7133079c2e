"""What users hand over in Python and in files, of whatever type, read once into what `PromptParser` takes.

The doors of the network have schemas of their own. Imports the types of prompts.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

import msgspec

from deploy.config.load import SAMPLING_KEYS, ConfigError, reject_unknown, sampling_params
from deploy.text.files import refuse_halves
from deploy.text.prompts import LEAST_URGENT, MOST_URGENT, USUAL_TERMS, Content, Conversation, PromptError, Terms
from deploy.text.tokenizer import Message
from scheduler.protocol.sampling import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
CHAT_KEYS = ("tools", "chat_template_kwargs")
TERM_KEYS = ("cache_salt", "tenant", "priority", "deadline_s")
SOURCE_KEYS = (*PROMPT_KEYS, *CHAT_KEYS, *TERM_KEYS)
LINE_KEYS = (*SOURCE_KEYS, *SAMPLING_KEYS)

Source = str | Sequence[int] | Mapping[str, Any]
"""A prompt as given: text, token ids, or {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}, the mappings
with an optional "cache_salt" that keeps this prompt's KV from being shared with prompts of another salt, and a "tenant", a
"deadline_s" and a "priority" of its own, which go before those of the call; None means the same as leaving them out. Beside
messages may stand "tools", functions in OpenAI's form, and "chat_template_kwargs", what else the chat template can be told."""

_ITS_OWN = 'one is for all prompts of a call, and in {"prompt": ...} a prompt has its own'


def read_source(source: Source, call: Terms = USUAL_TERMS) -> tuple[Content, Terms]:
    """call: the terms of the call. Errors: PromptError."""
    if isinstance(source, bytes | bytearray):
        raise PromptError(f"a prompt is text or token ids, not {type(source).__name__}: decode it first")
    if not isinstance(source, Mapping):
        return source if isinstance(source, str) else _ids(source), call
    try:
        reject_unknown(source, SOURCE_KEYS)
    except ConfigError as error:
        raise PromptError(str(error)) from None
    kinds = [key for key in PROMPT_KEYS if key in source]
    if len(kinds) != 1:
        raise PromptError(f"give exactly one of {', '.join(PROMPT_KEYS)}; found {' and '.join(kinds) or 'none'}")
    terms = read_terms(source, call)
    match kinds[0], source[kinds[0]]:
        case "messages", messages:
            return read_conversation(messages, source.get("tools"), source.get("chat_template_kwargs")), terms
        case "prompt", str(text):
            return text, terms
        case "prompt", other:
            raise PromptError(f"prompt must be a string, not {type(other).__name__}: ids go into prompt_token_ids")
        case _, ids:
            return _ids(ids), terms


def read_conversation(messages: Any, tools: Any = None, template_kwargs: Any = None) -> Conversation:
    """Errors: PromptError."""
    if not isinstance(tools, list | None) or not isinstance(template_kwargs, Mapping | None):
        raise PromptError("tools must be a list of functions, and chat_template_kwargs an object")
    entries = messages if isinstance(messages, list | tuple) else ()
    return Conversation([_message(entry) for entry in entries], tools, template_kwargs)


def read_terms(given: Mapping[str, Any], call: Terms = USUAL_TERMS) -> Terms:
    """What is given of `TERM_KEYS`, and the call's where it is not. Errors: PromptError."""
    salt, tenant, priority, deadline_s = map(given.get, TERM_KEYS)
    return Terms(
        call.salt if salt is None else _text("cache_salt", salt),
        call.tenant if tenant is None else _text("tenant", tenant, f": {_ITS_OWN}"),
        call.priority if priority is None else _priority(priority),
        call.deadline_s if deadline_s is None else _deadline(deadline_s),
    )


def read_params(params: SamplingParams) -> SamplingParams:
    """Sampling parameters that were made by hand, hence with values of any type. Errors: PromptError."""
    try:
        valid = sampling_params(msgspec.structs.asdict(params))
    except ConfigError as error:
        raise PromptError(f"sampling parameters: {error}") from error
    for text in valid.stop:
        _refuse_halves("stop", text)
    return valid


def read_jsonl(lines: Iterable[str], name: str, defaults: SamplingParams) -> Iterator[tuple[Source, SamplingParams]]:
    """Prompts from JSON lines: one of the prompt keys, what else a `Source` may hold, and any sampling fields, which
    override the defaults for that line.

    Blank lines are skipped. name: of the file, for messages. Errors: PromptError that names the line and what is wrong.
    """
    base = msgspec.structs.asdict(defaults)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise PromptError(f'expected an object such as {{"prompt": "..."}}, found {type(entry).__name__}')
            reject_unknown(entry, LINE_KEYS)
            fields = {key: entry.pop(key) for key in SAMPLING_KEYS if key in entry}
            yield entry, sampling_params(base | fields) if fields else defaults
        except json.JSONDecodeError as error:
            raise PromptError(f"{name}, line {number}: not valid JSON: {error.msg} at column {error.colno}") from error
        except ValueError as error:
            raise PromptError(f"{name}, line {number}: {error}") from error


def as_chat(source: Source) -> Source:
    """A text prompt as a user's message; conversations as they are. Errors: PromptError."""
    given: Mapping[str, Any] = source if isinstance(source, Mapping) else {"prompt": source}
    if isinstance(text := given.get("prompt"), str):
        rest = {key: value for key, value in given.items() if key != "prompt"}
        return rest | {"messages": [{"role": "user", "content": text}]}
    if "messages" in given:
        return given
    raise PromptError("token ids cannot be put through a chat template: give text or messages")


def as_token_ids(source: Source) -> Source:
    """Token ids written as text, apart by spaces or commas. Errors: PromptError."""
    if not isinstance(source, str):
        return source
    try:
        return [int(piece) for piece in source.replace(",", " ").split()]
    except ValueError as error:
        raise PromptError(f"not token ids: {source[:60]!r}; write integers apart by spaces or commas") from error


def arguments_shown(arguments: str) -> Any:
    """A call's arguments as templates want them: an object, which they print themselves. What a model wrote need not be JSON:
    it is shown as it is."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _ids(given: Sequence[Any]) -> list[int]:
    try:
        if bool in set(map(type, given)):
            raise TypeError("a truth value is no token id")
        return [index(token) for token in given]
    except TypeError as error:
        raise PromptError("prompt_token_ids must be a list of integers") from error


def _message(given: Any) -> Message:
    """As templates read it. Clients send content and arguments as OpenAI has them."""
    calls = given.get("tool_calls") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or not (calls or "content" in given):
        raise PromptError(f'not a chat message: {given!r}; write {{"role": "user", "content": "..."}}')
    shown = {**given, "content": given.get("content") or ""}
    return shown | {"tool_calls": [_call(call) for call in calls]} if calls else shown


def _call(given: Any) -> dict[str, Any]:
    match given:
        case {"function": {"name": str(), "arguments": arguments} as function}:
            shown = arguments_shown(arguments) if isinstance(arguments, str) else arguments
            return {**given, "function": {**function, "arguments": shown}}
    raise PromptError(f'not a tool call: {given!r}; write {{"function": {{"name": ..., "arguments": "..."}}}}')


def _text(name: str, value: Any, hint: str = "") -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} must be a string, not {type(value).__name__}{hint}")
    return _refuse_halves(name, value)


def _refuse_halves(name: str, text: str) -> str:
    try:
        refuse_halves(text)
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from None
    return text


def _deadline(value: Any) -> float:
    """Seconds; below 0 has passed already."""
    with contextlib.suppress(TypeError, OverflowError):
        if not isinstance(value, bool | str) and not math.isnan(seconds := float(value)):
            return seconds
    raise PromptError(f"deadline_s must be a number of seconds, not {repr(value)[:60]}: {_ITS_OWN}")


def _priority(value: Any) -> int:
    """Lower goes first."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and LEAST_URGENT >= index(value) >= MOST_URGENT:
            return index(value)
    raise PromptError(f"priority must be a whole number of 32 bits, not {repr(value)[:60]}: {_ITS_OWN}")
