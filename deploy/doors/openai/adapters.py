"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, by vLLM's names and with its bodies: LoRA adapters come and go while
requests run. With a key that is an operator's. Imports fastapi.
"""

from typing import Protocol

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from deploy.config.serve import ServeConfig
from deploy.doors.admin import require_operator
from deploy.doors.openai.document import body_of
from deploy.doors.openai.exchanging import read_request
from deploy.doors.openai.requests.schemas import LoadAdapterRequest, UnloadAdapterRequest

RECORDS = LoadAdapterRequest, UnloadAdapterRequest
"""What the OpenAPI document refers to."""


class AdapterAdministration(Protocol):
    """Whoever serves an endpoint's models. beside: the model of the adapter, by its name; None: the first one. Errors of both:
    RequestError, NOT_FOUND for a model that is not there."""

    async def load_adapter(self, name: str, folder: str, beside: str | None, *, in_place: bool) -> None:
        """From now on it is a model of that name. in_place: also where another adapter has the name. Errors: RequestError
        CONFLICT where another has it, INVALID for one that cannot be served."""
        ...

    async def unload_adapter(self, name: str, beside: str | None) -> None:
        """It takes no newcomers from now on; requests under way go on."""
        ...


def adapter_routes(endpoint: AdapterAdministration, config: ServeConfig) -> APIRouter:
    router = APIRouter()
    refusals: dict[int | str, dict[str, str]] = {400: {}, 403: {}, 404: {}, 409: {}}

    @router.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadAdapterRequest), responses=refusals)
    async def load(request: Request) -> Response:
        """Serve a LoRA adapter as a model of its own name, beside the requests of the others."""
        require_operator(request)
        asked = await read_request(request, LoadAdapterRequest, config)
        in_place = asked.load_inplace or False
        await endpoint.load_adapter(asked.lora_name, asked.lora_path, asked.base_model_name, in_place=in_place)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadAdapterRequest), responses=refusals)
    async def unload(request: Request) -> Response:
        """Serve a LoRA adapter no longer; what is under way goes on."""
        require_operator(request)
        asked = await read_request(request, UnloadAdapterRequest, config)
        await endpoint.unload_adapter(asked.lora_name, asked.base_model_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router
