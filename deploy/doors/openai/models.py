"""`/v1/models`, `/tokenize` and `/detokenize`: what models there are, and what text is to one. No HTTP."""

from msgspec import UNSET

from deploy.doors.openai.answers.records import ModelCard, Text, Tokens
from deploy.doors.openai.requests.reading import check_model, check_refused
from deploy.doors.openai.requests.schemas import DetokenizeRequest, TokenizeRequest
from deploy.frontend.errors import RequestError
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.text.content import Conversation, PromptError, for_template
from deploy.text.prompts import Prompt


def card(model: ServedModel) -> ModelCard:
    """Of an adapter also what it is beside, and where it was read, as vLLM says it."""
    return ModelCard(
        id=model.name,
        created=model.created,
        max_model_len=model.limits.max_tokens,
        root=UNSET if model.adapter is None else model.adapter.folder,
        parent=UNSET if model.parent is None else model.parent,
    )


def one_of(name: str, first: Service, further: FurtherModels) -> Service:
    """Whose name that is. Errors: RequestError NOT_FOUND."""
    if (found := further.get(name)) is not None:
        return found.service
    check_model(name, first.model)
    return first


class TokenTexts:
    """Texts and tokens of the one model of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model = service.model

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Errors: RequestError."""
        check_model(request.model, self._model)
        prompt = await self._prompt(request)
        shown = request.return_token_strs and self._model.tokenizer is not None
        return Tokens(
            count=len(prompt.token_ids),
            max_model_len=self._model.limits.max_tokens,
            tokens=prompt.token_ids,
            token_strs=await self._service.token_texts(prompt.token_ids) if shown else None,
        )

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """Errors: RequestError."""
        check_model(request.model, self._model)
        size = self._model.limits.vocab_size
        outside = next((token for token in request.tokens if token >= size), None)
        if outside is not None:
            raise RequestError.invalid(f"token id {outside} is outside the vocabulary of {size} entries", "tokens")
        try:
            return Text(prompt=await self._service.text_of(request.tokens))
        except PromptError as error:
            raise RequestError.of_prompt(error, "tokens") from None

    async def _prompt(self, request: TokenizeRequest) -> Prompt:
        if (request.prompt is None) == (request.messages is None):
            raise RequestError.invalid("give either prompt or messages", "prompt")
        check_refused(request)
        for name in ("tools", "chat_template_kwargs"):
            if request.messages is None and getattr(request, name) is not None:
                raise RequestError.invalid(f"{name} goes with messages: leave it out, or give messages", name)
        try:
            if request.messages is None:
                return await self._service.prompt(request.prompt or "")
            messages = for_template(request.messages)
            return await self._service.prompt(Conversation(messages, request.tools, request.chat_template_kwargs))
        except PromptError as error:
            field = error.field or ("prompt" if request.messages is None else "messages")
            raise RequestError.of_prompt(error, field) from None
