"""Triton's interpreter, a little quicker: it patches the language anew at every call of a device function, 2 ms each time."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within, a device function that is called from a kernel uses what the kernel's launch has patched."""
    from triton.runtime import interpreter

    patch_lang: Callable[[Any], Any] = interpreter._patch_lang
    patched_for: set[frozenset[int]] = set()

    def patch(fn: Any) -> Any:
        modules = frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))
        if modules in patched_for:
            return None
        scope = patch_lang(fn)
        if not patched_for:  # a launch, which restores what it has patched
            restore = scope.restore

            def end() -> None:
                patched_for.clear()
                restore()

            scope.restore = end
        patched_for.add(modules)
        return scope

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch)
        yield
