"""The requests that the study is about: a trace, and synthetic workloads whose users, conversations and answers are known.

Tokens are names: equal names after equal names are equal tokens, as in `simulator.traces`, which also takes these
requests. Imports the traces and NumPy.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simulator.traces import Names, TraceRequest, read_trace

UNKNOWN = -1
COMMON_SHARE, COMMON_LEAST = 0.01, 20
"""A block that so many of a trace's requests begin with is a common preamble: sharing it does not make a conversation."""

NOTHING: Names = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What was asked, and by whom. answer: names of the output tokens, one each; empty where a trace does not tell.

    user: UNKNOWN where a trace does not tell. conversation: of a trace it is inferred, see `infer_conversations`.
    """

    asked: TraceRequest
    answer: Names
    user: int
    conversation: int

    @property
    def cached_names(self) -> Names:
        """Of all that can stay in the cache: the prompt, and the answer but for its last token, whose KV is never computed."""
        return np.concatenate([self.asked.names, self.answer[:-1]]) if len(self.answer) else self.asked.names

    @property
    def computed_tokens(self) -> int:
        """Tokens that have KV when the request ends."""
        return self.asked.prompt_tokens + self.asked.output_tokens - 1


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival. unit: tokens that one name stands for."""

    name: str
    about: str
    requests: list[StudyRequest]
    unit: int

    @property
    def prompt_tokens(self) -> int:
        return sum(request.asked.prompt_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        return max(request.computed_tokens for request in self.requests)


def from_trace(path: Path, seed: int, limit: int | None = None) -> Workload:
    """Errors: TraceError, OSError."""
    asked = read_trace(path, seed, limit)
    conversations = infer_conversations([request.names for request in asked])
    requests = [StudyRequest(each, NOTHING, UNKNOWN, name) for each, name in zip(asked, conversations, strict=True)]
    unit = asked[0].block_tokens
    return Workload("trace", f"{path.name}: names of {unit} tokens; users and answers unknown", requests, unit)


def infer_conversations(names: list[Names]) -> list[int]:
    """A request continues the conversation of the last one that had its longest known prefix, preambles left aside.

    A block that is in COMMON_SHARE of all requests, and in COMMON_LEAST of them, is a preamble. Returns a conversation for
    each request.
    """
    counts = Counter(int(name) for each in names for name in each)
    common = max(COMMON_LEAST, COMMON_SHARE * len(names))
    last: dict[int, int] = {}
    result: list[int] = []
    for number, each in enumerate(names):
        conversation = number
        for name in each.tolist():
            if name not in last:
                break
            if counts[name] < common:
                conversation = last[name]
        last.update(dict.fromkeys(each.tolist(), conversation))
        result.append(conversation)
    return result


class _Writer:
    """Makes names, lengths and times of a synthetic workload; equal seeds, equal workloads."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._next = 1
        self.drafts: list[tuple[float, Names, Names, int, int]] = []

    def text(self, tokens: int) -> Names:
        """So many tokens that are nowhere else."""
        first, self._next = self._next, self._next + tokens
        return np.arange(first, first + tokens, dtype=np.uint64)

    def length(self, median: float, sigma: float = 0.8) -> int:
        """Log-normal, at least 1."""
        return max(1, round(float(self.random.lognormal(np.log(median), sigma))))

    def ask(self, arrived_s: float, prompt: Names, user: int, conversation: int, answer_tokens: int) -> Names:
        """Adds a request. Returns prompt and answer: what a next turn begins with."""
        answer = self.text(answer_tokens)
        self.drafts.append((arrived_s, prompt, answer, user, conversation))
        return np.concatenate([prompt, answer])

    def workload(self, name: str, about: str) -> Workload:
        self.drafts.sort(key=lambda draft: draft[0])
        requests = [
            StudyRequest(TraceRequest(at, when_s, len(prompt), len(answer), prompt, 1), answer, user, conversation)
            for at, (when_s, prompt, answer, user, conversation) in enumerate(self.drafts)
        ]
        return Workload(name, about, requests, 1)


def shared_prompt(requests: int, seed: int) -> Workload:
    """Single questions to four applications of unequal popularity, each with a long system prompt."""
    write = _Writer(seed)
    systems = [write.text(write.length(1500, 0.4)) for _ in range(4)]
    for number in range(requests):
        system = systems[min(int(write.random.zipf(1.6)) - 1, 3)]
        question = write.text(write.length(120))
        user = int(write.random.integers(requests // 8 + 1))
        write.ask(write.random.uniform(0, requests / 4), np.concatenate([system, question]), user, number, write.length(200))
    return write.workload("shared prompt", "4 system prompts of about 1,500 tokens, one question of about 120 each")


def chat(requests: int, seed: int) -> Workload:
    """Conversations of 1 to 20 turns over one short system prompt; each turn repeats all before it."""
    write = _Writer(seed)
    system = write.text(183)
    conversation = 0
    while len(write.drafts) < requests:
        when_s, history = float(write.random.uniform(0, requests / 4)), system
        for _ in range(min(20, int(write.random.geometric(0.2)))):
            history = np.concatenate([history, write.text(write.length(60))])
            answer = write.length(220)
            history = write.ask(when_s, history, conversation // 3, conversation, answer)
            when_s += answer * 0.03 + float(write.random.exponential(45.0))
        conversation += 1
    return write.workload("chat", "conversations of 5 turns on average, messages of about 60, answers of about 220 tokens")


def agents(requests: int, seed: int) -> Workload:
    """Tasks of agents: long tool definitions, many short steps with tool results, now and then a fan-out of sub-tasks."""
    write = _Writer(seed)
    tools = [write.text(write.length(2500, 0.3)) for _ in range(3)]
    task = 0
    while len(write.drafts) < requests:
        when_s, user = float(write.random.uniform(0, requests / 6)), task // 4
        history = np.concatenate([tools[task % 3], write.text(write.length(200))])
        for _ in range(int(write.random.integers(4, 16))):
            answer = write.length(70)
            if write.random.random() < 0.1:
                for _ in range(4):
                    write.ask(when_s, np.concatenate([history, write.text(write.length(50))]), user, task, write.length(150))
            history = write.ask(when_s, history, user, task, answer)
            history = np.concatenate([history, write.text(write.length(300, 1.0))])
            when_s += answer * 0.03 + float(write.random.exponential(3.0))
        task += 1
    return write.workload("agents", "tasks of 4 to 15 steps over tool definitions of about 2,500 tokens, some fan out")


def random_prompts(requests: int, seed: int) -> Workload:
    """Nothing is shared."""
    write = _Writer(seed)
    for number in range(requests):
        write.ask(write.random.uniform(0, requests / 4), write.text(write.length(600, 1.0)), number, number, write.length(200))
    return write.workload("random", "prompts of about 600 tokens that share nothing")


SYNTHETIC: tuple[Callable[[int, int], Workload], ...] = (shared_prompt, chat, agents, random_prompts)
REQUESTS, QUICK_REQUESTS = 3000, 100


def workloads(trace: Path | None, seed: int, *, quick: bool) -> list[Workload]:
    """The trace, if there is one, and the four synthetic ones. Errors: TraceError, OSError."""
    made = [make(QUICK_REQUESTS if quick else REQUESTS, seed) for make in SYNTHETIC]
    return made if trace is None else [from_trace(trace, seed, QUICK_REQUESTS if quick else None), *made]
