"""One turn of a coding agent, as each door is asked for it: the conversation so far out, a call of a tool back, streamed.

May import httpx and the standard library; never imports an engine.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

TIMEOUT_S = 3600.0
MOST_OUTPUT_TOKENS = 256


class AgentError(RuntimeError):
    """A turn was refused, failed, or came to no call."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the agent offers. schema: of its arguments."""

    name: str
    description: str
    schema: Mapping[str, Any]


@dataclass(slots=True)
class Turn:
    """What came of one. prompt_tokens: of the whole prompt; read_tokens: those of them that were in the cache. first_s: until
    the first event with something of the answer; seconds: until the end."""

    prompt_tokens: int = 0
    read_tokens: int = 0
    output_tokens: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Conversation(ABC):
    """Grows by a call and its result each turn."""

    client: httpx.Client
    system: str
    tools: Sequence[Tool]
    task: str
    messages: list[dict[str, Any]] = field(default_factory=list)

    path: ClassVar[str]

    def turn(self) -> Turn:
        """The model is made to call one tool. Errors: AgentError."""
        turn, began_s = Turn(), time.perf_counter()
        with self.client.stream("POST", self.path, json=self.body(), timeout=TIMEOUT_S) as answer:
            if answer.status_code != 200:
                raise AgentError(f"{answer.status_code}: {answer.read().decode()[:500]}")
            for event in _events(answer.iter_lines()):
                self.take(event, turn)
                if turn.name and not turn.first_s:
                    turn.first_s = time.perf_counter() - began_s
        turn.seconds = time.perf_counter() - began_s
        if not turn.name:
            raise AgentError(f"no tool was called, within {turn.output_tokens} tokens")
        return turn

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Of the next request."""

    @abstractmethod
    def take(self, event: Mapping[str, Any], turn: Turn) -> None:
        """Reads an event of the answer's stream. Errors: AgentError."""

    @abstractmethod
    def go_on(self, turn: Turn, result: str) -> None:
        """The call has been made, with this result."""


class MessagesConversation(Conversation):
    """Through Anthropic's Messages, as its agents ask: what is to be kept is marked."""

    path = "/v1/messages"

    def body(self) -> dict[str, Any]:
        marked = {"cache_control": {"type": "ephemeral"}}
        return {
            "system": [{"type": "text", "text": self.system} | marked],
            "tools": [{"name": t.name, "description": t.description, "input_schema": t.schema} for t in self.tools],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "messages": [{"role": "user", "content": self.task}, *self.messages],
            "max_tokens": MOST_OUTPUT_TOKENS,
            "stream": True,
        }

    def take(self, event: Mapping[str, Any], turn: Turn) -> None:
        match event:
            case {"type": "content_block_start", "content_block": {"type": "tool_use", "id": id, "name": name}}:
                turn.id, turn.name = id, name
            case {"delta": {"type": "input_json_delta", "partial_json": text}}:
                turn.arguments += text
            case {"type": "message_delta", "usage": usage}:
                turn.read_tokens = usage["cache_read_input_tokens"]
                turn.prompt_tokens = turn.read_tokens + usage["cache_creation_input_tokens"] + usage["input_tokens"]
                turn.output_tokens = usage["output_tokens"]
            case {"type": "error", "error": error}:
                raise AgentError(str(error))

    def go_on(self, turn: Turn, result: str) -> None:
        call = {"type": "tool_use", "id": turn.id, "name": turn.name, "input": json.loads(turn.arguments)}
        told = {"type": "tool_result", "tool_use_id": turn.id, "content": [{"type": "text", "text": result}]}
        self.messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [told]}]


class ChatConversation(Conversation):
    """Through OpenAI's chat completions."""

    path = "/v1/chat/completions"

    def body(self) -> dict[str, Any]:
        functions = [{"name": t.name, "description": t.description, "parameters": t.schema} for t in self.tools]
        return {
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": self.task}, *self.messages],
            "tools": [{"type": "function", "function": function} for function in functions],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": MOST_OUTPUT_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def take(self, event: Mapping[str, Any], turn: Turn) -> None:
        if "error" in event:
            raise AgentError(str(event["error"]))
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                turn.id, turn.name = call.get("id", turn.id), call["function"].get("name", turn.name)
                turn.arguments += call["function"]["arguments"]
        if usage := event.get("usage"):
            turn.prompt_tokens, turn.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            turn.read_tokens = usage["prompt_tokens_details"]["cached_tokens"]

    def go_on(self, turn: Turn, result: str) -> None:
        call = {"id": turn.id, "type": "function", "function": {"name": turn.name, "arguments": turn.arguments}}
        self.messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": turn.id, "content": result},
        ]


DOORS: dict[str, type[Conversation]] = {"messages": MessagesConversation, "chat": ChatConversation}


def _events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)
