"""Keys by which Triton finds what it has compiled, the same in every process.

A key is a hash of a kernel, of all that it calls, and of the constants that these use. Before Triton 3.9 a caller's has those
constants only where a callee's key happens to be known by then, in an order of addresses: who asks in another order has other
keys, and compiles anew what others have compiled. Imports triton.
"""

from typing import Any

import triton
from triton.runtime import jit

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def settle() -> None:
    """From now on. Before the first key is made."""
    if VERSION >= (3, 9) or hasattr(jit.DependenciesFinder, "settled"):
        return
    finder: Any = jit.DependenciesFinder
    finder.settled = True
    call, end = finder._update_hash, finder.ret.fget

    def called(self: Any, function: Any) -> None:
        function.cache_key  # noqa: B018  what it uses is known once that is
        call(self, function)

    def ended(self: Any) -> Any:
        self.used_global_vals = {
            (name, str(scope.get("__name__", id(scope)))): (value, scope)
            for (name, _), (value, scope) in self.used_global_vals.items()
        }
        return end(self)

    finder._update_hash, finder.ret = called, property(ended)
