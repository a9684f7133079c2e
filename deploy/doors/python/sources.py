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

from deploy.config.faults import where
from deploy.config.load import SAMPLING_KEYS, ConfigError, reject_unknown, sampling_params
from deploy.text.content import Content, Conversation, Message, PromptError, for_template
from deploy.text.files import surrogate, writable
from deploy.text.prompts import LEAST_URGENT, MOST_URGENT, USUAL_PARAMS, USUAL_TERMS, Prompt, Terms
from scheduler.protocol.sampling import SamplingParams

LABEL_CHARACTERS = 60
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
CHAT_KEYS = ("tools", "chat_template_kwargs")
TERM_KEYS = ("cache_salt", "tenant", "priority", "deadline_s")
SOURCE_KEYS = (*PROMPT_KEYS, *CHAT_KEYS, *TERM_KEYS, "lora", *SAMPLING_KEYS)

Source = str | Sequence[int] | Mapping[str, Any]
"""A prompt as given: text, token ids, or {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}, the mappings
with an optional "cache_salt" that keeps this prompt's KV from being shared with prompts of another salt, and a "tenant", a
"deadline_s", a "priority", a "lora" (an adapter's name) and sampling parameters of its own, which go before those of the call;
None means the same as leaving the first five out. Beside messages may stand "tools", functions in OpenAI's form, and
"chat_template_kwargs", what else the chat template can be told."""

_ITS_OWN = 'one is for all prompts of a call, and in {"prompt": ...} a prompt has its own'


def read_source(
    source: Source, params: SamplingParams = USUAL_PARAMS, call: Terms = USUAL_TERMS
) -> tuple[Content, SamplingParams, Terms]:
    """params, call: what holds for all prompts of the call. Errors: PromptError."""
    if isinstance(source, bytes | bytearray):
        raise PromptError(f"a prompt is text or token ids, not {type(source).__name__}: decode it first")
    if not isinstance(source, Mapping):
        return source if isinstance(source, str) else _ids(source), read_params(params), call
    try:
        reject_unknown(source, SOURCE_KEYS)
    except ConfigError as error:
        raise PromptError(str(error)) from None
    kinds = [key for key in PROMPT_KEYS if key in source]
    if len(kinds) != 1:
        raise PromptError(f"give exactly one of {', '.join(PROMPT_KEYS)}; found {' and '.join(kinds) or 'none'}")
    for key in CHAT_KEYS:
        if kinds != ["messages"] and source.get(key) is not None:
            raise PromptError(f"{key} goes with messages: leave it out, or give messages instead of {kinds[0]}")
    own = {key: source[key] for key in SAMPLING_KEYS if key in source}
    return _content(kinds[0], source), read_params(params, own), read_terms(source, call)


def read_pooled(source: Source, call: Terms) -> tuple[Content, Terms]:
    """A prompt without output. call: as in `read_source`. Errors: PromptError."""
    content, params, terms = read_source(source, call=call)
    if params != USUAL_PARAMS:
        raise PromptError("nothing is sampled here: leave sampling parameters out")
    return content, terms


def read_texts(name: str, given: str | Iterable[str]) -> str | list[str]:
    """A side of pairs. Errors: PromptError."""
    if isinstance(given, str):
        return given
    return [_text(name, text) for text in listed(given, f"{name} must be a text or a list of texts")]


def read_terms(given: Mapping[str, Any], call: Terms = USUAL_TERMS) -> Terms:
    """What is given of `TERM_KEYS`, and the call's where it is not. Errors: PromptError."""
    salt, tenant, priority, deadline_s = map(given.get, TERM_KEYS)
    return Terms(
        call.salt if salt is None else _text("cache_salt", salt),
        call.tenant if tenant is None else _text("tenant", tenant, f": {_ITS_OWN}"),
        call.priority if priority is None else _priority(priority),
        call.deadline_s if deadline_s is None else _deadline(deadline_s),
    )


def read_lora(source: Source, call: str | None) -> str | None:
    """The LoRA adapter that a prompt names, else the call's. Errors: PromptError."""
    own = source.get("lora") if isinstance(source, Mapping) else None
    name = call if own is None else own
    return None if name is None else _text("lora", name)


def read_params(params: SamplingParams, own: Mapping[str, Any] = {}) -> SamplingParams:
    """Sampling parameters that were made by hand, hence with values of any type. own: what goes before them. Errors:
    PromptError."""
    if not isinstance(params, SamplingParams):
        raise PromptError(f"sampling parameters must be SamplingParams(...), not {type(params).__name__}")
    try:
        valid = sampling_params({**msgspec.structs.asdict(params), **own})
    except ConfigError as error:
        raise PromptError(f"sampling parameters: {error}") from error
    for text in valid.stop:
        _refuse_halves("stop", text)
    return valid


