"""What the clients ask: chat and completions, greedy and sampled by seeds, some with log-probabilities, stop strings, choices
or penalties; and what an answer to one consists of. Imports the standard library only.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROUNDING = 1e-6
"""Between two log-probabilities that are the same: batches are summed in another order. Tokens must be equal. In float64."""

CONTINUED = (
    "def fibonacci(n):", "class Stack:", "import os\n", "for line in", "def main() -> None:\n", "    return ", "while True:\n",
    "if __name__ ==",
)  # fmt: skip
ASKED = ("Write a loop over a list.", "What does a generator do?", "Sort these numbers.", "Open a file and count its lines.")
SHORTEST, LONGEST = 150, 900


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, streamed. number: among those of a run, whose answers are known by it."""

    number: int
    path: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come. logprobs: of each token: itself, its own, those of the alternatives."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[tuple[str, float, Mapping[str, float]]] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """An answer as far as it has come. completion_tokens: what the final usage says."""

    choices: dict[int, Choice] = field(default_factory=dict)
    completion_tokens: int | None = None

    def take(self, event: Mapping[str, Any]) -> bool:
        """Adds what one event says; whether there was output in it."""
        if (usage := event.get("usage")) is not None:
            self.completion_tokens = usage["completion_tokens"]
        grown = False
        for part in event.get("choices", ()):
            choice = self.choices.setdefault(part["index"], Choice())
            text = part["text"] if "text" in part else part["delta"].get("content") or ""
            logprobs = _logprobs(part.get("logprobs"))
            choice.text += text
            choice.logprobs += logprobs
            choice.finish_reason = part.get("finish_reason") or choice.finish_reason
            grown |= bool(text or logprobs)
        return grown

    @property
    def whole(self) -> bool:
        return self.completion_tokens is not None and all(choice.finish_reason for choice in self.choices.values())

    def departs_from(self, other: "Answer", rounding: float = ROUNDING) -> str | None:
        """In words; None if they are the same. rounding: between log-probabilities."""
        if self.choices.keys() != other.choices.keys():
            return f"choices {sorted(self.choices)} instead of {sorted(other.choices)}"
        if self.completion_tokens != other.completion_tokens:
            return f"usage says {self.completion_tokens} tokens instead of {other.completion_tokens}"
        for index, choice in self.choices.items():
            if (apart := _apart(choice, other.choices[index], rounding)) is not None:
                return f"choice {index}: {apart}"
        return None


def _apart(choice: Choice, other: Choice, rounding: float) -> str | None:
    if choice.text != other.text:
        at = next((at for at, (a, b) in enumerate(zip(choice.text, other.text, strict=False)) if a != b), -1)
        at = at if at >= 0 else min(len(choice.text), len(other.text))
        here, there = choice.text[at - 20 : at + 20], other.text[at - 20 : at + 20]
        return f"from character {at} of {len(choice.text)} on {here!r} instead of {there!r} of {len(other.text)}"
    if choice.finish_reason != other.finish_reason:
        return f"it ended by {choice.finish_reason} instead of {other.finish_reason}"
    if len(choice.logprobs) != len(other.logprobs):
        return f"{len(choice.logprobs)} tokens have log-probabilities instead of {len(other.logprobs)}"
    for at, (one, two) in enumerate(zip(choice.logprobs, other.logprobs, strict=True)):
        if one[0] != two[0] or one[2].keys() != two[2].keys() or not _near(one, two, rounding):
            return f"log-probabilities of token {at} are {one} instead of {two}"
    return None


def _near(
    one: tuple[str, float, Mapping[str, float]], two: tuple[str, float, Mapping[str, float]], rounding: float
) -> bool:
    pairs = [(one[1], two[1]), *((value, two[2][token]) for token, value in one[2].items())]
    return all(math.isclose(a, b, abs_tol=rounding) for a, b in pairs)


def _logprobs(told: Mapping[str, Any] | None) -> list[tuple[str, float, Mapping[str, float]]]:
    """Of completions or of chat, whose forms differ."""
    if not told:
        return []
    if "content" in told:
        return [
            (entry["token"], entry["logprob"], {other["token"]: other["logprob"] for other in entry["top_logprobs"]})
            for entry in told["content"] or ()
        ]
    tops = told["top_logprobs"] or [{}] * len(told["tokens"])
    return list(zip(told["tokens"], told["token_logprobs"], tops, strict=True))


def mixed(count: int, seed: int) -> list[Ask]:
    """So many requests of all sorts, each another."""
    draw, asks = random.Random(seed), list[Ask]()
    for number in range(count):
        body: dict[str, Any] = {"max_tokens": draw.randint(SHORTEST, LONGEST), "ignore_eos": True}
        chat = number % 3 == 0
        if chat:
            body["messages"] = [{"role": "user", "content": f"{draw.choice(ASKED)} ({number})"}]
        else:
            body["prompt"] = f"# {number}\n{draw.choice(CONTINUED)}"
        body |= {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": draw.randint(0, 1 << 30), "top_p": 0.95}
        match number % 8:
            case 1 | 4:
                body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
            case 2:
                body["stop"] = [f"{draw.choice('abcdefgh')}{draw.choice('aeiou')}{draw.choice('nrst')} ", "\n\n\n\n"]
            case 6:
                body |= {"n": 2, "max_tokens": body["max_tokens"] // 2}
            case 7:
                body |= {"presence_penalty": 0.5, "repetition_penalty": 1.1}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        asks.append(Ask(number, "/v1/chat/completions" if chat else "/v1/completions", body))
    return asks
