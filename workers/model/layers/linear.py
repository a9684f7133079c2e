"""Products with weights, each holding one rank's shard. Imports torch and the communicator's interface.

Weights are allocated empty, filled in place by `checkpoint.weights`, then `pack` reorders them for the CPU. Shapes beside
tensors are per rank.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.lora.weights import LoraWeights, StepAdapters
from workers.kernels.reduced import Reduced, Rounded
from workers.model.checkpoint.weights import Target
from workers.model.quantization.filling import Keeping, Rounding
from workers.model.quantization.forms import PLAIN, LinearForm
from workers.parallel.communicator import Communicator

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""As `torch.nn.functional.linear`."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN takes weights of this dtype in its own blocked layout.

    Measured on 2 Zen 5 cores: bf16 1.5-3x faster than `F.linear` at batch 1-32, equal at 1,024; float32 2.3-3x faster
    at every batch size. float64 and fp16 (unless the CPU has fp16 arithmetic) stay plain.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return False


def reduced_product(x: Tensor | Rounded, weight: Reduced, bias: Tensor | None) -> Tensor:
    """x [tokens, columns] -> [tokens, rows], of a weight that is kept in fewer bits."""
    if weight.values.device.type != "cuda":
        return F.linear(x if isinstance(x, Tensor) else x.numbers(x.dtype), weight.numbers(x.dtype), bias)
    from workers.kernels.products.many import product  # Triton comes with it

    return product(x, weight, bias)


class Linear:
    """`x @ weight.T + bias`; weight [out_features, in_features]. Column-parallel by holding a share of the rows.

    weight: None where it has been packed for a CPU, or is `reduced`: in fewer bits than the model's dtype. lora: adapters
    beside it; None: none are served.
    """

    __slots__ = ("_apply", "_joined", "_packed", "_rounded", "bias", "in_features", "lora", "out_features", "reduced", "weight")

    def __init__(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, bias: bool = False,
        form: LinearForm = PLAIN,
    ) -> None:  # fmt: skip
        """form: in which the weight is kept."""
        self.weight: Tensor | None = None
        self.reduced: Reduced | None = None
        self._rounded = form.rounded
        if form.bits == 16:
            self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        else:
            self.reduced = Reduced.empty(
                out_features, in_features, form.bits, form.group or in_features, form.scale, device
            )
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.out_features, self.in_features = out_features, in_features
        self.lora: LoraWeights | None = None
        self._joined: tuple[Tensor, Tensor | None] | None = None
        self._packed: Tensor | None = None
        self._apply = torch.ops.mkldnn._linear_pointwise.default if can_pack(dtype, device) else None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "Linear":
        """Over a filled weight, which may be part of a larger tensor."""
        linear = cls(0, weight.shape[1], weight.dtype, weight.device)
        linear.weight, linear.bias, linear.out_features = weight, bias, weight.shape[0]
        return linear

    def pack(self, keep_plain: bool = False) -> None:
        """Reorder the filled weight for the CPU and free the plain copy, unless someone else reads its rows. One in fewer bits
        finds out what its scales are."""
        if self.reduced is not None:
            self.reduced = self.reduced.filled()
        if self._apply is not None and self.weight is not None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            if not keep_plain:
                self.weight = None

    def shares(self, *rows: int) -> list[Target]:
        """The weight, as a checkpoint fills it: so many rows in each."""
        if self.reduced is not None:
            ends = list(accumulate(rows))
            return [Keeping(self.reduced.rows(end - count, end)) for end, count in zip(ends, rows, strict=True)]
        assert self.weight is not None, "packed"
        parts = self.weight.split_with_sizes(rows)
        return [Rounding(part) for part in parts] if self._rounded else list(parts)

    def adapt(self, lora: LoraWeights, behind: bool = False) -> None:
        """Adapters stand beside it from now on. behind: their A follow the weight's rows in memory where that is plain, so that
        one product reads both; whoever has the weight asks for it anew. For a moment it is there twice."""
        self.lora = lora
        if not behind or self.weight is None:
            return
        rows = self.out_features
        joined = torch.cat([self.weight, lora.a.flatten(0, 1)])
        self.weight, lora.a = joined[:rows], joined[rows:].view(lora.a.shape)
        bias = None if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(len(joined) - rows)])
        self._joined = joined, bias

    @property
    def operand(self) -> Tensor | Reduced:
        """What the kernels read: the weight as it was filled; not once it has been packed for a CPU."""
        found = self.weight if self.reduced is None else self.reduced
        assert found is not None, "packed"
        return found

    def __call__(self, x: Tensor | Rounded, adapters: StepAdapters | None = None) -> Tensor:
        """x [tokens, in_features], rounded where the product would do it (`many.rounds`) and no adapters are -> [tokens,
        out_features]. adapters: of the tokens; None: no token has one."""
        return self.partial(x, adapters)

    def partial(self, x: Tensor | Rounded, adapters: StepAdapters | None = None) -> Tensor:
        """What this rank adds to the sum over the ranks, where there is one; else all of it."""
        product = self._product(x)
        if adapters is not None and self.lora is not None:
            assert isinstance(x, Tensor), "adapters are multiplied by what has not been rounded"
            adapters.add(self.lora, product, x)
        return product

    def lowered(self, x: Tensor, multiply: Multiply = F.linear) -> tuple[Tensor, Tensor]:
        """x [tokens, in_features] -> what this rank adds to the sum but the adapters' part, [tokens, out_features], and what
        the A of all slots make of x, [tokens, slots * parts * rank]; rows of both may lie apart. multiply: by weight and A
        where they are one."""
        if self._joined is not None:
            both = multiply(x, *self._joined)
            return both[:, : self.out_features], both[:, self.out_features :]
        assert self.lora is not None
        return self._product(x), F.linear(x, self.lora.a.flatten(0, 1))

    def _product(self, x: Tensor | Rounded) -> Tensor:
        if self.reduced is not None:
            return reduced_product(x, self.reduced, self.bias)
        assert isinstance(x, Tensor), "plain weights are multiplied by plain numbers"
        if self._packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y: Tensor = self._apply(x, self._packed, self.bias, "none", [], "")  # type: ignore[misc]
        return y


class RowParallelLinear(Linear):
    """Each rank holds a share of the columns; the partial products are summed over ranks. Only rank 0 adds the bias."""

    __slots__ = ("_comm",)

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
        comm: Communicator,
        bias: bool = False,
        form: LinearForm = PLAIN,
    ) -> None:
        super().__init__(out_features, in_features, dtype, device, bias and comm.rank == 0, form)
        self._comm = comm

    def __call__(self, x: Tensor | Rounded, adapters: StepAdapters | None = None) -> Tensor:
        """x [tokens, this rank's in_features] -> [tokens, out_features], equal on all ranks"""
        return self._comm.all_reduce(self.partial(x, adapters))
