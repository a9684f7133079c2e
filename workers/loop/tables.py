"""The block tables of a resident batch, for one kind of layer. NumPy only; imports nothing of Manta."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class BlockTables:
    """Of all rows: ids [rows, blocks] int32; past a row's blocks, and before its first: anything, never read. counts: [rows]
    blocks of each, those before `first` included: [rows] the first block that one of these layers still sees. edited: (row,
    first, end) of what has changed; whoever has read it empties it."""

    def __init__(self, rows: int, blocks: int) -> None:
        self.ids = np.zeros((rows, blocks), np.int32)
        self.counts = np.zeros(rows, np.int64)
        self.first = np.zeros(rows, np.int64)
        self.edited: list[tuple[int, int, int]] = []

    def begin(self, row: int, first: int, blocks: npt.NDArray[np.int32]) -> None:
        """A sequence comes: its blocks from `first` on."""
        self.first[row] = self.counts[row] = first
        self.append(row, blocks)

    def append(self, row: int, blocks: npt.NDArray[np.int32]) -> None:
        held = int(self.counts[row])
        self.ids[row, held : held + len(blocks)] = blocks
        self.edited.append((row, held, held + len(blocks)))
        self.counts[row] += len(blocks)

    def replace(self, row: int, index: int, block: int) -> None:
        self.ids[row, index] = block
        self.edited.append((row, index, index + 1))

    def clear(self, row: int) -> None:
        self.counts[row] = self.first[row] = 0

    def slots(self, rows: Ints, positions: Ints, block_size: int) -> Ints:
        """[n] where the KV of these positions of these rows goes: block * block_size + offset."""
        block, offset = np.divmod(positions, block_size)
        slots: Ints = self.ids[rows, block].astype(np.int64) * block_size + offset
        return slots
