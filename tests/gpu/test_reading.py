"""Weights that are read onto a GPU are those in the file: as they are, converted, of columns, into parts of larger tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.gpu.works import GPU
from workers.model.checkpoint import stretches as module
from workers.model.checkpoint.stretches import StretchReader, Wanted, extents

pytestmark = GPU
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize("stored", DTYPES.values())
@pytest.mark.parametrize("kept", DTYPES.values())
def test_what_is_read_is_what_the_file_has(
    stored: torch.dtype, kept: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRETCH_BYTES", 1 << 16)  # many of them, in buffers that are used again and again
    whole = torch.randn(3, 257, 512).to(stored)
    save_file({"x": whole}, tmp_path / "x.safetensors")
    extent = extents(tmp_path / "x.safetensors", DTYPES)["x"]
    with StretchReader() as reader:
        for dim, start, size in ((0, 0, 3), (0, 1, 2), (1, 100, 57), (2, 128, 256), (2, 7, 5)):
            part = whole.narrow(dim, start, size).to(kept)
            for room in ("cuda", "cpu", "cuda"):  # of which a part on the host, as converters want it
                larger = torch.full((2, *part.shape), torch.nan, dtype=kept, device=room)
                strided = torch.full((*part.shape[:-1], 2 * part.shape[-1]), torch.nan, dtype=kept, device=room)
                narrow = strided[..., : part.shape[-1]]
                counted: list[int] = []
                reader.read([Wanted(each, extent, start, dim) for each in (larger[1], narrow)], counted.append)
                assert torch.equal(larger[1].cpu(), part)
                assert torch.equal(narrow.cpu(), part)
                assert sum(counted) == 2 * part.nbytes
                assert larger[0].isnan().all()
                assert strided[..., part.shape[-1] :].isnan().all()


def test_what_was_under_way_on_the_target_comes_first(tmp_path: Path) -> None:
    whole = torch.randn(2048, 2048)
    save_file({"x": whole}, tmp_path / "x.safetensors")
    extent = extents(tmp_path / "x.safetensors", DTYPES)["x"]
    target = torch.empty_like(whole, device="cuda")
    with StretchReader() as reader:
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # the device is busy for milliseconds before it clears the target
        target.zero_()
        reader.read([Wanted(target, extent, 0, 0)], lambda _: None)
    assert torch.equal(target.cpu(), whole)
