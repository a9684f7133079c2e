"""Triton's interpreter, a little quicker: it patches the language anew at every call of a device function, 2 ms each time.
And it rounds to FP8 as devices do: its own conversion loses what is carried into the exponent, and NaN.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


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
        patched.setattr(interpreter, "_convert_float", _converting_fp8(interpreter._convert_float))
        yield


def _converting_fp8(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter's own conversion of bits, but torch's from and to float8_e4m3fn. What is too large for that becomes NaN:
    whether a cast stops at the largest number is left to each device, so kernels must not count on it."""

    def converted(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if "fp8e4nv" not in (source.name, target.name):
            return convert(given, source, target, rounding)
        numbers = torch.from_numpy(np.array(given)).view(TORCH_NAMES[source.name])
        if target.name == "fp8e4nv":
            numbers = numbers.float().masked_fill(numbers.float().abs() > TOO_LARGE, torch.nan)
        return numbers.to(TORCH_NAMES[target.name]).view(UNSIGNED[target.primitive_bitwidth]).numpy()

    return converted


TORCH_NAMES = {"fp8e4nv": torch.float8_e4m3fn, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOO_LARGE = 464.0
"""Half a step beyond float8_e4m3fn's largest number."""
UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
