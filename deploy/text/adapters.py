"""The LoRA adapters beside one model, as a front end knows them: by name, each read and held against the checkpoint before a
prompt can ask for it.

Nobody behind a front end keeps this list: each prompt carries what its ranks must know. torch comes in for no native model.
"""

from collections.abc import Iterator
from pathlib import Path

from cluster.config import EngineConfig
from scheduler.protocol.messages import Adapter
from workers.config import MOST_NAME_CHARACTERS, is_adapter_name


class Adapters:
    """Of the model that `engine` serves; those that it names are loaded at once. From any thread. Errors: ValueError."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self._known: dict[str, Adapter] = {}
        for name, folder in engine.adapters.items():
            self.load(name, folder)

    def __iter__(self) -> Iterator[Adapter]:
        """By name."""
        return iter([self._known[name] for name in sorted(self._known)])

    def get(self, name: str) -> Adapter | None:
        return self._known.get(name)

    def load(self, name: str, folder: str | Path) -> Adapter:
        """From now on prompts may ask for it; those under way go on with what had the name before. Errors: ValueError for what
        cannot be served."""
        adapter = self.read(name, folder)
        self.put(adapter)
        return adapter

    def put(self, adapter: Adapter) -> None:
        """One that has been read."""
        self._known[adapter.name] = adapter

    def read(self, name: str, folder: str | Path) -> Adapter:
        """What the folder holds, if it can be served. Errors: ValueError."""
        from workers.model.lora.files import read_adapter
        from workers.model.reading import read_model

        engine = self._engine
        if not is_adapter_name(name):
            raise ValueError(f"{name!r} is no name for an adapter: take up to {MOST_NAME_CHARACTERS} printable characters")
        if not engine.lora_slots:
            raise ValueError("this model was started without room for LoRA adapters: say how many in max_loras")
        model = read_model(Path(engine.model), engine)
        return read_adapter(name, folder, model, engine.max_lora_rank).adapter

    def forget(self, name: str) -> Adapter | None:
        """No prompt finds it any more; those under way go on. None: there was none."""
        return self._known.pop(name, None)
