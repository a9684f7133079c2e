"""From messages to what the service takes, or to a `RequestError` that names the field at fault.

Imports the generated messages and what HTTP checks by too; no gRPC.
"""

import uuid
from typing import Any

from deploy.config.serve import ServeConfig
from deploy.doors.access import REQUEST_ID, Caller
from deploy.doors.dialects.tools.formats import grammar_of
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.openai.requests.reading import check_model, check_numbers, sampling_params
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.text.content import Conversation, PromptError
from deploy.text.prompts import USUAL_PARAMS, USUAL_TERMS, Prompt, Terms
from scheduler.protocol.sampling import SamplingParams


class Readers:
    """Of all models of an endpoint: which of them a request is for."""

    def __init__(self, service: Service, config: ServeConfig, further: FurtherModels) -> None:
        """service: of the first model, which is meant where a request names none."""
        self._first = Reader(service, config)
        self._further = further

    def of(self, name: str) -> "Reader":
        """Errors: RequestError NOT_FOUND."""
        if (model := self._further.get(name)) is not None:
            return model.once(_further_reader)
        check_model(name or None, self._first.service.model)
        return self._first


class Reader:
    """Reads requests for the model of one service."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self.service = service
        self._config = config
        self._grammars = Grammars(service.model)

    async def request(self, request: pb.GenerateRequest, caller: Caller) -> Prompt:
        """Errors: RequestError."""
        params = await self._params(request, caller.account)
        terms = caller.terms(self._config, request.cache_salt, request.priority)
        return await self.prompt(request.prompt, params, terms)

    async def prompt(
        self, prompt: pb.Prompt, params: SamplingParams = USUAL_PARAMS, terms: Terms = USUAL_TERMS
    ) -> Prompt:  # fmt: skip
        """Errors: RequestError."""
        kind = prompt.WhichOneof("kind")
        try:
            match kind:
                case None:
                    raise RequestError.invalid("the prompt is missing: give text, token_ids or chat", "prompt")
                case "text":
                    return await self.service.prompt(prompt.text, params, terms)
                case "token_ids":
                    return await self.service.prompt(list(prompt.token_ids.ids), params, terms)
                case _:
                    messages = [{"role": message.role, "content": message.content} for message in prompt.chat.messages]
                    return await self.service.prompt(Conversation(messages), params, terms)
        except PromptError as error:
            raise RequestError.of_prompt(error, error.field or f"prompt.{kind}") from None

    async def _params(self, request: pb.GenerateRequest, account: str) -> SamplingParams:
        """What the request does not set is left to the defaults of `SamplingParams`."""
        sampling = request.sampling
        stops = len(sampling.stop) + len(sampling.stop_token_ids)
        check_numbers(self._config, sampling.n, stops, len(sampling.logit_bias))
        given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields()}
        guide = sampling.WhichOneof("grammar")
        asked: dict[str, Any] = {} if guide is None else {guide: given.pop(guide)}
        if guide == "guided_choice":
            asked[guide] = list(asked[guide].texts)
        grammar = grammar_of(**asked)
        given |= {name: tuple(given[name]) for name in ("stop", "stop_token_ids") if name in given}
        given |= {"logit_bias": dict(sampling.logit_bias), "grammar": grammar}
        if request.prompt.HasField("chat"):
            given.setdefault("max_tokens", None)
        params = sampling_params(**given)
        if grammar is not None:
            await self._grammars.check(grammar, guide or "", account)
        return params


def _further_reader(model: FurtherModel) -> Reader:
    return Reader(model.service, model.config)


def check_size(size_bytes: int, config: ServeConfig) -> None:
    """Errors: RequestError TOO_LARGE."""
    limit = config.max_request_bytes
    if size_bytes > limit:
        said = f"the request has {size_bytes} bytes: send at most {limit}, or let the server take more (max_request_bytes)"
        raise RequestError(Fault.TOO_LARGE, said)


def named(request_id: str) -> str:
    """The id that the client chose, or a new one. Errors: RequestError."""
    if request_id and not REQUEST_ID.fullmatch(request_id):
        said = "request_id takes up to 128 letters, digits and any of . _ : / + = -; or leave it to the server"
        raise RequestError.invalid(said, "request_id")
    return request_id or uuid.uuid4().hex
