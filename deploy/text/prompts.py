"""From what a user gives to prompts that can only be valid: token ids within the vocabulary and the model's length.

Parsed once, here, at the door; nothing behind checks again. torch comes in only to read
a checkpoint's settings.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import msgspec

from deploy.config.load import SAMPLING_KEYS, ConfigError, reject_unknown, sampling_params
from deploy.text.files import refuse_halves
from deploy.text.lengths import TextTooLong, encode_within
from deploy.text.tokenizer import Message, Tokenizer
from scheduler.protocol.sampling import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
CHAT_KEYS = ("tools", "chat_template_kwargs")
REQUEST_KEYS = ("cache_salt", "tenant", "deadline_s", "priority")
LINE_KEYS = (*PROMPT_KEYS, *CHAT_KEYS, *REQUEST_KEYS, *SAMPLING_KEYS)

Source = str | Sequence[int] | Mapping[str, Any]
"""A prompt as given: text, token ids, or {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}, the mappings
with an optional "cache_salt" that keeps this prompt's KV from being shared with prompts of another salt, and a "tenant", a
"deadline_s" and a "priority" of its own, which go before those of the call; None means the same as leaving them out. Beside
messages may stand "tools", functions in OpenAI's form, and "chat_template_kwargs", what else the chat template can be told."""


MOST_URGENT, LEAST_URGENT = -(1 << 31), (1 << 31) - 1


class PromptError(ValueError):
    """A prompt that cannot be served; the message says why and what to change."""


