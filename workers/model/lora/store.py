"""Reads adapters beside the steps, in a thread of its own, one after another. Keeps no copy on the host: the files are in the
system's page cache, which bounds itself.

Imports torch and `slots`.
"""

import contextlib
import logging
import queue
import threading
from typing import NamedTuple

import torch

from scheduler.protocol.messages import Adapter
from workers.loop.adapters import AdapterRead, OnRead
from workers.model.lora.files import read_adapter
from workers.model.lora.slots import AdapterSlots

logger = logging.getLogger(__name__)


class _Asked(NamedTuple):
    load: int
    slot: int
    adapter: Adapter
    read: OnRead
    launched: torch.cuda.Event | None


class ReadingStore:
    """The `AdapterStore` of a rank."""

    def __init__(self, slots: AdapterSlots) -> None:
        self._slots = slots
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None  # one for all: torch has 32, which others want as well

    def begin(self, load: int, slot: int, adapter: Adapter, read: OnRead) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="manta-adapters", daemon=True)
            self._thread.start()
        launched = torch.cuda.current_stream().record_event() if self._slots.device.type == "cuda" else None
        self._asked.put(_Asked(load, slot, adapter, read, launched))

    def close(self) -> None:
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                self._fill(asked)
            except Exception as error:  # a file, its numbers, the device: its requests fail, and the others go on
                fault = None if isinstance(error, ValueError | OSError) else error  # of a file: its words say it all
                logger.error("the LoRA adapter %r cannot be read: %s", asked.adapter.name, error, exc_info=fault)
                asked.read(AdapterRead(asked.load, str(error) or type(error).__name__))
            else:
                asked.read(AdapterRead(asked.load))

    def _fill(self, asked: _Asked) -> None:
        """Errors: ValueError if its files have changed since its requests were taken, and whatever reading raises."""
        adapter, slots = asked.adapter, self._slots
        files = read_adapter(adapter.name, adapter.folder, slots.config, slots.room)
        if files.adapter.version != adapter.version:
            raise ValueError(f"the files in {adapter.folder} have changed since it was loaded: load it again")
        if asked.launched is None:
            slots.fill(asked.slot, files)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(slots.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_event(asked.launched)  # steps under way may still read what was there
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.device(slots.device))
            stack.enter_context(torch.cuda.stream(stream))
            slots.fill(asked.slot, files)
        stream.synchronize()
