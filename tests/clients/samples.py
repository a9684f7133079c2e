"""What the clients ask: the same words, the same function, the same record. A model that knows nothing is held to them by
grammars, so whatever can be checked is bounded: without an end it would write a text for as long as it may."""

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MODEL = "tiny"
PATIENCE_S = 600.0
"""How long a client waits for what must come."""
MAX_TOKENS = 300

HELLO = "Say hello."
ASKED = [{"role": "user", "content": HELLO}]
CITIES = ("Paris", "Rome")


class City(BaseModel):
    """A city and its weather, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Paris", "Rome"]
    degrees: Literal[20, 30]


WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": [*CITIES]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER},
}
CHOICE: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


THOUGHT = "Hm"
THINKING: dict[str, Any] = {"repetition_penalty": 100, "chat_template_kwargs": {"enable_thinking": True}}
"""What one asks beside `thinking_bias`, so that the model thinks `THOUGHT` and then says whatever it says."""


def thinking_bias(token_ids: list[int]) -> dict[str, float]:
    """A bias that has a model write these tokens, no two of which are the same, in their order: a penalty on what has been
    written leaves each but one turn."""
    return {str(token): 100.0 - 10.0 * place for place, token in enumerate(token_ids)}


def keep_quiet() -> None:
    """Clients ask nobody but the endpoint: no model lists, no traces, no proxies."""
    os.environ |= {
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
