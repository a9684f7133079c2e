"""The LoRA adapters that were loaded at run time beside one model, as Ray's GCS has them written down: they outlive every
process of the application, and end with it. Imports ray.
"""

import msgspec
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from cluster.fleet.ownership.claim import NAMESPACE
from scheduler.protocol.messages import Adapter


class AdapterShelf:
    """namespace: of the application (`estate.namespace_of`)."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{namespace}/lora/"

    def read(self) -> dict[str, Adapter]:
        """By name."""
        found = (_internal_kv_get(key, namespace=NAMESPACE) for key in _internal_kv_list(self._prefix, namespace=NAMESPACE))
        adapters = (msgspec.json.decode(value, type=Adapter) for value in found if value is not None)
        return {adapter.name: adapter for adapter in adapters}

    def put(self, adapter: Adapter, *, over: bool) -> bool:
        """False: one of its name is there, and stays. over: then it goes. Of several at once that do not, one succeeds."""
        there = _internal_kv_put(self._key(adapter.name), msgspec.json.encode(adapter), overwrite=over, namespace=NAMESPACE)
        return over or not there

    def remove(self, name: str) -> None:
        _internal_kv_del(self._key(name), namespace=NAMESPACE)

    def clear(self) -> None:
        """The application has ended."""
        for key in _internal_kv_list(self._prefix, namespace=NAMESPACE):
            _internal_kv_del(key, namespace=NAMESPACE)

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"
