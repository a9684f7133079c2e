"""Triton's interpreter, more than twice as quick: it patches the language anew at every call of a device function, 2 ms each
time; computes for every sum of integers whether it overflows, for an assert that it then leaves out; and makes the type of
every result anew. And it rounds to FP8 as devices do: its own conversion loses what is carried into the exponent, and NaN.
"""

import dataclasses
import functools
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
    from triton.language import core
    from triton.runtime import interpreter

    patch_lang: Callable[[Any], Any] = interpreter._patch_lang
    patched_for: set[frozenset[int]] = set()

    @functools.cache
    def modules_of(fn: Any) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))

    def patch(fn: Any) -> Any:
        modules = modules_of(fn)
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
        builder = interpreter.interpreter_builder
        patched.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug))
        patched.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
        patched.setattr(core.tensor, "__init__", _sharing_shapes(core))
        patched.setattr(core.block_type, "__init__", _sharing_types(core.block_type))
        yield


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """find: makes a table of all types each time."""
    found: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return get


def _sharing_shapes(core: Any) -> Callable[[Any, Any, Any], None]:
    """`tensor.__init__`: of one shape all tensors have the same object, whose own type is dear."""

    @functools.cache
    def made(*shape: int) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(int(np.prod(shape)))

    def initialise(tensor: Any, handle: Any, kind: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.shape, tensor.numel = made(*kind.shape) if kind.is_block() else made()

    return initialise


def _sharing_types(block_type: Any) -> Callable[[Any, Any, Any], None]:
    """`block_type.__init__`: what has been said of an element's type and a shape once is said again."""
    initialise, said = block_type.__init__, dict[tuple[Any, ...], dict[str, Any]]()

    def say(kind: Any, element: Any, shape: Any) -> None:
        key = (element.name, *[getattr(size, "value", size) for size in shape])
        if key not in said:
            initialise(kind, element, shape)
            said[key] = dict(vars(kind))
        vars(kind).update(said[key], element_ty=element)

    return say


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
