"""Every slice of every tensor, whatever its shape and type and wherever it goes, is what safetensors reads there."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from workers.model.checkpoint import stretches as module
from workers.model.checkpoint.stretches import Extent, StretchReader, Wanted, extents, stretches
from workers.model.checkpoint.weights import Checkpoint, Piece
from workers.model.config.fields import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}
SHAPES = [(), (7,), (5, 6), (1, 9), (9, 1), (4, 3, 5), (2, 3, 4, 2), (40, 33)]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Of all shapes and types, by name."""
    made = {}
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES.values():
            numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) % 251 + number
            made[f"{number}.{dtype}"] = numbers.to(dtype)
    return made


@pytest.fixture(scope="module")
def file(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stretches") / "model.safetensors"
    save_file({**tensors, "ids": torch.ones(3, dtype=torch.int32)}, path, metadata={"format": "pt"})
    return path


@pytest.fixture(params=[(64, 16), (16, 64), (1 << 20, 1 << 16)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a stretch and of a run, so small that all ways to cut are gone."""
    monkeypatch.setattr(module, "STRETCH_BYTES", request.param[0])
    monkeypatch.setattr(module, "RUN_BYTES", request.param[1])


@given(data=st.data())
def _every_slice(
    tensors: dict[str, torch.Tensor], found: dict[str, Extent], reader: StretchReader, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    whole = tensors[name]
    dim = data.draw(st.integers(0, max(0, whole.dim() - 1)))
    size = whole.shape[dim] if whole.dim() else 0
    start = data.draw(st.integers(0, size))
    part = whole.narrow(dim, start, data.draw(st.integers(0, size - start))) if whole.dim() else whole
    order = data.draw(st.permutations(range(part.dim())))  # of the dimensions in memory
    shape = (*(2 * part.shape[each] for each in order),)
    room = torch.full(shape, torch.nan, dtype=data.draw(st.sampled_from([*DTYPES.values()])))
    target = torch.permute(room, [order.index(each) for each in range(part.dim())])
    for each, length in enumerate(part.shape):  # a part of something larger, or all of it
        lies = data.draw(st.sampled_from(["all", "first", "last", "stepped"]))
        target = torch.empty_like(target.narrow(each, 0, length)) if lies == "all" else target
        target = target[(slice(None),) * each + (slice(None, None, 2),)] if lies == "stepped" else target
        target = target.narrow(each, target.shape[each] - length if lies == "last" else 0, length)
    counted: list[int] = []
    reader.read([Wanted(target, found[name], start, dim)], counted.append)
    assert torch.equal(target, part.to(target.dtype))
    assert sum(counted) == target.nbytes


@pytest.mark.usefixtures("sizes")
def test_every_slice(tensors: dict[str, torch.Tensor], file: Path) -> None:
    with StretchReader() as reader:
        _every_slice(tensors, extents(file, DTYPES), reader)


def test_what_is_stored_otherwise_has_no_extent(tensors: dict[str, torch.Tensor], file: Path) -> None:
    assert set(extents(file, DTYPES)) == set(tensors)
    assert set(extents(file, {"I32": torch.int32})) == {"ids"}


def test_no_stretch_is_larger_than_a_thread_may_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRETCH_BYTES", 512)
    monkeypatch.setattr(module, "RUN_BYTES", 64)
    extent = extents(file, DTYPES)["7.torch.float32"]
    targets = torch.empty(40, 33), torch.empty(10, 33), torch.empty(40, 5), torch.empty(40, 20)
    for target, dim in zip(targets, (0, 0, 1, 1), strict=True):
        cut = [*stretches(Wanted(target, extent, 3, dim) if target.shape != extent.shape else Wanted(target, extent, 0, 0))]
        assert max(each.read_bytes for each in cut) <= 512
        assert sum(each.target.numel() for each in cut) == target.numel()


def test_short_columns_are_read_with_their_rows_and_long_ones_alone(tmp_path: Path) -> None:
    extent = Extent(tmp_path / "x", 0, torch.float32, (8, 1 << 15))  # rows of 128 KiB
    short, long = (stretches(Wanted(torch.empty(8, size), extent, 64, 1)) for size in (64, 1 << 14))
    assert [(each.offset, each.width, each.column) for each in short] == [(0, 1 << 15, 64)]
    assert [(each.offset, each.width) for each in long] == [(row * (1 << 17) + 256, 1 << 14) for row in range(8)]


def test_a_file_that_ends_too_early_is_refused(tensors: dict[str, torch.Tensor], file: Path, tmp_path: Path) -> None:
    found = extents(file, DTYPES)
    last = max(found, key=lambda name: found[name].offset)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[: found[last].offset + 1])
    extent = extents(cut, DTYPES)[last]
    with StretchReader() as reader, pytest.raises(CheckpointError, match=r"cut\.safetensors ends before"):
        reader.read([Wanted(torch.empty_like(tensors[last]), extent, 0, 0)], lambda _: None)


def test_what_is_advised_is_what_will_be_read(file: Path) -> None:
    extent = extents(file, DTYPES)["7.torch.float32"]
    with StretchReader() as reader:
        reader.ahead([Wanted(torch.empty(10, 33), extent, 3, 0)])
        reader.ahead([Wanted(torch.empty(()), Extent(file, 8, torch.float32, ()), 0, 0)])


class Half(Checkpoint):
    """Some of whose tensors are made of what is read."""

    def _wanted(self, piece: Piece) -> Wanted | None:
        return super()._wanted(piece) if piece.name.endswith("bfloat16") else None


class Part:
    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self.was_filled = False

    def pieces(self) -> list[Piece]:
        return self._pieces

    def filled(self) -> None:
        self.was_filled = True


def test_what_is_made_of_slices_is_filled_beside_the_rest(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    pieces = [Piece(target, name, tuple(target.shape)) for name, target in targets.items()]
    parts = [Part(pieces[:7]), Part(pieces[7:])]
    told: list[tuple[int, int]] = []
    with Half(tmp_path) as checkpoint:
        checkpoint.load(parts, lambda done, total: told.append((done, total)))
    assert all(torch.equal(target, tensors[name]) for name, target in targets.items())
    assert [part.was_filled for part in parts] == [True, True]
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
