"""From a request's body to what the service takes, or to a `RequestError` that names the field at fault.

Imports the schemas and the engine's records; no HTTP.
"""

from typing import Any, TypeVar, cast

import msgspec

from deploy.config.faults import FieldFault, where
from deploy.config.serve import ServeConfig
from deploy.doors.access import Caller
from deploy.doors.dialects.tools.formats import grammar_of
from deploy.doors.openai.requests.schemas import GenerationRequest, PoolingRequest, SampledRequest, TokenizeRequest
from deploy.doors.openai.requests.unknown import shortened, without_unknown
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.model import ServedModel
from deploy.text.files import json_fault
from deploy.text.prompts import Terms
from scheduler.protocol.sampling import Grammar, InvalidField, SamplingParams

AS_THEY_ARE = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens",
    "ignore_eos",
)  # fmt: skip
"""Fields that mean the same in a request and in `SamplingParams`."""

FORMAT_FIELDS = ("response_format", "guided_regex", "guided_choice", "guided_json", "guided_grammar", "structured_outputs")

SEEDS = 2**63

R = TypeVar("R", bound=msgspec.Struct)


def read(body: bytes, kind: type[R], warnings: Warnings, *, strict: bool) -> R:
    """A field that is not known is left out, and `warnings` are told, unless its name is like one that is, or this is to be
    strict. Errors: RequestError INVALID, with the path of the field as `param`."""
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            if strict or where(error).kind != "unknown":
                raise
        known = without_unknown(msgspec.json.decode(body), kind, warnings)
        return msgspec.json.decode(msgspec.json.encode(known), type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(where(error), kind) from None
    except RecursionError:
        raise RequestError.invalid("the body is nested too deeply: flatten it") from None
    except ValueError as error:  # msgspec.DecodeError, UnicodeDecodeError
        raise RequestError.invalid(f"the body is not valid JSON: {json_fault(body, error)}") from None


def check(request: GenerationRequest, model: ServedModel, config: ServeConfig) -> None:
    """What holds for completions and chat alike. Errors: RequestError."""
    check_model(request.model, model)
    check_refused(request)
    if request.stream_options is not None and not request.stream:
        raise RequestError.invalid("stream_options goes with stream=true: leave it out, or stream", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError.invalid("prompt_logprobs cannot be streamed: leave stream out", "prompt_logprobs")
    stops = len(stop_strings(request)) + len(request.stop_token_ids or ())
    check_numbers(config, request.n or 1, stops, len(request.logit_bias or ()))


def check_refused(request: SampledRequest | PoolingRequest | TokenizeRequest) -> None:
    """A field that asks for nothing may be there. Errors: RequestError."""
    for name, reason in request.REFUSED.items():
        if getattr(request, name) not in (None, "", request.USUAL.get(name, False)):
            raise RequestError.invalid(f"{name} is not supported: {reason}", name)


def check_model(asked: str | None, model: ServedModel) -> None:
    """A request may leave the model out. Errors: RequestError NOT_FOUND."""
    if asked is not None and asked != model.name:
        raise RequestError(
            Fault.NOT_FOUND,
            f"the model {shortened(asked)!r} does not exist here: ask for {model.name!r}, or another that /v1/models lists",
            param="model",
            code="model_not_found",
        )


def check_numbers(config: ServeConfig, choices: int, stops: int, biases: int) -> None:
    """What one request may have. Errors: RequestError."""
    at_most("n", choices, config.max_choices, "max_choices")
    at_most("stop", stops, config.max_stops, "max_stops")
    at_most("logit_bias", biases, config.max_logit_bias, "max_logit_bias")


def at_most(name: str, number: int, limit: int, option: str) -> None:
    """Errors: RequestError."""
    if number > limit:
        raise RequestError.invalid(f"{name}: {number} is above the {limit} that this server allows ({option})", name)


def sampling(request: GenerationRequest, **fields: Any) -> SamplingParams:
    """fields: what completions and chat call differently. Errors: RequestError."""
    given = {name: value for name in AS_THEY_ARE if (value := getattr(request, name)) is not None}
    nucleus = given.get("top_p") != 0 or given.pop("top_p")  # no more than the likeliest token, then
    return sampling_params(
        top_k=max(0, request.top_k or 0) if nucleus else 1,
        seed=None if request.seed is None else request.seed % SEEDS,
        stop=stop_strings(request),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        **given,
        **fields,
    )


def sampling_params(**fields: Any) -> SamplingParams:
    """Of fields that have their types, whichever door read them. Errors: RequestError with the field's name."""
    try:
        return SamplingParams(**fields)
    except InvalidField as error:
        raise RequestError.invalid(str(error), error.field) from None


def terms(request: GenerationRequest | PoolingRequest, caller: Caller, config: ServeConfig) -> Terms:
    """Errors: RequestError."""
    return caller.terms(config, request.cache_salt or "", request.priority or 0, request.timeout, request.user)


def contents(given: str | list[str | int | list[int]], field: str) -> list[str | list[int]]:
    """One prompt or several: a list of integers is one. Errors: RequestError."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError.invalid(f"{field} is an empty list: give at least one text, or token ids", field)
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise RequestError.invalid(f"{field} mixes texts and token ids: give lists of one kind", field)
    return [cast(list[int], given)] if kinds == {int} else cast(list[str | list[int]], given)


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """`stop` may be one string."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def format_asked(request: GenerationRequest, warnings: Warnings) -> tuple[Grammar | None, str]:
    """The grammar of `response_format`, `structured_outputs` or one of the `guided_` fields, and that field's name. Errors:
    RequestError."""
    asked = {name: value for name in FORMAT_FIELDS if (value := getattr(request, name)) is not None}
    if request.structured_outputs is not None:
        asked["structured_outputs"] = msgspec.structs.asdict(request.structured_outputs)
    return (grammar_of(**asked, warnings=warnings), next(iter(asked))) if asked else (None, "")


def _refusal(fault: FieldFault, kind: type[msgspec.Struct]) -> RequestError:
    if fault.kind == "unknown":
        fault = fault._replace(path=shortened(fault.path))
    code = {"unknown": "unknown_parameter", "required": "missing_required_parameter"}.get(fault.kind or "")
    said = fault.with_choices(kind).words(kind.__struct_fields__)
    return RequestError(Fault.INVALID, said, param=fault.path or None, code=code)
