"""What a request asks of the sampler. Parsed once, valid from then on; travels to the workers as it is.

Imports nothing of Manta.
"""

import math
from typing import Literal

import msgspec

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_COUNT = 2**31 - 1
"""Of tokens, and of ids to choose among. Workers add a prompt's length, in 64 bits: what runs over there would end a rank."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
"""A logit is divided by it, or multiplied with it: beyond these it would not stay finite."""


class InvalidField(ValueError):
    """A setting that cannot be. field: its name, with which the message begins. said: how it goes on."""

    def __init__(self, field: str, said: str) -> None:
        super().__init__(field, said)
        self.field = field

    def __str__(self) -> str:
        return "".join(self.args)


class Grammar(msgspec.Struct, frozen=True):
    """What an output must match, from its first token to its last.

    kind: "json_schema" (text is the schema as JSON), "regex" (Rust syntax, matched whole) or "lark" (llguidance's).
    preamble: rules in Lark, of which the one called `preamble` comes before all that; empty where nothing does.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    preamble: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next token, and when to stop. Field names and meanings are OpenAI's and vLLM's.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: probabilities.
    seed: noise depends on (seed, choice, position, token id) alone; a request without a seed draws one at submit.
    repetition_penalty: multiplicative over prompt and output, 0.01 to 100. presence_penalty, frequency_penalty: additive over
    output.
    logit_bias: token id -> added to the logit. stop: strings, found by the front end and cut from the text.
    stop_token_ids: ids that end the output besides the model's own end-of-sequence ids.
    min_tokens, max_tokens: output tokens; max_tokens None means as many as model and pool allow.
    ignore_eos: the model's end-of-sequence ids do not stop. logprobs: how many top log-probabilities per token (the chosen
    token's comes with any value, 0 included); None for none. prompt_logprobs: the same for the prompt's tokens; such a
    request computes its whole prompt and takes no prefix hit. grammar: what the output must match; it ends where nothing
    more may follow.
    Errors: InvalidField, whose message has the value given and the legal range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check("n", self.n, 1, MAX_CHOICES)
        _check("temperature", self.temperature, 0.0, math.inf)
        _check("top_k", self.top_k, 0, MAX_COUNT)
        _check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check("min_tokens", self.min_tokens, 0, MAX_COUNT)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1, MAX_COUNT)
            if self.min_tokens > self.max_tokens:
                raise InvalidField("min_tokens", f"={self.min_tokens} is above max_tokens={self.max_tokens}: lower it")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and self.min_tokens:
            raise InvalidField("min_tokens", " and a grammar exclude each other: the grammar says where the output may end")
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.logit_bias, dict):
            raise InvalidField("logit_bias", f"={self.logit_bias!r} is not a mapping: give {{token id: bias}}")
        if not isinstance(self.stop, str | tuple | list):
            raise InvalidField("stop", f"={self.stop!r} is not a text: give one, or a list of them")
        for token, bias in self.logit_bias.items():
            _check("logit_bias", bias, -100.0, 100.0, at=f"[{token}]")
        if any(not text for text in self.stop):
            raise InvalidField("stop", ": an empty string would stop at once; leave it out")


def _check(field: str, value: float, low: float, high: float, open_low: bool = False, at: str = "") -> None:
    """at: which of the field's values."""
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise InvalidField(field, f"{at}={value!r} is not a number: give one from {low} to {high}") from None
    if not finite or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidField(field, f"{at}={value} is outside {bracket}{low}, {high}]: choose a value inside")
