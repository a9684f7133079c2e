"""The LoRA adapters of one service, as models of its endpoint: every door finds them where it finds further models.

What is loaded at run time is written down on a shelf that all front ends of the endpoint read, and outlives each of them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Container
from functools import partial
from typing import Protocol, TypeVar

from cluster.config import EngineConfig
from deploy.config.serve import ServeConfig
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.service import Service
from deploy.text.adapters import Adapters, NameTaken
from scheduler.protocol.messages import Adapter

logger = logging.getLogger(__name__)

LOOK_S = 1.0

T = TypeVar("T")


class Shelf(Protocol):
    """The adapters of one model that were loaded at run time. Calls may wait for another process. Errors: whatever keeps it
    from answering."""

    def read(self) -> dict[str, Adapter]: ...

    def put(self, adapter: Adapter, *, over: bool) -> bool:
        """False: one of its name is there, and stays. over: then it goes. Of several at once that do not, one succeeds."""
        ...

    def remove(self, name: str) -> None: ...


class OwnShelf:
    """For an endpoint that is this process alone."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}

    def read(self) -> dict[str, Adapter]:
        return dict(self._adapters)

    def put(self, adapter: Adapter, *, over: bool) -> bool:
        if over:
            self._adapters[adapter.name] = adapter
            return True
        return self._adapters.setdefault(adapter.name, adapter) is adapter

    def remove(self, name: str) -> None:
        self._adapters.pop(name, None)


class ServedAdapters:
    """Belongs to the event loop of the service. limits: of the model. taken: a name that is another model's, listed or not.

    Those that `engine` names are there as long as the model is. Errors: ValueError if one of them cannot be served.
    """

    def __init__(
        self, service: Service, engine: EngineConfig, limits: ServeConfig, further: FurtherModels, shelf: Shelf
    ) -> None:  # fmt: skip
        self._service, self._limits, self._further, self._shelf = service, limits, further, shelf
        self._adapters = Adapters(engine, service.model.name)
        self._named = frozenset(engine.adapters)
        self._models: dict[str, FurtherModel] = {}
        self._refused: dict[str, Adapter] = {}  # as they stand on the shelf, and cannot be served
        self._opened = asyncio.Event()

    def open(self, before: "ServedAdapters | None" = None) -> None:
        """Those that are named take requests from now on, in place of those of another version, `before`. Errors: ValueError if
        another model has the name of one; nothing has changed then."""
        others = self._others() - (before._models.keys() if before is not None else set())
        for adapter in self._adapters:
            self._adapters.check_name(adapter.name, models=others)
        if before is not None:
            before.close()
        for adapter in self._adapters:
            self._serve(adapter)
        self._opened.set()

    def close(self) -> None:
        """No newcomer finds any of them."""
        for name in list(self._models):
            self._leave(name)

    async def load_adapter(self, name: str, folder: str, beside: str | None, *, in_place: bool) -> None:
        """For all front ends of the endpoint: here at once, elsewhere with their next look. in_place: another one of this name
        may be there; what is under way goes on with that. beside: this model, or None. Errors: RequestError."""
        self._check_changeable(name, beside)
        self._check_name(name, () if in_place else await self._ask(self._shelf.read))
        try:
            adapter = await asyncio.to_thread(self._adapters.read, name, folder)
        except (ValueError, OSError) as error:
            raise RequestError.invalid(str(error), "lora_path") from error
        if not await self._ask(partial(self._shelf.put, adapter, over=in_place)):
            self._check_name(name, (name,))  # another has taken it meanwhile
        self._put(adapter)

    async def unload_adapter(self, name: str, beside: str | None) -> None:
        """No newcomer finds it: here at once, elsewhere after the next look. What is under way goes on, and the folder must
        stay until that has ended. Errors: RequestError."""
        self._check_changeable(name, beside)
        if name not in await self._ask(self._shelf.read):
            raise RequestError(Fault.NOT_FOUND, f"there is no LoRA adapter {name!r} here: see /v1/models", param="lora_name")
        await self._ask(partial(self._shelf.remove, name))
        self._leave(name)

    async def run(self) -> None:
        """Follows the shelf until cancelled, once it is open."""
        await self._opened.wait()
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Serves what is on the shelf, and nothing else but what is named."""
        try:
            there = await asyncio.to_thread(self._shelf.read)
        except Exception as error:  # what is served goes on
            logger.warning("nobody says which LoRA adapters have been loaded: %s", error)
            return
        for name in [name for name in self._models if name not in there and name not in self._named]:
            self._leave(name)
        self._refused = {name: adapter for name, adapter in self._refused.items() if there.get(name) == adapter}
        for name, adapter in there.items():
            if self._adapters.get(name) != adapter and name not in self._refused and name not in self._named:
                await self._follow(adapter)

    async def _follow(self, adapter: Adapter) -> None:
        """Another front end has loaded it, perhaps when another checkpoint was served."""
        try:
            self._adapters.check_name(adapter.name, models=self._others())
            if await asyncio.to_thread(self._adapters.read, adapter.name, adapter.folder) != adapter:
                raise ValueError(f"the files in {adapter.folder} have changed since: load it again")
        except (ValueError, OSError) as error:
            logger.error("the LoRA adapter %r, which was loaded, cannot be served: %s", adapter.name, error)
            self._refused[adapter.name] = adapter
            self._leave(adapter.name)
            return
        self._put(adapter)

    def _put(self, adapter: Adapter) -> None:
        self._adapters.put(adapter)
        self._serve(adapter)
        logger.warning("the LoRA adapter %r is served, version %s", adapter.name, adapter.version)

    def _serve(self, adapter: Adapter) -> None:
        service = self._service.adapted(self._service.model.adapted(adapter, int(time.time())))
        self._models[adapter.name] = model = FurtherModel(service, self._limits)
        self._further.put(model)

    def _leave(self, name: str) -> None:
        self._adapters.forget(name)
        if (model := self._models.pop(name, None)) is not None:
            self._further.remove(model)
            logger.warning("the LoRA adapter %r is not served any more", name)

    def _others(self) -> set[str]:
        """Names of other models of the endpoint, adapters beside those included."""
        return {model.name for model in self._further.listed() if self._models.get(model.name) is not model}

    def _check_name(self, name: str, loaded: Container[str]) -> None:
        """Errors: RequestError."""
        try:
            self._adapters.check_name(name, loaded, self._others())
        except ValueError as error:
            fault = Fault.CONFLICT if isinstance(error, NameTaken) else Fault.INVALID
            raise RequestError(fault, str(error), param="lora_name") from error

    def _check_changeable(self, name: str, beside: str | None) -> None:
        """Errors: RequestError."""
        if beside not in (None, self._service.model.name):
            raise RequestError(Fault.NOT_FOUND, f"no model {beside!r} is served here: see /v1/models", param="base_model_name")
        if name in self._named:
            raise RequestError(
                Fault.CONFLICT, f"the LoRA adapter {name!r} is named in the configuration: change it there", param="lora_name"
            )

    async def _ask(self, shelf: Callable[[], T]) -> T:
        """Errors: RequestError UNAVAILABLE."""
        try:
            return await asyncio.to_thread(shelf)
        except Exception as error:
            raise RequestError(Fault.UNAVAILABLE, f"nobody keeps the list of LoRA adapters: {error}") from error
