"""How fast a rank's share of a checkpoint is read from warm files into memory that nobody has touched yet, or onto a GPU: as
Manta reads it, and slice by slice through memory maps, as safetensors gives them. By turns, each several times, without what
is done to weights afterwards.

    python -m benchmarks.models.loading                                   # a random 0.6B checkpoint, made once
    python -m benchmarks.models.loading --shape 8B --device cuda --threads 1,4,8,16
    python -m benchmarks.models.loading --checkpoint /models/Qwen3-8B --tensor-parallel-size 4 --dtype float32
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.options import positive
from workers.model.checkpoint.stretches import THREADS
from workers.model.checkpoint.weights import Checkpoint, ModelPart, Piece
from workers.model.config.architectures import ModelConfig, read_config, torch_dtype
from workers.model.decoders.native import EMBEDDING, HEAD, Decoder
from workers.parallel.silent import Silent


class Alone:
    """A part of which nothing is done but reading."""

    def __init__(self, part: ModelPart) -> None:
        self._part = part

    def pieces(self) -> list[Piece]:
        return self._part.pieces()

    def filled(self) -> None:
        """It stays as it was read."""


def main() -> None:
    options = argparse.ArgumentParser(description="Reading a checkpoint, by threads and through memory maps.")
    options.add_argument("--shape", choices=sorted(SHAPES), default="0.6B", help="of a random checkpoint (%(default)s)")
    options.add_argument("--checkpoint", type=Path, help="folder of another one, of a native architecture")
    options.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="bfloat16", help="of the weights in memory (%(default)s)")
    options.add_argument("--tensor-parallel-size", type=positive, default=1, help="ranks, of which one reads (%(default)s)")
    options.add_argument("--threads", default=str(THREADS), help="numbers of threads, apart by commas (%(default)s)")
    options.add_argument("--repeat", type=positive, default=5)
    chosen = options.parse_args()
    folder = chosen.checkpoint or ensure_checkpoint(chosen.shape, chosen.cache)
    config, device, dtype = read_config(folder), torch.device(chosen.device), torch_dtype(chosen.dtype)
    make = partial(parts_of, config, chosen.tensor_parallel_size, dtype, device)
    ways: dict[str, Callable[[Sequence[ModelPart]], None]] = {"maps": partial(through_maps, folder)}
    ways |= {f"{threads} threads": partial(by_threads, folder, int(threads)) for threads in chosen.threads.split(",")}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    through_maps(folder, make())  # warms the files, and the device
    for _ in range(chosen.repeat):
        for name, way in ways.items():
            took[name].append(timed(way, make, device))
    size = sum(piece.target.nbytes for part in make() for piece in part.pieces())
    print(f"{size / 1e9:.2f} GB of weights as {chosen.dtype} on {device}: a rank of {chosen.tensor_parallel_size}, warm files")
    for name, times in took.items():
        seconds, cpu_s = ([each[which] for each in times] for which in (0, 1))
        middle = statistics.median(seconds)
        print(
            f"{name:>12}  {size / middle / 1e9:6.2f} GB/s  median {middle:.3f} s, {min(seconds):.3f} to {max(seconds):.3f}; "
            f"of CPUs {statistics.median(cpu_s):.3f} s"
        )


def parts_of(config: ModelConfig, size: int, dtype: torch.dtype, device: torch.device) -> list[ModelPart]:
    """Of the first rank, empty."""
    tables = (EMBEDDING, EMBEDDING) if config.tied else (EMBEDDING, HEAD)
    return [Alone(part) for part in Decoder(config, Silent(size), None, dtype, device, 1, tables).parts()]


@torch.inference_mode()
def timed(
    way: Callable[[Sequence[ModelPart]], None], make: Callable[[], list[ModelPart]], device: torch.device
) -> tuple[float, float]:  # fmt: skip
    """Seconds, and those of all CPUs together, which tell more where others use them too."""
    gc.collect()
    parts = make()
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    way(parts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun_s, time.process_time() - begun_cpu_s


def by_threads(folder: Path, threads: int, parts: Sequence[ModelPart]) -> None:
    with Checkpoint(folder) as checkpoint:
        checkpoint.load(parts, threads=threads)


def through_maps(folder: Path, parts: Sequence[ModelPart]) -> None:
    """One slice after the other."""
    files: list[Any] = [safe_open(str(path), framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (a handle is no mapping)
    for piece in [piece for part in parts for piece in part.pieces() if piece.target.numel()]:
        view = file_of[piece.name].get_slice(piece.name)
        stop = piece.start + piece.target.shape[piece.dim]
        whole = piece.target.shape == piece.shape
        index = ... if whole else (*(slice(None),) * piece.dim, slice(piece.start, stop))
        assert isinstance(piece.target, torch.Tensor), "plain weights"
        piece.target.copy_(view[index])
    for file in files:
        file.__exit__(None, None, None)


if __name__ == "__main__":
    main()
