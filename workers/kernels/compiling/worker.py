"""The program of the processes that compile kernels for a rank: one imports everything, forks as many as there are sockets, and
waits for them. Each of those compiles what it is told into Triton's cache until its socket ends.

Starts on its own, without ray or transformers, and never touches a device: the target is told. What a kernel is told by is here
as well, for both sides. The first has 280 MB; each of the others adds 50 of its own. Imports triton, and by name what kernels
are in.
"""

import gc
import importlib
import os
import pickle
import signal
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from workers.kernels.compiling import keys

keys.settle()

START_S, KERNEL_S = 300, 300
"""A process that takes longer than this for its imports, or for one kernel, is ended by the system's clock, which no lock of
Python's holds up: it outlives whoever has asked by no more than that."""


class Told(NamedTuple):
    """What a kernel is compiled from: as `triton.compile` and its `ASTSource` take it."""

    function: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    target: GPUTarget
    options: dict[str, Any]

    @property
    def source(self) -> ASTSource:
        kind = GluonASTSource if isinstance(self.function, GluonJITFunction) else ASTSource
        return kind(self.function, self.signature, self.constexprs, self.attrs)

    def dump(self) -> bytes:
        """Errors: whatever pickle raises for what cannot be told."""
        file = BytesIO()
        _Teller(file, pickle.HIGHEST_PROTOCOL).dump(tuple(self))
        return file.getvalue()

    @classmethod
    def load(cls, data: bytes) -> "Told":
        """Errors: ImportError, AttributeError, LookupError where a function is not found by its name."""
        return cls(*_Listener(BytesIO(data)).load())


class _Teller(pickle.Pickler):
    """Functions of Triton's, wherever they stand, are told by module and name."""

    def persistent_id(self, thing: Any) -> tuple[str, str] | None:
        return (thing.fn.__module__, thing.fn.__qualname__) if isinstance(thing, JITFunction) else None


class _Listener(pickle.Unpickler):
    def persistent_load(self, name: tuple[str, str]) -> Any:
        found: Any = importlib.import_module(name[0])
        for part in name[1].split("."):
            found = getattr(found, part)
        while not isinstance(found, JITFunction):  # what chooses among its settings stands around it
            found = found.fn
        return found


class _Target:
    """All of a driver that the compiler asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


def main(descriptors: Iterable[int], modules: Iterable[str]) -> None:
    """descriptors: a socket for each process. modules: imported before there are several, beside what each asks for later."""
    signal.alarm(START_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends whoever has asked, and so this
    for module in modules:
        importlib.import_module(module)
    from triton.runtime.cache import triton_key  # an older Triton, for which nobody starts this, has none there

    triton_key()  # reads all of Triton, once
    gc.freeze()  # a collection would write to every page that is shared
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it ends when all that it has forked have
    left = set(descriptors)
    for descriptor in list(left):
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for other in left - {descriptor}:
                os.close(other)
            try:
                _serve(Connection(descriptor))
            finally:
                os._exit(0)
        os.close(descriptor)
        left.remove(descriptor)
    signal.alarm(0)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)  # without the words that Triton has for what it leaves behind


def _serve(asked: Connection) -> None:
    """Answers each kernel by the error that it has met, in words; by nothing where it is in the cache now."""
    while True:
        try:
            message = asked.recv_bytes()
        except (EOFError, OSError):
            return
        signal.alarm(KERNEL_S)
        answer = _compile(message)
        signal.alarm(0)
        try:
            asked.send_bytes(answer.encode())
        except OSError:
            return


def _compile(message: bytes) -> str:
    try:
        told = Told.load(message)
        driver.set_active(_Target(told.target))
        compile(told.source, target=told.target, options=told.options)
    except Exception as error:  # whatever it is: who has asked compiles it himself
        return f"{type(error).__name__}: {error}"
    return ""