class PromptTooLong(PromptError):
    """It leaves the model no room for output."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model sets for a request. eos_ids end an output unless ignore_eos. max_tokens: prompt and output
    together."""

    vocab_size: int
    max_tokens: int
    eos_ids: tuple[int, ...]

    def ending_as(self, tokenizer: Tokenizer | None) -> "ModelLimits":
        """With the ends that the tokenizer and its chat template have, which the checkpoint's settings need not name."""
        ends = {end for end in tokenizer.end_ids if end < self.vocab_size} if tokenizer is not None else set()
        return replace(self, eos_ids=tuple(sorted(ends.union(self.eos_ids))))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A valid prompt: at least one id, each within the vocabulary, with room for at least one token of output.

    tenant, deadline_s, priority: as in `Request`, `math.inf` for no deadline; None: those of the call that submits it.
    answered: the output is an answer, a text of its own, and does not continue the prompt's.
    """

    token_ids: list[int]
    text: str | None = None
    salt: str = ""
    tenant: str | None = None
    deadline_s: float | None = None
    priority: int | None = None
    answered: bool = False

    def of_call(self, tenant: str | None, deadline_s: float | None, priority: int | None) -> "Prompt":
        """With what the call was given where it has none of its own."""
        return replace(
            self,
            tenant=tenant if self.tenant is None else self.tenant,
            deadline_s=deadline_s if self.deadline_s is None else self.deadline_s,
            priority=priority if self.priority is None else self.priority,
        )

    def of_tenant_alone(self) -> "Prompt":
        """With KV that only prompts of the same tenant and the same salt find, whatever salts other tenants choose: the
        length in front makes two different pairs two different salts."""
        tenant = self.tenant or ""
        return replace(self, salt=f"{len(tenant)}:{tenant}{self.salt}") if tenant or self.salt else self


@dataclass(frozen=True, slots=True)
class PromptParser:
    """Turns sources into prompts for one model. tokenizer: None where the checkpoint has none; then only ids will
    do."""

    limits: ModelLimits
    tokenizer: Tokenizer | None

    def parse(self, source: Source) -> Prompt:
        """Errors: PromptError."""
        if isinstance(source, Mapping):
            return self._parse_mapping(source)
        if isinstance(source, str):
            return self._valid(self._encode(source), source)
        return self._valid(source, None)

    def chat(
        self,
        messages: Sequence[Message],
        salt: str = "",
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation through the checkpoint's chat template. tools: what the model may call, in OpenAI's form.

        Errors: PromptError.
        """
        if not isinstance(messages, list | tuple) or not messages:
            raise PromptError('messages must be a list of {"role": ..., "content": ...} with at least one entry')
        tokenizer = self._need_tokenizer()
        try:
            text = tokenizer.chat_text([_for_template(message) for message in messages], tools, template_kwargs)
        except PromptError:
            raise
        except ValueError as error:
            raise PromptError(str(error)) from error
        return replace(self._valid(self._encode(text, around=False), None, salt), answered=True)

    def params(self, params: SamplingParams) -> SamplingParams:
        """Checks the types of sampling parameters made by hand, and their token ids against the vocabulary."""
        try:
            valid = sampling_params(msgspec.structs.asdict(params))
        except ConfigError as error:
            raise PromptError(f"sampling parameters: {error}") from error
        if valid.stop and self.tokenizer is None:
            raise PromptError("stop strings need text, and this checkpoint has no tokenizer: use stop_token_ids")
        for text in valid.stop:
            _refuse_halves("stop", text)
        for name, ids in (("stop_token_ids", valid.stop_token_ids), ("logit_bias", valid.logit_bias)):
            for token in ids:
                if not 0 <= token < self.limits.vocab_size:
                    raise PromptError(f"{name}: {self._outside(token)}")
        return valid

    def _parse_mapping(self, source: Mapping[str, Any]) -> Prompt:
        tenant, deadline_s = read_tenant(source.get("tenant")), read_deadline(source.get("deadline_s"))
        return self._parse_kind(source).of_call(tenant, deadline_s, read_priority(source.get("priority")))

    def _parse_kind(self, source: Mapping[str, Any]) -> Prompt:
        kinds = [key for key in PROMPT_KEYS if key in source]
        if len(kinds) != 1:
            raise PromptError(f"give exactly one of {', '.join(PROMPT_KEYS)}; found {' and '.join(kinds) or 'none'}")
        kind, value, salt = kinds[0], source[kinds[0]], source.get("cache_salt", "")
        if not isinstance(salt, str):
            raise PromptError(f"cache_salt must be a string, not {type(salt).__name__}")
        _refuse_halves("cache_salt", salt)
        if kind == "messages":
            tools, template_kwargs = source.get("tools"), source.get("chat_template_kwargs")
            if not isinstance(tools, list | None) or not isinstance(template_kwargs, Mapping | None):
                raise PromptError("tools must be a list of functions, and chat_template_kwargs an object")
            return self.chat(value, salt, tools=tools, template_kwargs=template_kwargs)
        if kind == "prompt":
            if not isinstance(value, str):
                raise PromptError(f"prompt must be a string, not {type(value).__name__}: ids go into prompt_token_ids")
            return self._valid(self._encode(value), value, salt)
        return self._valid(value, None, salt)

    def _encode(self, text: str, *, around: bool = True) -> list[int]:
        """Errors: PromptError, for a text that is far too long before all of it is tokenised, or that UTF-8 cannot hold."""
        tokenizer, most = self._need_tokenizer(), self.limits.max_tokens
        try:
            return encode_within(
                text, most, lambda part: tokenizer.encode(part, around=around), lambda: tokenizer.longest_token_bytes
            )
        except TextTooLong as error:
            raise PromptTooLong(
                f"the prompt {error}, and the model takes {most} tokens, output included: shorten it to {most - 1} or fewer"
            ) from None
        except ValueError as error:
            raise PromptError(str(error)) from error

    def _valid(self, ids: Sequence[int], text: str | None, salt: str = "") -> Prompt:
        """Looks at how many there are before it looks at each."""
        try:
            self._check_length(len(ids))
            tokens = [index(token) for token in ids]
        except TypeError as error:
            raise PromptError("prompt_token_ids must be a list of integers") from error
        if not tokens:
            raise PromptError("the prompt is empty: give at least one token")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.limits.vocab_size:
            raise PromptError(self._outside(low if low < 0 else high))
        return Prompt(tokens, text, salt)

    def _check_length(self, tokens: int) -> None:
        if tokens >= self.limits.max_tokens:
            raise PromptTooLong(
                f"the prompt has {tokens} tokens and the model takes {self.limits.max_tokens}, output included: "
                f"shorten it to {self.limits.max_tokens - 1} or fewer"
            )

    def _outside(self, token: int) -> str:
        size = self.limits.vocab_size
        return f"token id {token} is outside the vocabulary of {size} entries: use ids from 0 to {size - 1}"

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError("this checkpoint has no tokenizer: give prompt_token_ids instead of text or messages")
        return self.tokenizer


