"""The models behind an endpoint beside its first: each with a service of its own, by the name that requests give. LoRA adapters
are such models as well, whichever model they are beside.

They come and go while requests run: whoever holds the endpoint puts them here, and every door looks here. Imports the service.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from deploy.config.serve import ServeConfig
from deploy.frontend.service.service import Service

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelState:
    """How a model beside the first is, served yet or not. phase: as in `ClusterStatus`; "failed": it does not come up as it is.
    reason: why it takes no requests, in words; None: it takes them."""

    id: str
    phase: str
    reason: str | None


class FurtherModel:
    """config: the endpoint's, with what is this model's own in it."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self.service = service
        self.config = config
        self._made: dict[Any, Any] = {}

    def once(self, make: "Callable[[FurtherModel], T]") -> T:
        """What `make` returns for this model, of which it is asked once; kept as long as the model is."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made

    @property
    def name(self) -> str:
        return self.service.model.name

    @property
    def is_adapter(self) -> bool:
        """It has the cluster of another."""
        return self.service.model.adapter is not None


class FurtherModels:
    """Belongs to the event loop of the services. models: by name."""

    def __init__(self) -> None:
        self.models: dict[str, FurtherModel] = {}

    def __iter__(self) -> Iterator[FurtherModel]:
        """Those with a cluster of their own, by name."""
        return iter([model for model in self.listed() if not model.is_adapter])

    def listed(self) -> list[FurtherModel]:
        """With the adapters, by name."""
        return [self.models[name] for name in sorted(self.models)]

    def get(self, name: str | None) -> FurtherModel | None:
        """None: that one is not here; the first model is not either."""
        return self.models.get(name) if name is not None else None

    def put(self, model: FurtherModel) -> None:
        """From now on newcomers are its; those of another one of this name go on where they are."""
        self.models[model.name] = model

    def remove(self, model: FurtherModel) -> None:
        """No newcomer finds it; what is under way goes on. Does nothing if another one has taken its place."""
        if self.models.get(model.name) is model:
            del self.models[model.name]
