"""How a rank's tensors are read from a checkpoint: as they lie there, expert by expert, or through a converter of transformers.

Imports torch, transformers and `checkpoint.weights`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from workers.model.checkpoint.weights import Checkpoint, ModelPart, Piece
from workers.model.config.fields import CheckpointError
from workers.model.transformers.sharding import ParameterShare
from workers.parallel.communicator import Communicator


@dataclass
class ParameterSource:
    """Where a parameter comes from. names: in the checkpoint, in the order in which they are merged, by pattern of the
    converter. converter: transformers' own; None: it is there under one name, as it is."""

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    converter: WeightConverter | None = None

    def only_name(self, parameter: str) -> str:
        """Errors: CheckpointError where there are several."""
        names = [name for names in self.names.values() for name in names]
        if len(names) > 1:
            raise CheckpointError(f"the checkpoint has {names[0]} and {names[1]}, both of which are {parameter}: take one out")
        return names[0]


@dataclass(frozen=True, slots=True)
class ShardTarget:
    """A rank's tensor: `share` of a parameter of that name and shape."""

    name: str
    tensor: Tensor
    share: ParameterShare
    shape: tuple[int, ...]

    def runs(self, comm: Communicator) -> Iterator[tuple[Tensor, int]]:
        """The rank's runs in dimension `share.dim`, and where each begins in the whole."""
        assert self.share.dim is not None
        at = 0
        for start, stop in self.share.runs(self.shape, comm.rank, comm.size):
            yield self.tensor.narrow(self.share.dim, at, stop - start), start
            at += stop - start

    def keep(self, whole: Tensor, comm: Communicator) -> None:
        """This rank's part of the whole parameter."""
        if tuple(whole.shape) != self.shape:
            raise CheckpointError(
                f"{self.name} has shape {list(whole.shape)} in the checkpoint but config.json asks for {list(self.shape)}: "
                f"one of the two is from another model; download both again"
            )
        if self.share.first and comm.rank:
            self.tensor.zero_()
        elif self.share.dim is None:
            self.tensor.copy_(whole)
        else:
            for part, start in self.runs(comm):
                part.copy_(whole.narrow(self.share.dim, start, part.shape[self.share.dim]))


class Plain:
    """Tensors of the checkpoint that are read as they lie there, each rank its part."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces

    def pieces(self) -> list[Piece]:
        return self._pieces

    def filled(self) -> None:
        """There is nothing to reorder."""


class Converted:
    """What a converter makes. Its sources are read whole, into memory that is touched only then and given back at once."""

    def __init__(
        self, config: Any, first: str, source: ParameterSource, targets: dict[str, ShardTarget], checkpoint: Checkpoint,
        comm: Communicator,
    ) -> None:  # fmt: skip
        """config: transformers' own. first: the first of the converter's targets. targets: of the whole model."""
        self._config, self._first, self._source, self._targets, self._comm = config, first, source, targets, comm
        kind = targets[first].tensor.dtype
        self._read = {
            pattern: [torch.empty(checkpoint.shape(name), dtype=kind) for name in names]
            for pattern, names in source.names.items()
        }

    def pieces(self) -> list[Piece]:
        return [
            Piece(tensor, name, tuple(tensor.shape))
            for pattern, names in self._source.names.items()
            for name, tensor in zip(names, self._read[pattern], strict=True)
        ]

    def filled(self) -> None:
        converter = self._source.converter
        assert converter is not None
        for pattern, tensors in self._read.items():
            converter.collected_tensors[pattern] = [partial(_itself, tensor) for tensor in tensors]
        self._read = {}
        made = converter.convert(self._first, model=_Whole(self._targets), config=self._config)
        for name, tensors in made.items():
            self._targets[name].keep(tensors[0] if isinstance(tensors, list) else tensors, self._comm)


class _Whole:
    """A model as converters look at it: what shape each whole parameter has."""

    def __init__(self, targets: dict[str, ShardTarget]) -> None:
        self._targets = targets

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._targets[name].shape, device="meta")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def parts_of(
    config: Any, sources: dict[str, ParameterSource], targets: dict[str, ShardTarget], checkpoint: Checkpoint,
    comm: Communicator,
) -> list[ModelPart]:  # fmt: skip
    """Errors: CheckpointError for a parameter that nothing is read into."""
    parts: list[ModelPart] = []
    made: set[str] = set()
    for name, source in sources.items():
        target, converter = targets[name], source.converter
        if converter is None:
            parts.append(Plain(_as_it_is(target, source.only_name(name), comm)))
            made.add(name)
        elif _merges(converter) and target.share.dim != 0 and target.share.packed in (1, len(source.names)):
            parts.append(Plain(_expert_by_expert(target, source, comm)))
            made.add(name)
        else:
            parts.append(Converted(config, name, source, targets, checkpoint, comm))
            made |= {name.replace(converter.target_patterns[0], each) for each in converter.target_patterns}
    missing = sorted(set(targets) - made)
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]} is missing from the checkpoint: config.json promises it, so one of the two is from another "
            f"model; download both again"
        )
    return parts


def _as_it_is(target: ShardTarget, name: str, comm: Communicator) -> list[Piece]:
    if target.share.first and comm.rank:
        target.tensor.zero_()
        return [Piece(target.tensor.new_empty(0), name, target.shape)]  # rank 0 alone has it
    if target.share.dim is None:
        return [Piece(target.tensor, name, target.shape)]
    return [Piece(part, name, target.shape, start, target.share.dim) for part, start in target.runs(comm)]


def _merges(converter: WeightConverter) -> bool:
    """Whether it stacks one matrix of each expert, or several such stacks beside each other, as nearly all families do."""
    kinds = [(type(each), each.dim) for each in converter.operations if isinstance(each, MergeModulelist | Concatenate)]
    stack, beside = (MergeModulelist, 0), (Concatenate, 1)
    all_known = len(kinds) == len(converter.operations) and len(converter.target_patterns) == 1
    return all_known and kinds in ([stack], [stack, beside])


def _expert_by_expert(target: ShardTarget, source: ParameterSource, comm: Communicator) -> list[Piece]:
    """target [experts, sum of rows, columns]; its sources [rows, columns], one for each expert and pattern."""
    assert source.converter is not None
    patterns = [pattern for pattern in source.converter.source_patterns if pattern in source.names]
    experts, rows, columns = target.shape
    shape, dim = (rows // len(patterns), columns), target.share.dim
    mine = target.tensor.shape[1] // len(patterns)
    part = -(-(shape[dim - 1] if dim is not None else 0) // comm.size)
    pieces = []
    for number, pattern in enumerate(patterns):
        if len(source.names[pattern]) != experts:
            raise CheckpointError(
                f"the checkpoint has {len(source.names[pattern])} experts for {target.name}, config.json asks for {experts}: "
                f"one of the two is from another model; download both again"
            )
        for expert, name in enumerate(source.names[pattern]):
            slot = target.tensor[expert, number * mine : (number + 1) * mine]
            pieces.append(Piece(slot, name, shape, comm.rank * part, 0 if dim is None else dim - 1))
    return pieces
