"""From a request's body to what the service takes, or to a `RequestError` that names the field at fault.

Imports the schemas and the engine's records; no HTTP.
"""

import difflib
import re
from typing import Any, TypeVar

import msgspec

from deploy.config.serve import ServeConfig
from deploy.doors.openai.schemas import GenerationRequest
from deploy.doors.openai.tools.formats import grammar_of
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service import ServedModel, Service
from deploy.text.files import json_fault
from deploy.text.prompts import PromptError
from scheduler.protocol.sampling import Grammar, SamplingParams

AS_THEY_ARE = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens",
    "ignore_eos",
)  # fmt: skip
"""Fields that mean the same in a request and in `SamplingParams`."""

FORMAT_FIELDS = ("response_format", "guided_regex", "guided_choice", "guided_json", "guided_grammar")

SEEDS = 2**63
SHOWN_CHARACTERS = 80

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$")
_MISSING = re.compile(r"Object missing required field `(.*)`$")
_FIRST_WORD = re.compile(r"[a-z_]+")

R = TypeVar("R", bound=msgspec.Struct)


def read(body: bytes, kind: type[R]) -> R:
    """Errors: RequestError INVALID, with the path of the field as `param`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None
    except RecursionError:
        raise RequestError.invalid("the body is nested too deeply: flatten it") from None
    except ValueError as error:  # msgspec.DecodeError, UnicodeDecodeError
        raise RequestError.invalid(f"the body is not valid JSON: {json_fault(body, error)}") from None


def check(request: GenerationRequest, model: ServedModel, config: ServeConfig) -> None:
    """What holds for completions and chat alike. Errors: RequestError."""
    check_model(request.model, model)
    values = msgspec.structs.asdict(request)
    for name, reason in request.REFUSED.items():
        if values[name] not in (None, ""):
            raise RequestError.invalid(f"{name} is not supported: {reason}", name)
    if request.stream_options is not None and not request.stream:
        raise RequestError.invalid("stream_options goes with stream=true: leave it out, or stream", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError.invalid("prompt_logprobs cannot be streamed: leave stream out", "prompt_logprobs")
    stops = len(stop_strings(request)) + len(request.stop_token_ids or ())
    at_most("n", request.n or 1, config.max_choices, "max_choices")
    at_most("stop", stops, config.max_stops, "max_stops")
    at_most("logit_bias", len(request.logit_bias or ()), config.max_logit_bias, "max_logit_bias")


def check_model(asked: str | None, model: ServedModel) -> None:
    """A request may leave the model out. Errors: RequestError NOT_FOUND."""
    if asked is not None and asked != model.name:
        raise RequestError(
            Fault.NOT_FOUND, f"the model {shortened(asked)!r} does not exist here: ask for {model.name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip


def at_most(name: str, number: int, limit: int, option: str) -> None:
    """Errors: RequestError."""
    if number > limit:
        raise RequestError.invalid(f"{name}: {number} is above the {limit} that this server allows ({option})", name)


def sampling(
    request: GenerationRequest,
    *,
    choices: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """Errors: RequestError."""
    values = msgspec.structs.asdict(request)
    given = {name: values[name] for name in AS_THEY_ARE if values[name] is not None}
    try:
        return SamplingParams(
            n=choices,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            top_k=max(0, request.top_k or 0),
            seed=None if request.seed is None else request.seed % SEEDS,
            stop=stop_strings(request),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            **given,
        )
    except ValueError as error:
        raise RequestError.invalid(str(error), field_named_by(str(error))) from None


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """`stop` may be one string."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def format_asked(request: GenerationRequest) -> tuple[Grammar | None, str]:
    """The grammar of `response_format` or of one of the `guided_` fields, and that field's name. Errors: RequestError."""
    values = msgspec.structs.asdict(request)
    asked = {name: values[name] for name in FORMAT_FIELDS}
    return grammar_of(**asked), next((name for name, value in asked.items() if value is not None), "")


def fitting(params: SamplingParams, service: Service) -> SamplingParams:
    """Held against the model: token ids within its vocabulary. Errors: RequestError."""
    try:
        return service.parser.params(params)
    except PromptError as error:
        raise RequestError.of_prompt(error, field_named_by(str(error))) from None


def field_named_by(message: str) -> str | None:
    """Messages about sampling parameters begin with the field's name."""
    word = _FIRST_WORD.match(message)
    return word[0] if word and word[0] in SamplingParams.__struct_fields__ else None


def shortened(name: str) -> str:
    """What a client made up, short enough to be looked at and told again."""
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}..."


def _refusal(message: str, kind: type[Any]) -> RequestError:
    place = _PLACE.search(message)
    path = place[1] if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.match(what):
        path = shortened(f"{path}.{unknown[1]}".lstrip("."))
        near = difflib.get_close_matches(path, kind.__struct_fields__, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        return RequestError(Fault.INVALID, f"unknown field {path!r}: {hint}", param=path, code="unknown_parameter")
    if missing := _MISSING.match(what):
        path = f"{path}.{missing[1]}".lstrip(".")
        return RequestError(Fault.INVALID, f"{path} is missing", param=path, code="missing_required_parameter")
    return RequestError.invalid(f"{path or 'the body'}: {what[:1].lower()}{what[1:]}".replace("`", ""), path or None)
