"""Attention of every form over heads of every shape equals dense attention in float64, written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.layout import FP8, BlockLayout, KVScales
from kvcache.pool import KVPool
from tests.workers.attention.attention_reference import blocks_of, make_step
from tests.workers.attention.fp8_reference import SCALES, rounded
from workers.attention.cpu.plain import CpuAttention
from workers.attention.cpu.varied import VariedAttention
from workers.attention.forms import Form, HeadShape
from workers.step import StepInput

FORMS = {
    "plain": Form(0.25),
    "scaled": Form(0.7),
    "window": Form(0.25, window=20),
    "window-of-one": Form(0.25, window=1),
    "chunk": Form(0.25, chunk=24),
    "cap": Form(0.25, softcap=2.0),
    "sinks": Form(0.25, sinks=True),
    "all": Form(0.3, window=30, softcap=3.0, sinks=True),
}
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
SHAPES = {
    "usual": HeadShape(4, 2, 16, 16),
    "one-kv-head": HeadShape(4, 1, 16, 16),
    "narrow-values": HeadShape(4, 4, 24, 16),
    "narrow-keys": HeadShape(4, 2, 8, 24),
}
WIDEST = HeadShape(4, 4, 24, 24)
QUERIES, CONTEXTS = [1, 1, 1, 1, 17, 40, 3], [1, 16, 50, 300, 17, 75, 33]


def attend_densely(query: Tensor, keys: Tensor, values: Tensor, context: int, form: Form) -> Tensor:
    """One sequence, query by query: query [queries, heads, dim], keys and values [context, kv_heads, dim]."""
    group = query.shape[1] // keys.shape[1]
    out = torch.empty(*query.shape[:2], values.shape[2], dtype=query.dtype)
    for number in range(len(query)):
        position = context - len(query) + number
        lowest = 0 if form.window is None else max(0, position - form.window + 1)
        if form.chunk is not None:
            lowest = max(lowest, position // form.chunk * form.chunk)
        for head in range(query.shape[1]):
            scores = keys[lowest : position + 1, head // group] @ query[number, head] * form.scale
            if form.softcap is not None:
                scores = form.softcap * torch.tanh(scores / form.softcap)
            sink = SINKS[head : head + 1] if form.sinks else torch.empty(0, dtype=query.dtype)
            weights = torch.cat((scores, sink)).softmax(0)[: len(scores)]
            out[number, head] = weights @ values[lowest : position + 1, head // group]
    return out


def fill(pool: KVPool, step: StepInput, layer: int, states: list[tuple[Tensor, Tensor]], shape: HeadShape, block: int) -> None:
    """Earlier tokens' keys and values, in the slots of their sequences."""
    flat = pool.data.flatten(4)
    key_scale, value_scale = pool.scales(layer) or (1.0, 1.0)
    for table, (keys, values) in zip(step.host_block_tables, states, strict=True):
        for position in range(len(keys)):
            place = flat[int(table[position // block]), layer, :, position % block]
            place[0, : shape.kv_heads * shape.key_dim] = keys[position].flatten() / key_scale
            place[1, : shape.kv_heads * shape.value_dim] = values[position].flatten() / value_scale


@pytest.mark.few
@pytest.mark.parametrize("kept", ["float64", FP8])
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_dense_attention(form: Form, shape: HeadShape, block: int, kept: str) -> None:
    """kept: what the pool holds. Of FP8 the keys and values are such as it can hold."""
    step = make_step(QUERIES, CONTEXTS, block)
    shapes = [WIDEST, shape]
    layout = BlockLayout(block, 2, 1, WIDEST.width, kept)
    pool = KVPool(layout, blocks_of(step, block), "cpu", scales=KVScales((1.0, SCALES[0]), (1.0, SCALES[1])))
    pool.data.fill_(torch.nan)
    random = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, dtype=torch.float64)

    states = [(drawn(n, shape.kv_heads, shape.key_dim), drawn(n, shape.kv_heads, shape.value_dim)) for n in CONTEXTS]
    if kept == FP8:
        states = [(rounded(keys, SCALES[0]), rounded(values, SCALES[1])) for keys, values in states]
    earlier = [(k[: n - q], v[: n - q]) for (k, v), n, q in zip(states, CONTEXTS, QUERIES, strict=True)]
    fill(pool, step, 1, earlier, shape, block)
    queries = [drawn(q, shape.heads, shape.key_dim) for q in QUERIES]
    expected = [attend_densely(q, k, v, n, form) for q, (k, v), n in zip(queries, states, CONTEXTS, strict=True)]
    key = torch.cat([k[n - q :] for (k, _), n, q in zip(states, CONTEXTS, QUERIES, strict=True)])
    value = torch.cat([v[n - q :] for (_, v), n, q in zip(states, CONTEXTS, QUERIES, strict=True)])
    attention = VariedAttention(pool, shapes, [FORMS["plain"], form])
    sinks = SINKS if form.sinks else None
    out = attention.attend(1, torch.cat(queries), key, value, step, attention.plan(step), sinks)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_layers_of_the_pools_heads_go_to_the_usual_backend() -> None:
    """A layer of other heads beside them does not."""
    usual, other = SHAPES["usual"], SHAPES["one-kv-head"]
    step = make_step([1, 5], [40, 20], 16)
    calls = []

    class Usual(CpuAttention):
        def attend(self, layer: int, *rest: Any) -> Tensor:
            calls.append(layer)
            return super().attend(layer, *rest)

    states = [[torch.randn(6, heads, 16, dtype=torch.float64) for heads in (4, kv, kv)] for kv in (2, 1)]
    outs = []
    for beside in (True, False):
        pool = KVPool(BlockLayout(16, 2, 2, 16, "float64"), blocks_of(step, 16), "cpu")
        pool.data.zero_()
        forms = [FORMS["plain"], FORMS["window"]]
        attention = VariedAttention(pool, [usual, other], forms, Usual(pool, 4) if beside else None, usual)
        plan = attention.plan(step)
        outs += [attention.attend(layer, q, k, v, step, plan) for layer, (q, k, v) in enumerate(states)]
    assert calls == [0]
    for ours, theirs in zip(outs[:2], outs[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_within_drops_what_cannot_be_noticed() -> None:
    form = Form(1.0, window=64, chunk=128)
    assert form.within(64) == Form(1.0)
    assert form.within(65) == Form(1.0, window=64)
    assert form.within(129) == form
