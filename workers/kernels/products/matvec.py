"""Products of a few tokens with a large matrix, bound by the matrix's bytes, fused with what stands around them.

`y = f(x) @ W.T`, where f may be an RMSNorm, and y may get a bias, become SwiGLU's product, or be added to the residual: with
it, a decode layer is six launches. `stream` is for a few tokens, `fewer_bits` for a few where W has fewer, `tiles` for more;
`fp8_tiles` for more of bfloat16 where W is in FP8: they are rounded to FP8 too, in a launch before; `four_bit_tiles` for any
with W in four bits. For the tiles a norm is a launch before, unless the product before has left it (`prenormed`).

No sum is added up by atomics: results do not change from run to run. A row's result depends on the kernel that took it
and, within one kernel, not on how many rows there are. Configurations are fixed by shape (`tilings`).

Imports torch and triton.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.launch import ALIGNED_BYTES, copies_tiles, fitting_stages, interpreted
from workers.kernels.products.fewer import fewer_bits
from workers.kernels.products.four_bits import four_bit_tiles, in_fours
from workers.kernels.products.fp8_tiles import fp8_tiles
from workers.kernels.products.prenormed import Prenormed
from workers.kernels.products.stream import stream
from workers.kernels.products.tiles import tiles
from workers.kernels.products.tilings import (
    FEWER_BITS_TOKENS,
    LEAST_TILE_TOKENS,
    MOST_TOKENS,
    SMALL_WEIGHT_BYTES,
    STREAM_TOKENS,
    Tiling,
    choose_ours,
)
from workers.kernels.products.widen import ONE
from workers.kernels.reduced import BLOCK, Reduced
from workers.kernels.rows.norm import rms_norm, rounded_norm
from workers.kernels.rows.rounding import rounded


def matvec(
    x: Tensor | Prenormed,
    weight: Tensor | Reduced,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | None = None,
    next_norm: Tensor | None = None,
    prenormed: Prenormed | None = None,
    pdl: bool = False,
    counters: Tensor | None = None,
    config: Tiling | None = None,
) -> Tensor:
    """x [tokens, K], up to MOST_TOKENS rows that may lie apart; weight [N, K], contiguous -> f(x) @ weight.T [tokens, N].
    Weights in fewer bits become numbers in registers: in float32, in `tiles` as x's dtype has them, in `four_bit_tiles` as they
    are. By these two f(x) is rounded to x's dtype; where the configuration says so, it is rounded to FP8, token by token in the
    groups of columns that W has.

    norm_weight [K]: f is the RMSNorm with `eps`; else f(x) is x, or where x is `Prenormed` the norm that it is of: for
    configurations that have tiles, not rounded. bias [N] is added to the product. residual [tokens, N]:
    the result is added to it in place, in float32 and rounded once, and it is what is returned. swiglu: `weight` is
    [2 * I, K], the gate first, and the result silu(gate) * up [tokens, I]. next_norm [N]: what the residual has become is left
    in `prenormed`, made for `config.blocks(N)` parts, too. counters: one for each tile of rows and tokens, int32 zeros, which
    stay zeros, for calls that follow one another; None where K is never split among programs. `config` replaces the fixed
    choice.

    Raises ValueError for more tokens, for too few counters, and for what cannot be at once.
    """
    ready = x if isinstance(x, Prenormed) else None
    x = x.values if isinstance(x, Prenormed) else x
    tokens, k = x.shape
    n = weight.shape[0] // 2 if swiglu else weight.shape[0]
    if tokens > MOST_TOKENS:
        raise ValueError(f"{tokens} tokens are more than the {MOST_TOKENS} that matvec serves: use torch's F.linear for them")
    if residual is not None and (swiglu or out is not None):
        raise ValueError("a residual is itself the output, and of a plain product: give neither `out` nor `swiglu` with it")
    target = residual if residual is not None else out
    if target is None:
        target = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not tokens:
        return target
    if config is None:
        bits = 16 if isinstance(weight, Tensor) else weight.bits
        config = choose_ours(n, k, tokens, x.dtype, swiglu, bits, split=counters is not None)
    if not config.tiled and (ready is not None or prenormed is not None):
        raise ValueError("a norm is left to, and by, products in 16-bit tiles alone")
    if (next_norm is None) != (prenormed is None) or (prenormed is not None and residual is None):
        raise ValueError("of a residual a norm is left: give `residual`, `next_norm` and `prenormed` together")
    pdl = pdl and not interpreted()
    if norm_weight is not None and config.tiled:
        x, norm_weight = rms_norm(x, norm_weight, eps, pdl=pdl), None
    launched = _Product(
        x, ready, norm_weight, eps, bias, target, residual is not None, swiglu, next_norm, prenormed, counters, config, pdl
    )  # fmt: skip
    match weight:
        case Reduced() if config.rounded:
            launched.fp8(weight)
        case Reduced() if config.parts == 0:
            launched.fewer_bits(weight)
        case Reduced() if weight.bits == 4:
            launched.four_bits(weight)
        case Tensor() if config.parts == 0:
            launched.stream(weight)
        case _:
            launched.tiles(weight)
    return target


@dataclass(frozen=True, slots=True)
class _Product:
    """A product as each kernel is launched for it. ready: what x is the values of. out: where it goes, or with `residual` is
    added to."""

    x: Tensor
    ready: Prenormed | None
    norm_weight: Tensor | None
    eps: float
    bias: Tensor | None
    out: Tensor
    residual: bool
    swiglu: bool
    next_norm: Tensor | None
    prenormed: Prenormed | None
    counters: Tensor | None
    config: Tiling
    pdl: bool

    def stream(self, weight: Tensor) -> None:
        tokens, out = len(self.x), self.out
        share = 1 if tokens == 1 else 2 if tokens == 2 else STREAM_TOKENS
        stream[(self._blocks * triton.cdiv(tokens, share),)](
            self.x, self._or_any(self.norm_weight), weight, self._or_any(self.bias), out, tokens, self.x.stride(0),
            weight.stride(0), out.stride(0), self.eps, TOKENS=share, STAGES=self.config.stages, NORM=self._normed,
            SMALL=weight.nbytes <= SMALL_WEIGHT_BYTES, **self._cut, **self._early,
        )  # fmt: skip

    def fewer_bits(self, weight: Reduced) -> None:
        tokens, out = len(self.x), self.out
        share, zeros = min(tokens, FEWER_BITS_TOKENS), weight.scales if weight.zeros is None else weight.zeros
        fewer_bits[(self._blocks * triton.cdiv(tokens, share),)](
            self.x, self._or_any(self.norm_weight), weight.values, self._or_any(self.bias), out, weight.scales, zeros, tokens,
            self.x.stride(0), out.stride(0), self.eps, ONE, TOKENS=share, SPAN=weight.span if weight.bits == 4 else 0,
            BITS=weight.bits, GROUP=_group(weight), NORM=self._normed, **self._cut, **self._early,
        )  # fmt: skip

    def tiles(self, weight: Tensor | Reduced) -> None:
        values, scales, bits, group = weight, self.x, 16, 0
        if isinstance(weight, Reduced):
            values, scales, bits, group = weight.values, weight.scales, weight.bits, _group(weight)
        assert isinstance(values, Tensor)
        tiles[(self._tiles * self.config.parts,)](
            self.x, values, *self._described(weight), self._or_any(self.bias), self.out, scales, *self._norms, *self._sums(),
            len(self.x), self.x.stride(0), values.stride(0), self.out.stride(0), self._eps, BITS=bits, GROUP=group, **self._cut,
            **self._split(bits), **self._left, **self._early,
        )  # fmt: skip

    def four_bits(self, weight: Reduced) -> None:
        assert weight.zeros is not None, "four bits have zero points"
        scales, zeros, fours = in_fours(weight.scales, weight.zeros, weight.group, weight.span)
        cut = self._cut | {"COLUMNS": min(self.config.columns, weight.span), "FOURS": fours}
        four_bit_tiles[(self._tiles * self.config.parts,)](
            self.x, weight.values, self._or_any(self.bias), self.out, scales, zeros, *self._norms, *self._sums(), len(self.x),
            self.x.stride(0), self.out.stride(0), self._eps, SPAN=weight.span, GROUP=weight.group, **cut, **self._split(4),
            **self._left, **self._early,
        )  # fmt: skip

    def fp8(self, weight: Reduced) -> None:
        n, rows, group = self.out.shape[1], self.config.rows, weight.group
        if self.norm_weight is None:
            near = rounded(self.x, group, pdl=self.pdl)
        else:
            near = rounded_norm(self.x, self.norm_weight, self.eps, group, pdl=self.pdl)
        cut = self._cut if weight.by_row else self._cut | {"COLUMNS": min(self.config.columns, group)}
        square = weight.blocks is not None and BLOCK % rows == 0 and n % rows == 0  # both halves' tiles lie in blocks
        fp8_tiles[(self._tiles * self.config.parts,)](
            near.values, near.scales, weight.values, weight.scales, self.out if self.bias is None else self.bias, self.out,
            *self._sums(), len(near), len(near.values), self.out.stride(0), GROUP=_group(weight), SQUARE=square,
            WIDE=interpreted(), **cut, **self._split(8), **self._early,
        )  # fmt: skip

    def _described(self, weight: Tensor | Reduced) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Of x and W in tiles, where the copy engine brings them: none where there is none, or rows lie where it cannot."""
        config = self.config
        if not config.described or isinstance(weight, Reduced) or not copies_tiles(self.x.device):
            return None, None
        if _strays(self.x) or _strays(weight):
            return None, None
        return (
            TensorDescriptor.from_tensor(self.x, [self._padded, config.columns]),
            TensorDescriptor.from_tensor(weight, [config.rows, config.columns]),
        )

    @property
    def _blocks(self) -> int:
        """Tiles of rows."""
        return self.config.blocks(self.out.shape[1])

    @property
    def _tiles(self) -> int:
        """Of rows and tokens."""
        return self._blocks * int(triton.cdiv(len(self.x), self._padded))

    @property
    def _cut(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        config = self.config
        return {
            "N": self.out.shape[1], "K": self.x.shape[1], "ROWS": config.rows, "COLUMNS": config.columns,
            "BIAS": self.bias is not None, "RESIDUAL": self.residual, "GATED": self.swiglu, "num_warps": config.warps,
        }  # fmt: skip

    def _split(self, bits: int) -> dict[str, int]:
        """What those of the tensor cores are, of W in so many bits."""
        config = self.config
        stages = fitting_stages(config.stages, config.stage_bytes(self._padded, bits, self.swiglu), self.x.device)
        return {"TOKENS": self._padded, "PARTS": config.parts, "STAGES": stages}

    @property
    def _left(self) -> dict[str, int]:
        """What those are that take up a norm, or leave one."""
        return {"SQUARES": self.ready.parts if self.ready is not None else 0, "NEXT": self.prenormed is not None}

    @property
    def _norms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums of squares of x, the next norm's weights, and where that one is left."""
        squares, left = self.x if self.ready is None else self.ready.squares, self.prenormed
        if left is None or self.next_norm is None:
            return squares, self.x, self.x, self.x
        return squares, self.next_norm, left.values, left.squares

    @property
    def _eps(self) -> float:
        return self.ready.eps if self.ready is not None else self.eps

    @property
    def _early(self) -> dict[str, bool]:
        return {"PDL": self.pdl, "launch_pdl": self.pdl}

    @property
    def _normed(self) -> bool:
        return self.norm_weight is not None

    @property
    def _padded(self) -> int:
        """Tokens of a program."""
        return min(self.config.tokens, max(LEAST_TILE_TOKENS, int(triton.next_power_of_2(len(self.x)))))

    def _or_any(self, tensor: Tensor | None) -> Tensor:
        """A pointer, where the kernel has a place for one and reads nothing there."""
        return self.x if tensor is None else tensor

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Where programs among which K is split leave their sums, and their counters."""
        config, counters = self.config, self.counters
        if config.parts == 1:
            return self.out, self.out if counters is None else counters
        if counters is None or len(counters) < self._tiles:
            raise ValueError(f"K is split among programs, which count themselves: give {self._tiles} counters")
        sums = self._tiles * config.parts * 2 * config.rows * self._padded
        return torch.empty(sums, dtype=torch.float32, device=counters.device), counters


def _strays(rows: Tensor) -> bool:
    """Whether some row begins elsewhere than at a multiple of 16 bytes, or has gaps."""
    return rows.stride(1) != 1 or bool(rows.data_ptr() % ALIGNED_BYTES or rows.stride(0) * rows.itemsize % ALIGNED_BYTES)


def _group(weight: Reduced) -> int:
    """Columns that share a scale, as the kernels are told: 0 where all of a row do."""
    return 0 if weight.by_row else weight.group
