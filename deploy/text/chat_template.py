"""A checkpoint's chat template: what it shows of a conversation, and what it wants to be given. Imports jinja2 only to read one
from a file."""

import inspect
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from deploy.text.files import decode

logger = logging.getLogger(__name__)

TURN = "manta"
"""What the user and the assistant say in a conversation that is rendered to see what the template does."""

Message = Mapping[str, Any]
"""A chat message: {"role": "user", "content": "..."} and whatever else the checkpoint's template reads."""


class ChatTemplate:
    """The one of a tokenizer, which may have none."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of transformers."""
        self._tokenizer = tokenizer

    @property
    def text(self) -> str:
        """The template of conversations with tools, as it is written; empty if there is none."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[]))
        except ValueError:
            return ""

    def replace(self, file: Path) -> None:
        """Uses the template in a file from now on. Errors: ValueError if it is none, OSError if there is no such file."""
        from jinja2 import TemplateSyntaxError  # transformers brings it where it renders templates

        self._tokenizer.chat_template = decode(file.read_bytes())
        try:
            self._tokenizer.apply_chat_template([{"role": "user", "content": TURN}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"{file} is no chat template: {error}, in line {error.lineno}") from error
        except Exception:  # a conversation that this template refuses says nothing of its syntax
            logger.debug("%s refuses a user's word", file, exc_info=True)

    def rendered(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """A conversation up to where the assistant's answer begins. tools: in OpenAI's form, for the template to show. kwargs:
        what else this template can be told. Errors: ValueError, also where the template does not show the tools."""
        kwargs = kwargs or {}
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError("this checkpoint has no chat template: give the prompt as text or as token ids")
        taken = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys() | {"messages"}
        if taken := taken & kwargs.keys():
            raise ValueError(f"chat_template_kwargs: {min(taken)} is no variable of a template: leave it out")
        if tools and not self._shows_tools:
            raise ValueError(
                "the checkpoint's chat template does not show tools to the model: leave tools out, or serve it with one that "
                "does (manta serve --chat-template FILE)"
            )
        return self._render([self._with_arguments(message) for message in messages], tools, kwargs)

    def turn_end(self, tokens: Collection[str]) -> str | None:
        """Which of the tokens follows the assistant's words; None if none does, or there is no template. The token before those
        words begins a turn, and some templates begin the next one unasked."""
        messages = [{"role": role, "content": TURN} for role in ("user", "assistant")]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # templates raise what they please, jinja's errors among it
            return None
        before, _, after = text.rpartition(TURN)
        end = max((token for token in tokens if after.lstrip().startswith(token)), key=len, default=None)
        begin = max((token for token in tokens if token in before), key=before.rfind, default=None)
        return end if end != begin else None

    @cached_property
    def _shows_tools(self) -> bool:
        """Whether the template writes anything else with a tool than without. One that refuses this conversation is taken to
        show them."""
        messages = [{"role": "user", "content": TURN}]
        tool = {"type": "function", "function": {"name": TURN, "parameters": {"type": "object", "properties": {}}}}
        try:
            return self._render(messages, [tool], {}) != self._render(messages, None, {})
        except ValueError:
            return True

    @cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether the template wants a call's arguments as text, which it joins to its own, as DeepSeek's do. Most print an
        object themselves."""

        def shown(arguments: Any) -> bool:
            call = {"id": "call_0000", "type": "function", "function": {"name": TURN, "arguments": arguments}}
            asked, called = {"role": "user", "content": TURN}, {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                return bool(self._render([asked, called], None, {}))
            except ValueError:
                return False

        return not shown({TURN: TURN}) and shown("{}")

    def _with_arguments(self, message: Message) -> Message:
        """As the template wants them."""
        if not message.get("tool_calls") or not self._takes_text_arguments:
            return message
        return {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=True,
                    **kwargs,
                )
            )
        except Exception as error:  # templates raise what they please, jinja's errors among it
            raise ValueError(f"the checkpoint's chat template refuses these messages: {error}") from error


def _with_text_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function, arguments = call["function"], call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
