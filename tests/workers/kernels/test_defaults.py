"""What the interpreter and the newest compiler let pass, and the oldest supported one does not."""

import ast
from pathlib import Path

import workers
from tests.shared.sources import parsed


def test_no_kernel_has_defaults() -> None:
    """Triton 3.6, which is torch 2.11's, fails on the default of an inner function's `constexpr`."""
    found, kernels = [], 0
    for path in Path(workers.__file__).parent.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
                kernels += 1
                found += [f"{path.name}: {node.name}"] * bool(node.args.defaults or any(node.args.kw_defaults))
    assert kernels > 100
    assert found == []