def _refuse_halves(name: str, text: str) -> None:
    """Errors: PromptError."""
    try:
        refuse_halves(text)
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from None


def read_tenant(value: Any) -> str | None:
    """Errors: PromptError."""
    if value is not None and not isinstance(value, str):
        raise PromptError(f"tenant must be a string, not {type(value).__name__}: {_ITS_OWN}")
    _refuse_halves("tenant", value or "")
    return value


def read_deadline(value: Any) -> float | None:
    """Seconds; below 0 has passed already. Errors: PromptError."""
    if value is None:
        return None
    with contextlib.suppress(TypeError, OverflowError):
        if not isinstance(value, bool | str) and not math.isnan(seconds := float(value)):
            return seconds
    raise PromptError(f"deadline_s must be a number of seconds, not {repr(value)[:60]}: {_ITS_OWN}")


def read_priority(value: Any) -> int | None:
    """Lower goes first. Errors: PromptError."""
    if value is None:
        return None
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and LEAST_URGENT >= index(value) >= MOST_URGENT:
            return index(value)
    raise PromptError(f"priority must be a whole number of 32 bits, not {repr(value)[:60]}: {_ITS_OWN}")


_ITS_OWN = 'one is for all prompts of a call, and in {"prompt": ...} a prompt has its own'


def _for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: content is text, and a call's arguments are an object, which templates print
    themselves. Clients send both as OpenAI has them. Errors: PromptError."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not (calls or "content" in message):
        raise PromptError(f'not a chat message: {message!r}; write {{"role": "user", "content": "..."}}')
    shown = {**message, "content": message.get("content") or ""}
    return shown | {"tool_calls": [_call_for_template(call) for call in calls]} if calls else shown


def _call_for_template(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(), "arguments": arguments} as function}:
            pass
        case _:
            raise PromptError(f'not a tool call: {call!r}; write {{"function": {{"name": ..., "arguments": "..."}}}}')
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what a model wrote need not be JSON: shown as it is
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def read_model_limits(checkpoint: Path, max_model_len: int | None, tensor_parallel_size: int = 1) -> ModelLimits:
    """Reads the checkpoint's settings, and refuses what could not run before anything starts. Errors: ValueError."""
    from cluster.resolve import model_length  # brings torch
    from workers.model.architectures import read_config

    model = read_config(checkpoint)
    model.shard(0, tensor_parallel_size)
    return ModelLimits(model.vocab_size, model_length(model, max_model_len), model.eos_ids)


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
    text = source.get("prompt") if isinstance(source, Mapping) else source
    if isinstance(text, str):
        extra = {key: value for key, value in source.items() if key != "prompt"} if isinstance(source, Mapping) else {}
        return extra | {"messages": [{"role": "user", "content": text}]}
    if isinstance(source, Mapping) and "messages" in source:
        return source
    raise PromptError("token ids cannot be put through a chat template: give text or messages")


def as_token_ids(source: Source) -> Source:
    """Token ids written as text, apart by spaces or commas. Errors: PromptError."""
    if not isinstance(source, str):
        return source
    try:
        return [int(piece) for piece in source.replace(",", " ").split()]
    except ValueError as error:
        raise PromptError(f"not token ids: {source[:60]!r}; write integers apart by spaces or commas") from error
