"""Triton's interpreter, three times as quick: it patches the language anew at every call of a device function, 2 ms each time;
computes for every sum of integers whether it overflows, for an assert that it then leaves out; makes the type of every result
anew; and copies what meets a larger shape, which NumPy need not. And it rounds to FP8 as devices do: its own conversion loses
what is carried into the exponent, and NaN.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

NOTHING_TO_RESTORE = SimpleNamespace(restore=lambda: None)


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Within, the language is as the first launch has patched it: none takes that back."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch_lang: Callable[[Any], Any] = interpreter._patch_lang
    scopes = dict[frozenset[int], Any]()

    @functools.cache
    def modules_of(fn: Any) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if inspect.ismodule(value))

    def patch(fn: Any) -> Any:
        if (modules := modules_of(fn)) not in scopes:
            scopes[modules] = patch_lang(fn)
        return NOTHING_TO_RESTORE

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch)
        patched.setattr(interpreter, "_convert_float", _converting_fp8(interpreter._convert_float))
        builder = interpreter.interpreter_builder
        patched.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug))
        patched.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
        patched.setattr(core.tensor, "__init__", _sharing_shapes(core))
        patched.setattr(core.block_type, "__init__", _sharing_types(core))
        patched.setattr(core, "_unwrap_if_constexpr", _unwrapping(core))
        patched.setattr(interpreter.TensorHandle, "__init__", _unchecked)
        patched.setattr(interpreter, "_patch_attr", _patching(interpreter))
        join = _joining(core)
        patched.setattr(TritonSemantic, "broadcast_impl_value", _broadcasting(join))
        patched.setattr(TritonSemantic, "binary_op_type_checking_impl", _checking(core, join))
        yield
        for scope in reversed(scopes.values()):
            scope.restore()


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """find: makes a table of all types each time."""
    found: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return get


def _sharing_shapes(core: Any) -> Callable[[Any, Any, Any], None]:
    """`tensor.__init__`: of one type all tensors have the same shape, an object whose own type is dear."""
    block_type, of_scalars = core.block_type, (core.tuple([]), core.constexpr(1))

    def initialise(tensor: Any, handle: Any, kind: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
        tensor.shape, tensor.numel = kind.of_tensors if type(kind) is block_type else of_scalars

    return initialise


def _sharing_types(core: Any) -> Callable[[Any, Any, Any], None]:
    """`block_type.__init__`: what has been said of an element's type and a shape once is said again. Its `sizes` are the shape
    as Python compares it, its `of_tensors` the shape and number of elements that a tensor has."""
    initialise, said = core.block_type.__init__, dict[tuple[Any, ...], dict[str, Any]]()

    def say(kind: Any, element: Any, shape: Any) -> None:
        key = (element.name, *[getattr(size, "value", size) for size in getattr(shape, "values", shape)])
        if key not in said:
            initialise(kind, element, shape)
            kind.sizes = key[1:]
            kind.of_tensors = core.tuple([core.constexpr(size) for size in kind.sizes]), core.constexpr(kind.numel)
            said[key] = dict(vars(kind))
        vars(kind).update(said[key], element_ty=element)

    return say


def _unwrapping(core: Any) -> Callable[[Any], Any]:
    """`_unwrap_if_constexpr`: of most things their class says that they hold none."""
    unwrap, constexpr, plain = core._unwrap_if_constexpr, core.constexpr, {core.tensor, int, float, bool, str, type(None)}

    def unwrapped(given: Any) -> Any:
        kind = type(given)
        if kind in plain:
            return given
        return given.value if kind is constexpr else unwrap(given)

    return unwrapped


def _unchecked(handle: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    """`TensorHandle.__init__`, which looks whether numbers are as wide as their type, as those who make them do."""
    handle.data, handle.dtype, handle.attr = data, dtype, {} if attr is None else attr


def _patching(interpreter: Any) -> Callable[..., None]:
    """`_patch_attr`: what is called has the semantics, which need not be looked for among what it is given."""
    semantic = interpreter.interpreter_semantic

    def patch(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # what is wrapped only asks for semantics

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    return patch


def _joining(core: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The types of two tensors once they have one shape, by Triton's rules. Errors: ValueError for shapes that have none."""
    types = dict[tuple[str, tuple[int, ...]], Any]()

    @functools.cache
    def joint(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
        most = max(len(left), len(right))
        pairs = [(1,) * (most - len(sizes)) + sizes for sizes in (left, right)]
        if any(a != b and 1 not in (a, b) for a, b in zip(*pairs, strict=True)):
            raise ValueError(f"shapes {left} and {right} cannot be made compatible")
        return tuple(max(a, b) for a, b in zip(*pairs, strict=True))

    def block(element: Any, sizes: tuple[int, ...]) -> Any:
        if (element.name, sizes) not in types:
            types[element.name, sizes] = core.block_type(element, list(sizes))
        return types[element.name, sizes]

    def join(left: Any, right: Any) -> tuple[Any, Any]:
        sizes = [kind.sizes if type(kind) is core.block_type else () for kind in (left, right)]
        if sizes[0] == sizes[1]:
            return left, right
        both = joint(*sizes)
        return (
            left if sizes[0] == both else block(left.scalar, both),
            right if sizes[1] == both else block(right.scalar, both),
        )

    return join


def _broadcasting(join: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """`broadcast_impl_value`, of all axes at once."""

    def broadcast(semantic: Any, left: Any, right: Any) -> tuple[Any, Any]:
        of_left, of_right = join(left.type, right.type)
        return _of_type(semantic, left, of_left), _of_type(semantic, right, of_right)

    return broadcast


def _of_type(semantic: Any, tensor: Any, kind: Any) -> Any:
    if kind is tensor.type:
        return tensor
    if tensor.type.is_block():
        return semantic.make_tensor(semantic.builder.create_broadcast(tensor.handle, kind.sizes), kind)
    return semantic.make_tensor(semantic.builder.create_splat(kind, tensor.handle), kind)


def _checking(core: Any, join: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`binary_op_type_checking_impl`: whether two types go together, and as what, is asked once. Who is smaller gets the type
    of the joint shape alone: its numbers have that shape as soon as NumPy does something with both."""
    targets = dict[tuple[Any, ...], Any]()

    def check(semantic: Any, left: Any, right: Any, left_pointer: bool = False, right_pointer: bool = False,
              arithmetic_check: bool = True, div_or_mod: bool = False) -> tuple[Any, Any]:  # fmt: skip
        scalars = [type(operand) is not core.tensor for operand in (left, right)]
        kinds = [semantic.to_tensor_type(operand) if scalar else operand.dtype
                 for operand, scalar in zip((left, right), scalars, strict=True)]  # fmt: skip
        key = (kinds[0].name, kinds[1].name, *scalars, left_pointer, right_pointer, arithmetic_check, div_or_mod)
        if key not in targets:
            semantic.check_ptr_type_impl(kinds[0], kinds[1], left_pointer)
            semantic.check_ptr_type_impl(kinds[1], kinds[0], right_pointer)
            of_numbers = arithmetic_check and not kinds[0].is_ptr() and not kinds[1].is_ptr()
            targets[key] = of_numbers and semantic.computation_type_impl(kinds[0], scalars[0], kinds[1], scalars[1], div_or_mod)
        if target := targets[key]:
            if scalars[0] or kinds[0].name != target.name:
                left = semantic._cast_to_computation_type(left, target)
            if scalars[1] or kinds[1].name != target.name:
                right = semantic._cast_to_computation_type(right, target)
        else:
            left, right = semantic.to_tensor(left), semantic.to_tensor(right)
        of_left, of_right = join(left.type, right.type)
        return (
            left if of_left is left.type else semantic.make_tensor(left.handle, of_left),
            right if of_right is right.type else semantic.make_tensor(right.handle, of_right),
        )

    return check


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
