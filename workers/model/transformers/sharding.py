"""A class's own tensor-parallel plan, carried out by our communicator: which part of each parameter a rank holds, and where the
ranks meet. Imports torch and the communicator's interface.

The plan names modules and parameters, layers as `*`, with a style each, as in transformers.distributed.tensor_parallel. There
parameters are DTensors over a mesh of torch's; here a rank's parameters are its parts, and modules that need their peers are
wrapped. The head's logits stay apart, one share of the vocabulary on each rank.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workers.model.config.fields import CheckpointError
from workers.parallel.communicator import Communicator

WHOLE = {
    "moe_tp_experts", "moe_identity_expert", "replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "local_params",
    "replicate",
}  # fmt: skip
"""Styles of modules whose own parameters every rank has whole."""

COLUMNS = {"colwise", "colwise_gather_output", "colwise_rep"}
ROWS = {"rowwise", "rowwise_split_input", "rowwise_rep"}
KNOWN = WHOLE | COLUMNS | ROWS | {"packed_colwise", "packed_rowwise", "embedding_rowwise"}

KEYS_AND_VALUES = re.compile(r"\.[kv]_proj\.(weight|bias)$")
"""Projections of which a rank has whole heads. Other names for them are refused where there are more ranks than heads."""


@dataclass(frozen=True, slots=True)
class ParameterShare:
    """A rank's part of a parameter: its own of `size` parts of dimension `dim`, of each of `packed` matrices that lie one after
    another there. dim None: all of it, or, with `first`, all of it on rank 0 and zeros elsewhere. kv_heads: there are fewer of
    them than ranks, and neighbours hold the same one."""

    dim: int | None = None
    packed: int = 1
    first: bool = False
    kv_heads: int | None = None

    def runs(self, shape: tuple[int, ...], rank: int, size: int) -> list[tuple[int, int]]:
        """[start, stop) in dimension `dim`, one for each packed matrix. The last ranks may have less."""
        assert self.dim is not None
        each = shape[self.dim] // self.packed
        if self.kv_heads is not None:
            rank, size = rank * self.kv_heads // size, self.kv_heads
        part = -(-each // size)
        start, stop = min(each, rank * part), min(each, (rank + 1) * part)
        return [(number * each + start, number * each + stop) for number in range(self.packed)]

    def shape(self, shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
        if self.dim is None:
            return shape
        held = sum(stop - start for start, stop in self.runs(shape, rank, size))
        return (*shape[: self.dim], held, *shape[self.dim + 1 :])


ALL = ParameterShare()


def shares(model: Any, size: int) -> dict[str, ParameterShare]:
    """By name, of every parameter and buffer that checkpoints have. Errors: CheckpointError where the plan, or the sizes, do
    not let so many ranks share the model."""
    if size == 1:
        return dict.fromkeys(model.state_dict(), ALL)
    plan = dict(model.tp_plan)
    if not any(name != "lm_head" for name in plan):
        raise CheckpointError(
            f"{type(model).__name__} has no tensor-parallel plan in transformers: choose tensor_parallel_size 1"
        )
    unknown = sorted(set(plan.values()) - KNOWN)
    if unknown:
        raise CheckpointError(
            f"{type(model).__name__}'s tensor-parallel plan has {', '.join(unknown)}, which is not computed: choose "
            f"tensor_parallel_size 1"
        )
    tables = {id(tensor) for module in _vocabulary(model) for tensor in module.parameters()}
    found = {}
    kv_heads = getattr(model.config, "num_key_value_heads", None) or size
    few = kv_heads if kv_heads < size and size % kv_heads == 0 else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        style = _style(name, plan)
        share = _share(name, tensor, style)
        if few is not None and style == "colwise" and KEYS_AND_VALUES.search(name):
            share = replace(share, kv_heads=few)
        parts = share.packed * (share.kv_heads or size)
        if share.dim is not None and id(tensor) not in tables and tensor.shape[share.dim] % parts:
            raise CheckpointError(
                f"tensor parallel size {size} does not divide the {tensor.shape[share.dim]} of {name} in "
                f"{type(model).__name__}: choose another tensor_parallel_size"
            )
        found[name] = share
    _keep_ties_whole(model, found)
    return found


def share_out(model: Any, found: dict[str, ParameterShare], comm: Communicator) -> None:
    """Wraps the modules in which the ranks of a group meet. The parameters may still be on the meta device."""
    if comm.size == 1:
        return
    plan = dict(model.tp_plan)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        style = plan.get(_generic(name))
        apart = module is head and style in COLUMNS
        wrap = None if style is None or apart else WRAPS.get(style)
        if wrap is not None and (style != "embedding_rowwise" or found[f"{name}.weight"].dim is not None):
            module.forward = wrap(module, module.forward, comm)


def head_is_shared(model: Any, found: dict[str, ParameterShare]) -> bool:
    """Whether each rank has its own part of the vocabulary's logits."""
    head = model.get_output_embeddings()
    return any(found[f"{name}.weight"].dim == 0 for name, module in model.named_modules() if module is head)


