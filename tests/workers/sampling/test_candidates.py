"""The order that all choices follow: value descending, then id ascending."""

import numpy as np
import pytest
import torch

from workers.sampling import candidates


def test_compact_drops_exactly_what_lies_below_the_floor() -> None:
    values = torch.tensor([[1.0, 9.0, 2.0, 8.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    kept, ids = candidates.compact(values, torch.tensor([[8.0], [5.0]]), 100)
    assert kept.tolist() == [[9.0, 8.0], [7.0, -torch.inf]]
    assert ids[0].tolist() == [101, 103]
    assert ids[1, 0] == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 50, 700])
@pytest.mark.parametrize("width", [700, 5_003])
def test_top_orders_by_value_then_id(width: int, count: int, dtype: torch.dtype) -> None:
    values = np.round(np.random.default_rng(0).normal(size=(6, width)) * 2.5)
    values[0] = 0.0
    values[1, ::2] = -0.0
    values[2, 10:] = -np.inf
    order = np.stack([np.lexsort((np.arange(width), -row)) for row in values])[:, :count]
    ranked, columns = candidates.top(torch.from_numpy(values).to(dtype), count)
    assert columns.tolist() == order.tolist()
    assert ranked.tolist() == np.take_along_axis(values, order, 1).tolist()
