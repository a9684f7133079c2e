"""The LoRA adapters beside one model, as a front end knows them: by name, each read and held against the checkpoint before a
prompt can ask for it.

Nobody behind a front end keeps this list: each prompt carries what its ranks must know. torch comes in for no native model.
"""

from collections.abc import Container, Iterator
from pathlib import Path

from cluster.config import EngineConfig
from scheduler.protocol.messages import Adapter
from workers.config import MOST_NAME_CHARACTERS, is_adapter_name


class NameTaken(ValueError):
    """Another model or adapter has the name."""


class Adapters:
    """Of the model that `engine` serves; those that it names are loaded at once. From any thread. model: what that one is
    called: no adapter has its name. Errors: ValueError."""

    def __init__(self, engine: EngineConfig, model: str) -> None:
        self._engine, self._model = engine, model
        self._known: dict[str, Adapter] = {}
        for name, folder in engine.adapters.items():
            self.load(name, folder)

    def __iter__(self) -> Iterator[Adapter]:
        """By name."""
        return iter([self._known[name] for name in sorted(self._known)])

    def get(self, name: str) -> Adapter | None:
        return self._known.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def load(self, name: str, folder: str | Path, *, in_place: bool = False) -> Adapter:
        """From now on prompts may ask for it; those under way go on with what had the name before. Errors: NameTaken, also by
        another adapter where it is not to be replaced `in_place`; ValueError for what cannot be served."""
        self.check_name(name, () if in_place else self)
        adapter = self.read(name, folder)
        self.put(adapter)
        return adapter

    def put(self, adapter: Adapter) -> None:
        """One that has been read."""
        self._known[adapter.name] = adapter

    def read(self, name: str, folder: str | Path) -> Adapter:
        """What the folder holds, if it can be served. The name has been checked. Errors: ValueError."""
        from workers.model.lora.files import read_adapter
        from workers.model.reading import read_model

        engine = self._engine
        if not engine.lora_slots:
            raise ValueError("this model was started without room for LoRA adapters: say how many in max_loras")
        model = read_model(Path(engine.model), engine)
        if not isinstance(folder, str | Path):
            raise ValueError(f"folder must be a path, not {type(folder).__name__}")
        return read_adapter(name, folder, model, engine.lora_room).adapter

    def check_name(self, name: str, loaded: Container[str] = (), models: Container[str] = ()) -> None:
        """loaded: names of adapters that stay. models: of other models than its own. Errors: ValueError for what is no name,
        NameTaken."""
        if not is_adapter_name(name):
            raise ValueError(f"{name!r} is no name for an adapter: take up to {MOST_NAME_CHARACTERS} printable characters")
        if name == self._model or name in models:
            raise NameTaken(f"there is a model {name!r} already: choose another name for the LoRA adapter")
        if name in loaded:
            raise NameTaken(f"the LoRA adapter {name!r} is loaded already: unload it first, or say load_inplace")

    def forget(self, name: str) -> Adapter | None:
        """No prompt finds it any more; those under way go on. None: there was none."""
        return self._known.pop(name, None) if isinstance(name, str) else None