def _vocabulary(model: Any) -> list[nn.Module]:
    """The tables whose rows are tokens: these need not divide evenly."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return [*embeddings, *([head] if head is not None else [])]


def _keep_ties_whole(model: Any, found: dict[str, ParameterShare]) -> None:
    """Two names of one tensor that the plan divides differently, or of which it divides one: every rank has all of it."""
    for one, other in model.all_tied_weights_keys.items():
        if found.get(one) != found.get(other):
            found[one] = found[other] = ALL


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _style(name: str, plan: dict[str, str]) -> str | None:
    """A parameter's own, or its module's."""
    generic = _generic(name)
    return plan.get(generic, plan.get(generic.rpartition(".")[0]))


def _share(name: str, tensor: Tensor, style: str | None) -> ParameterShare:
    leaf, dims = name.rpartition(".")[2], tensor.dim()
    if style is None or style in WHOLE:
        return ALL
    if style in COLUMNS:
        return ParameterShare(max(0, dims - 2))
    if style in ROWS:
        return ParameterShare(first=True) if leaf == "bias" else ParameterShare(dims - 1)
    if style == "packed_colwise":
        return ParameterShare(max(0, dims - 2), packed=2)
    if style == "packed_rowwise":
        return ALL if dims == 1 else ParameterShare(dims - 1, packed=2)
    return ParameterShare(0)  # the embedding


# ---- where ranks meet

Forward = Callable[..., Any]


def _summed(_: nn.Module, forward: Forward, comm: Communicator) -> Forward:
    """Of partial products; rank 0 alone has the bias."""
    return lambda *args, **kwargs: comm.all_reduce(forward(*args, **kwargs))


def _split_and_summed(_: nn.Module, forward: Forward, comm: Communicator) -> Forward:
    """The input is whole on every rank, the weight has this rank's columns."""

    def shared(x: Tensor) -> Tensor:
        part = x.shape[-1] // comm.size
        return comm.all_reduce(forward(x.narrow(-1, comm.rank * part, part)))

    return shared


def _gathered(_: nn.Module, forward: Forward, comm: Communicator) -> Forward:
    """Every rank gets the whole output."""
    return lambda x: torch.cat(comm.all_gather(forward(x).contiguous()).unbind(), -1)


def _looked_up(module: nn.Module, forward: Forward, comm: Communicator) -> Forward:
    """Each rank has some rows of the table; a token is found by one of them, and all get it."""
    module.padding_idx = None  # type: ignore[assignment]  # says which row learns nothing; here it would have to be one of ours
    part = -(-module.num_embeddings // comm.size)  # type: ignore[operator]

    def shared(tokens: Tensor) -> Tensor:
        local = tokens - comm.rank * part
        elsewhere = (local < 0) | (local >= len(module.get_parameter("weight")))
        rows = forward(local.masked_fill(elsewhere, 0))
        return comm.all_reduce(rows.masked_fill(elsewhere[..., None], 0.0))

    return shared


def _divided(_: nn.Module, forward: Forward, comm: Communicator) -> Forward:
    """What every rank adds whole to a sum over the ranks."""
    return lambda x, *args, **kwargs: forward(x / comm.size, *args, **kwargs)


WRAPS: dict[str, Callable[[nn.Module, Forward, Communicator], Forward]] = {
    "rowwise": _summed,
    "rowwise_rep": _split_and_summed,
    "rowwise_split_input": _split_and_summed,
    "colwise_rep": _gathered,
    "colwise_gather_output": _gathered,
    "embedding_rowwise": _looked_up,
    "moe_tp_experts": _summed,
    "moe_identity_expert": _divided,
    "all_reduce": _summed,
}
