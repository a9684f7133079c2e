"""The tiles of a step's chunks, found on the device: each so many query rows of one sequence. Where a step has few of them, the
keys that they see are cut into pieces, so that a short chunk at the end of a long context fills the multiprocessors too.

    tile     [sequence, its first token, that token's row in the query, keys before that row's sequence]
    piece    the same, then which of the tile's pieces, how many it has, where their partial results begin, and nothing

A sequence's last tile comes first: it sees the most keys, and long work should not begin last. What is past the last one has
sequence -1. Imports torch and triton. Runs on CUDA, or on a CPU under Triton's interpreter.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.attention.form import Reach
from workers.kernels.attention.spans import lowest_seen

TILE_FIELDS, PIECE_FIELDS = 4, 8
PLANNED_TILES = 64  # by one program of the plan
PLANNED_SEQUENCES = 64  # that it looks at together
MOST_CUT_TILES = 128  # of a step: one program cuts them


@dataclass(frozen=True, slots=True)
class Partials:
    """Of pieces, for all layers of a step, one after another. out: [places, rows, dim] float32, sums: [places, rows] float32,
    where a place is a piece of a KV head; counters: [places] int32, zero between layers."""

    out: Tensor
    sums: Tensor
    counters: Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """table: [tiles, TILE_FIELDS] int32, or [pieces, PIECE_FIELDS] where there are `partials`."""

    table: Tensor
    partials: Partials | None = None

    def __len__(self) -> int:
        return len(self.table)


@triton.jit
def _find(starts, contexts, tile, seqs, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Of tiles by their number: whether they exist, their sequence, first token, its row in the query, keys before the
    sequence's, and the sequence's tokens."""
    TILES: tl.constexpr = tile.shape[0]
    owner = tl.zeros([TILES], tl.int32)
    before = tl.zeros([TILES], tl.int32)
    planned = 0
    for first in range(0, seqs, SEQUENCES):
        seq = first + tl.arange(0, SEQUENCES)
        there = seq < seqs
        count = tl.load(starts + seq + 1, mask=there, other=0) - tl.load(starts + seq, mask=there, other=0)
        mine = tl.cdiv(count, TOKENS)
        past = ((planned + tl.cumsum(mine, 0))[None, :] <= tile[:, None]) & there[None, :]
        owner += tl.sum(past.to(tl.int32), 1)
        before += tl.sum(tl.where(past, mine[None, :], 0), 1)
        planned += tl.sum(mine, 0)
    exists = owner < seqs
    start = tl.load(starts + owner, mask=exists, other=0)
    count = tl.load(starts + owner + 1, mask=exists, other=0) - start
    context = tl.load(contexts + owner, mask=exists, other=0)
    first = (tl.cdiv(count, TOKENS) - 1 - (tile - before)) * TOKENS
    return exists, owner, first, start + first, context - count, count


@triton.jit(do_not_specialize=["seqs"])
def _plan(starts, contexts, tiles, seqs, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, TILES: tl.constexpr):
    """Each program finds TILES tiles; none waits for another."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    exists, owner, first, index, before, _ = _find(starts, contexts, tile, seqs, TOKENS, SEQUENCES)
    at = tiles + tile * 4
    tl.store(at, tl.where(exists, owner, -1))
    tl.store(at + 1, first)
    tl.store(at + 2, index)
    tl.store(at + 3, before)


@triton.jit(do_not_specialize=["seqs", "places", "shares"])
def _cut(starts, contexts, pieces_at, seqs, places, shares, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, TILES: tl.constexpr,
         KEYS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program: all tiles, in pieces of about equal length, `shares` or so of them. places: that there is room for."""
    tile = tl.arange(0, TILES)
    exists, owner, first, index, before, count = _find(starts, contexts, tile, seqs, TOKENS, SEQUENCES)
    spans = tl.cdiv(before + tl.minimum(first + TOKENS, count), KEYS)
    if WINDOW > 0 or CHUNK > 0:
        spans -= lowest_seen(tl.maximum(before + first, 0), WINDOW, CHUNK) // KEYS
    spans = tl.where(exists, spans, 0)
    share = tl.maximum(tl.cdiv(tl.sum(spans, 0), shares), LEAST)
    pieces = tl.cdiv(spans, share)
    start = tl.cumsum(pieces, 0) - pieces
    for piece in range(tl.max(pieces, 0)):
        there = piece < pieces
        at = pieces_at + (start + piece) * 8
        tl.store(at, owner, mask=there)
        tl.store(at + 1, first, mask=there)
        tl.store(at + 2, index, mask=there)
        tl.store(at + 3, before, mask=there)
        tl.store(at + 4, tile * 0 + piece, mask=there)
        tl.store(at + 5, pieces, mask=there)
        tl.store(at + 6, start, mask=there)
    for begin in range(tl.sum(pieces, 0), places, TILES):
        tl.store(pieces_at + (begin + tile) * 8, tile * 0 - 1, mask=begin + tile < places)


def find_tiles(query_starts: Tensor, context_lens: Tensor, tokens: int, *, tile_tokens: int) -> Tiles:
    """query_starts: [seqs + 1] int32; context_lens: [seqs] int32; tokens: at least those there. A captured plan follows what
    the tensors say when it is replayed."""
    seqs = len(context_lens)
    tiles = tokens // tile_tokens + seqs
    programs = triton.cdiv(tiles, PLANNED_TILES)
    table = torch.empty((programs * PLANNED_TILES, TILE_FIELDS), dtype=torch.int32, device=context_lens.device)
    _plan[(programs,)](
        query_starts, context_lens, table, seqs, TOKENS=tile_tokens, SEQUENCES=PLANNED_SEQUENCES, TILES=PLANNED_TILES
    )
    return Tiles(table[:tiles])


def cut_tiles(
    query_starts: Tensor, context_lens: Tensor, tokens: int, *, tile_tokens: int, rows: int, kv_heads: int, dim: int, keys: int,
    shares: int, least: int, reach: Reach,
) -> Tiles:  # fmt: skip
    """The same in pieces of `least` spans of `keys` or more. rows, dim: of a tile's partial results. shares: pieces wanted of
    all KV heads. reach: of the layers, of the farthest where they differ; then others have pieces in which nothing is."""
    seqs, device = len(context_lens), context_lens.device
    tiles, shares = tokens // tile_tokens + seqs, triton.cdiv(shares, kv_heads)
    assert tiles <= MOST_CUT_TILES
    places = tiles + shares
    table = torch.empty((places, PIECE_FIELDS), dtype=torch.int32, device=device)
    _cut[(1,)](
        query_starts, context_lens, table, seqs, places, shares, TOKENS=tile_tokens, SEQUENCES=PLANNED_SEQUENCES,
        TILES=MOST_CUT_TILES, KEYS=keys, LEAST=least, WINDOW=reach.window, CHUNK=reach.chunk,
    )  # fmt: skip
    return Tiles(
        table,
        Partials(
            torch.empty((places * kv_heads, rows, dim), dtype=torch.float32, device=device),
            torch.empty((places * kv_heads, rows), dtype=torch.float32, device=device),
            torch.zeros(places * kv_heads, dtype=torch.int32, device=device),
        ),
    )
