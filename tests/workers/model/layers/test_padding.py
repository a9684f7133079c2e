"""Widths of steps where oneDNN compiles a kernel for each, and that what is added changes nothing."""

import pytest
import torch

from workers.model.layers.padding import padded, padded_rows


def test_few_widths_and_little_padding() -> None:
    assert [padded_rows(rows) for rows in (1, 16, 17, 32, 33, 64, 65, 1000, 2048)] == [1, 16, 18, 32, 36, 64, 72, 1024, 2048]
    widths = [padded_rows(rows) for rows in range(1, 4097)]
    assert widths == sorted(widths)
    assert all(rows <= width <= rows * 9 / 8 for rows, width in enumerate(widths, start=1))
    assert len(set(widths)) == 16 + 8 * 8
    assert all(padded_rows(width) == width for width in widths)


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_zeros_behind(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    wide = padded(x, 5)
    assert wide[:3].equal(x)
    assert wide.shape == (5, *shape[1:])
    assert not wide[3:].any()
    assert padded(x, 3) is x
