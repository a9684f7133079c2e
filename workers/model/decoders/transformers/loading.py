"""A rank's shard of a checkpoint, into a model on the meta device, under the names that transformers' classes want.

transformers knows how each family's checkpoints are named and laid out (`conversion_mapping`): names are followed by its own
function. How the tensors themselves are read is in `pieces`. Imports torch, transformers and `checkpoint.weights`.
"""

import logging
import math
import re
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from workers.model.checkpoint.kv_scales import scale_names
from workers.model.checkpoint.weights import Checkpoint
from workers.model.config.fields import CheckpointError
from workers.model.decoders.transformers.pieces import ParameterSource, ShardTarget, parts_of
from workers.model.sources.progress import Progress
from workers.model.transformers.classes import BUILDING
from workers.model.transformers.sharding import ParameterShare, shares
from workers.parallel.communicator import Communicator

logger = logging.getLogger(__name__)

TEXT_PARTS = (r"\blanguage_model\.model\.", "model."), (r"\blanguage_model\.", ""), (r"\btext_model\.", "")
"""How the text part of a checkpoint that also sees is named, and how it is by itself."""

TEXT_NAMES = "language_model.", "text_model."


@torch.inference_mode()
def load(
    model: Any, found: dict[str, ParameterShare], checkpoint: Checkpoint, comm: Communicator, dtype: torch.dtype,
    device: torch.device, progress: Progress | None, part_of: str | None,
) -> None:  # fmt: skip
    """Fills the model, which is on the meta device, with this rank's shares of its parameters. part_of: the model type of the
    whole checkpoint, where the model is its text part. Errors: CheckpointError."""
    sources, spare = _sources(model, checkpoint, part_of)
    ties = _ties(model, checkpoint, sources, found, comm, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _allocate(model, found, ties, comm, dtype, device)
    tensors = dict(model.state_dict(keep_vars=True))
    targets = {name: ShardTarget(name, tensors[name], found[name], shapes[name]) for name in tensors if name not in ties}
    spare |= scale_names(checkpoint.names())
    checkpoint.load(parts_of(model.config, sources, targets, checkpoint, comm), progress, spare)
    _compute_the_rest(model, tensors, device)


# ---- names


def _sources(model: Any, checkpoint: Checkpoint, part_of: str | None) -> tuple[dict[str, ParameterSource], set[str]]:
    """By parameter, and the tensors of the checkpoint that are known not to be read. A converter with several targets is under
    the first of them."""
    wanted = dict(model.state_dict())
    own = get_model_conversion_mapping(model)
    whole = get_checkpoint_conversion_mapping(part_of) if part_of is not None else None
    converters = [each for each in [*(whole or []), *own] if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, ParameterSource] = {}
    spare: set[str] = set()
    part = next((part for part in TEXT_NAMES if any(part in name for name in checkpoint.names())), None)
    for name in sorted(checkpoint.names(), key=dot_natural_key):
        target, pattern = _renamed(name, own, model.base_model_prefix, wanted)
        if target not in wanted and whole:
            target, pattern = _renamed(name, whole, model.base_model_prefix, wanted)
        if target in wanted:
            source = sources.setdefault(target, ParameterSource())
            source.names[pattern or name].append(name)
            if pattern is not None and source.converter is None:
                source.converter = deepcopy(by_pattern[pattern])
        elif _known_spare(model, target, name, part):
            spare.add(name)
    return sources, spare


def _renamed(name: str, conversions: list[Any], prefix: str, wanted: dict[str, Tensor]) -> tuple[str, str | None]:
    """The parameter that a tensor of the checkpoint is for, and the pattern by which a converter wants it, if one does."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    names = [name, *(re.sub(part, alone, name) for part, alone in TEXT_PARTS)]
    for each in dict.fromkeys(names):
        target, pattern = rename_source_key(each, renamings, converters, prefix, wanted)
        if target in wanted:
            return target, pattern
        target, pattern = rename_source_key(each, [], [], prefix, wanted)
        if target in wanted:
            return target, pattern
    return name, None


def _known_spare(model: Any, target: str, name: str, part: str | None) -> bool:
    """Layers that predict further tokens, shared layers' own keys: what transformers leaves out; and what sees and hears.
    part: what the text part is called, where there are others."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if any(re.search(pattern, target) for pattern in ignored):
        return True
    return part is not None and part not in name and not name.startswith("lm_head.")


def _ties(
    model: Any, checkpoint: Checkpoint, sources: dict[str, ParameterSource], found: dict[str, ParameterShare],
    comm: Communicator, dtype: torch.dtype,
) -> dict[str, str]:  # fmt: skip
    """Names that are another's tensor. Of a tied pair a checkpoint may have either, or both: then they are one only if this
    rank's rows are equal, as in transformers."""
    ties = {}
    for one, other in model.all_tied_weights_keys.items():
        if one in sources and other in sources:
            mine, theirs = sources[one].only_name(one), sources[other].only_name(other)
            shape = checkpoint.shape(mine)
            start, stop = found[one].runs(shape, comm.rank, comm.size)[0] if found[one].dim == 0 else (0, shape[0])
            if not checkpoint.same_rows(mine, theirs, start, stop, dtype):
                logger.warning("config.json ties %s to %s, but the checkpoint's differ: both are used", one, other)
                continue
            del sources[one]
        elif one in sources:
            sources[other] = sources.pop(one)
        ties[one] = other
    return ties


# ---- memory


def _allocate(
    model: Any, found: dict[str, ParameterShare], ties: dict[str, str], comm: Communicator, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """A rank's parameters and the buffers that checkpoints have, empty."""
    kinds = _dtypes(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        held = found[name].shape(tuple(tensor.shape), comm.rank, comm.size)
        empty = torch.empty(held, dtype=kinds[name], device=device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = empty
        elif name not in ties:
            owner._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    for one, other in ties.items():
        module, _, leaf = one.rpartition(".")
        model.get_submodule(module)._parameters[leaf] = model.get_parameter(other)


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is kept in: some classes want some of theirs in float32."""
    exact = model._get_dtype_plan(dtype)
    kinds = {}
    for name, tensor in model.state_dict().items():
        usual = dtype if tensor.is_floating_point() else tensor.dtype
        kinds[name] = next((wide for part, wide in exact.items() if re.search(part, name)), usual)
    return kinds


def held_bytes(model: Any, size: int, dtype: torch.dtype) -> int:
    """Of a rank's weights, the largest of `size`; the model is on the meta device. Errors: CheckpointError."""
    found, kinds = shares(model, size), _dtypes(model, dtype)
    return sum(
        math.prod(found[name].shape(tuple(tensor.shape), 0, size)) * kinds[name].itemsize
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    )


def _compute_the_rest(model: Any, loaded: dict[str, Tensor], device: torch.device) -> None:
    """Buffers that follow from config.json: transformers' own initialisation, which leaves alone what was loaded."""
    for tensor in loaded.values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_non_persistent_buffers()):
        module, _, leaf = name.rpartition(".")
        empty = torch.full_like(buffer, torch.nan if buffer.is_floating_point() else 0, device=device)
        model.get_submodule(module)._buffers[leaf] = empty
    with BUILDING:
        model.initialize_weights()
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise CheckpointError(f"{type(model).__name__} has {name}, which neither config.json nor the checkpoint tells")
