"""In what form a rank keeps each linear layer's and each expert's weight: FP8, four bits or MXFP4 where a device has kernels
for it, else plain.

Imports torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from workers.model.config.quantization import Scheme, WeightForm

GROUPS = (32, 64, 128)
"""Columns that share a scale, of which the kernels take tiles."""

LEAST_COLUMNS = 16
"""Of which the library's FP8 products take multiples."""

IN_INTEGERS = "awq", "gptq", "packed"
"""Kinds of which those of four bits are kept."""

LEAST_SPAN = 64
"""Columns of which experts in integers of four bits have a multiple: a quarter of them is multiplied at a time."""

LEAST_CAPABILITY = (8, 9)
"""Of a GPU that has FP8."""


@dataclass(frozen=True, slots=True)
class LinearForm:
    """bits: 16 for the model's dtype, whatever it is; 8 for FP8; 4. group: columns that share a scale, None for all of them.
    scale: of the scales; float8_e8m0fnu: of MXFP4. rounded: in the model's dtype, but only numbers that FP8 has, with a scale
    for each row."""

    bits: int = 16
    group: int | None = None
    scale: torch.dtype = torch.float32
    rounded: bool = False


PLAIN = LinearForm()


class Forms:
    """Of one rank's linear layers and experts."""

    def __init__(self, scheme: Scheme | None, keeps: bool, is_stored: Callable[[str], bool] | None = None) -> None:
        """keeps: as `keeps_fewer_bits` says. is_stored: whether the checkpoint has that module quantised; None: as config.json
        says."""
        self._scheme, self._keeps = scheme, keeps
        self._is_stored = is_stored or (scheme.quantises if scheme is not None else lambda _: False)
        self._kept: set[str] = set()
        self._plain: set[str] = set()

    def of(self, parent: str, *names: str, columns: int) -> LinearForm:
        """Of the matrix that holds these modules' rows, or this rank's columns of one module."""
        if (form := self._of_all()) is not None:
            return form
        found = _single(self._stored(f"{parent}.{name}" for name in names))
        if found is None:
            return PLAIN
        form = kept_as(found, columns) if self._keeps else PLAIN
        (self._plain if form == PLAIN else self._kept).add(str(found))
        return form

    def of_experts(self, modules: Sequence[str], columns: int) -> LinearForm:
        """Of the matrices that hold these modules' rows, or this rank's columns of them: one for all experts of a layer."""
        if (form := self._of_all()) is not None:
            return form
        stored = self._stored(modules)
        found = _single(stored)
        form = kept_as(found, columns) if found is not None and self._keeps else PLAIN
        if found is not None and found.kind in IN_INTEGERS and columns % LEAST_SPAN:
            form = PLAIN
        said = self._plain if form == PLAIN else self._kept
        said |= {f"{each} of experts" for each in stored if each is not None}
        return form

    def _of_all(self) -> LinearForm | None:
        """Where it is the same for every matrix."""
        if self._scheme is None:
            return PLAIN
        if self._scheme.made:
            return LinearForm(8) if self._keeps else LinearForm(rounded=True)
        return None

    def _stored(self, modules: Iterable[str]) -> set[WeightForm | None]:
        """Every form that one of them is stored in; None: not quantised."""
        scheme = self._scheme
        assert scheme is not None, "else it is the same for all"
        return {scheme.form(module) if self._is_stored(module) else None for module in modules}

    def says(self) -> str:
        """What has become of the layers that were asked for, in words."""
        if self._scheme is None or self._scheme.made:
            return "kept as they are" if self._keeps else "kept as plain numbers"
        said = [f"{', '.join(sorted(self._kept))} kept as they are"] if self._kept else []
        said += [f"{', '.join(sorted(self._plain))} kept as plain numbers"] if self._plain else []
        return "; ".join(said) or "nothing of it in the layers"


def _single(stored: set[WeightForm | None]) -> WeightForm | None:
    """The form that all are in, if there is one."""
    return next(iter(stored)) if len(stored) == 1 else None


def keeps_fewer_bits(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def kept_as(stored: WeightForm, columns: int) -> LinearForm:
    """columns: of this rank's part, which begins at a multiple of so many. Errors: none; what no kernel takes is plain."""
    group = stored.block[1]
    if stored.mixed or (group is not None and (group not in GROUPS or columns % group)) or columns % LEAST_COLUMNS:
        return PLAIN
    if stored.kind == "fp8":
        return LinearForm(8, group)
    if stored.kind == "mxfp4":
        return LinearForm(4, group, torch.float8_e8m0fnu)
    if stored.bits == 4 and stored.kind in IN_INTEGERS and group is not None:
        return LinearForm(4, group, torch.float32 if stored.kind == "packed" else torch.float16)
    return PLAIN