def as_list(prompts: Source | Iterable[Source]) -> list[Source]:
    """One prompt or several: integers are one prompt. Errors: PromptError."""
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    given = listed(prompts, "prompts must be a text, token ids, a mapping, or a list of these")
    return [given] if given and not hasattr(given[0], "__len__") else given


def listed(given: Any, wanted: str) -> list[Any]:
    """Errors: PromptError for what is no list, nor anything like it."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise PromptError(f"{wanted}, not {type(given).__name__}")
    return list(given)


def all_or_none(parsed: Iterable[Prompt | PromptError], count: int) -> Iterator[Prompt]:
    """count: of all. Errors: PromptError that names the first that is not valid, when its turn comes."""
    for position, each in enumerate(parsed):
        if isinstance(each, PromptError):
            raise PromptError(f"prompt {position}: {each}") if count > 1 else each
        yield each


def read_jsonl(lines: Iterable[str], name: str) -> Iterator[Source]:
    """Prompts from JSON lines: in each an object with what a `Source` may hold, which nobody has read yet.

    Blank lines are skipped. name: of the file, for messages. Errors: PromptError that names the line and what is wrong.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{name}, line {number}: not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(entry, dict):
            said = f'expected an object such as {{"prompt": "..."}}, found {type(entry).__name__}'
            raise PromptError(f"{name}, line {number}: {said}")
        yield entry


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


def _content(kind: str, source: Mapping[str, Any]) -> Content:
    match kind, source[kind]:
        case "messages", _:
            return _conversation(source)
        case "prompt", str(text):
            return text
        case "prompt", other:
            raise PromptError(f"prompt must be a string, not {type(other).__name__}: ids go into prompt_token_ids")
        case _, ids:
            return _ids(ids)


class _Talk(msgspec.Struct):
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _conversation(source: Mapping[str, Any]) -> Conversation:
    """Errors: PromptError with the path of the field."""
    messages = source["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError('messages must be a list of {"role": ..., "content": ...} with at least one entry')
    try:
        talk = msgspec.convert({**source, "messages": list(map(_as_sent, messages))}, _Talk)
    except msgspec.ValidationError as error:
        fault = where(error).with_choices(_Talk)
        raise PromptError(fault.words(()), fault.path) from None
    except UnicodeEncodeError as error:
        raise PromptError(f"messages: {surrogate(error)}") from None
    return Conversation(for_template(talk.messages), talk.tools, talk.chat_template_kwargs)


def _as_sent(message: Any) -> Any:
    """As clients of an endpoint send it: with a call's arguments as text. In Python they may be an object."""
    match message:
        case {"tool_calls": list(calls)}:
            return {**message, "tool_calls": [_call_as_sent(call) for call in calls]}
    return message


def _call_as_sent(call: Any) -> Any:
    match call:
        case {"function": {"arguments": dict(arguments)} as function}:
            return {**call, "function": {**function, "arguments": json.dumps(arguments)}}
    return call


def label(source: Source) -> str:
    """The end of a prompt on one line: prompts that share a beginning differ there. Of any type: nobody has read it yet."""
    value = next((source[key] for key in PROMPT_KEYS if key in source), "") if isinstance(source, Mapping) else source
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content", "")  # the last message of a conversation
    line = " ".join(writable(str(value)).split())
    return line if len(line) <= LABEL_CHARACTERS else "…" + line[1 - LABEL_CHARACTERS :]


def _ids(given: Any) -> list[int]:
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(given, list[int])  # of ints and nothing else, not even of bools: the fastest way to see that
    try:
        if bool in map(type, given):
            raise TypeError("a truth value is no token id")
        return [index(token) for token in given]
    except TypeError as error:
        raise PromptError("prompt_token_ids must be a list of integers") from error


def _text(name: str, value: Any, hint: str = "") -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} must be a string, not {type(value).__name__}{hint}")
    return _refuse_halves(name, value)


def _refuse_halves(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name}: {surrogate(error)}") from None
    return text


def _deadline(value: Any) -> float:
    """Seconds; below 0 has passed already."""
    with contextlib.suppress(TypeError, OverflowError):
        if not isinstance(value, bool | str | bytes | bytearray) and not math.isnan(seconds := float(value)):
            return seconds
    raise PromptError(f"deadline_s must be a number of seconds, not {repr(value)[:60]}: {_ITS_OWN}")


def _priority(value: Any) -> int:
    """Lower goes first."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and LEAST_URGENT >= index(value) >= MOST_URGENT:
            return index(value)
    raise PromptError(f"priority must be a whole number of 32 bits, not {repr(value)[:60]}: {_ITS_OWN}")
