"""How fast KV blocks move between ranks and to host memory, and what a step loop loses while they do.

A transfer's rate counts from the command to the last `Moved`, both sides' threads included. The step loop is a real rank that
decodes; movements go to it as commands, the next one when the last is over. Rounds of all ways are interleaved.

    python -m benchmarks.engine.transfer --shape 0.1B --blocks 32 --threads 1      # CPU: in process, sockets, gloo, host tier
    python -m benchmarks.engine.transfer --shape 0.6B --blocks 64 --device cuda    # one GPU; two: NCCL, too

May import `kvcache`, `scheduler` and `workers`.
"""

import argparse
import json
import multiprocessing
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.report import Spread, table
from cluster.resolve import resolve
from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from scheduler.protocol.leaders import ROW_BITS, Command, LeaseId, Load, Moved, Movement, Offload, Receive, Send, Start
from scheduler.protocol.sampling import SamplingParams
from workers.config import WorkerConfig
from workers.loop.rank import Rank
from workers.moving.exchange import Exchange, LocalTransport
from workers.moving.mapped import DeviceMemory, MappedWire
from workers.moving.mover import BlockMover, Transport
from workers.moving.pairs import PairWire
from workers.moving.transport import SocketTransport, SocketWire, Wire
from workers.parallel.in_process import Solo
from workers.process.build import build_rank

TOKEN = "benchmark"
HERE, THERE = 0, 1
PROMPT_TOKENS = 200
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: MB/s and, in the second table, ms a step."""

    way: str
    mb_s: Spread
    step_ms: Spread | None = None


class Side:
    """A mover and what it says."""

    def __init__(self, pool: KVPool, host: KVPool | None, transport: Transport, group: int) -> None:
        self.pool = pool
        self.host = host
        self.transport = transport
        self.said: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self.mover = BlockMover(pool, host, transport, self.said.put, rank=0, epoch=0)
        self.group = group

    def wait(self) -> Moved:
        moved = self.said.get(timeout=PATIENCE_S)
        if not moved.ok:
            raise RuntimeError(f"a transfer failed: {moved.message}")
        return moved


def make_transport(kind: str, pool: KVPool, group: int) -> SocketTransport:
    wires: dict[str, Callable[[], Wire]] = {
        "sockets": SocketWire, "gloo": lambda: PairWire(pool.device), "NCCL": lambda: PairWire(pool.device),
        "mapped": lambda: MappedWire(PairWire(pool.device), DeviceMemory(pool.device)),
    }  # fmt: skip
    return SocketTransport(wires[kind](), host="127.0.0.1", token=TOKEN, group=group, epoch=0, rank=0)


def ids(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, np.int32).tobytes()


# ---- the other rank, in a process of its own


def serve_other(kind: str, layout: BlockLayout, blocks: int, device: str, pipe: Pipe) -> None:
    """Takes movements from the pipe until None comes; answers each when it is over."""
    torch.set_num_threads(1)
    pool = KVPool(layout, blocks, device)
    pool.data.zero_()
    side = Side(pool, None, make_transport(kind, pool, THERE), THERE)
    pipe.send(side.transport.address)
    while (movement := pipe.recv()) is not None:
        side.mover.take(movement)
        pipe.send(side.said.get(timeout=PATIENCE_S).ok)
    side.mover.close()


@contextmanager
def other_rank(kind: str, layout: BlockLayout, blocks: int, device: str) -> Iterator[tuple[Pipe, str]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_other, args=(kind, layout, blocks, device, theirs))
    process.start()
    try:
        yield ours, ours.recv()
        ours.send(None)
        process.join(PATIENCE_S)
    finally:
        process.terminate()


# ---- rates


def ways(layout: BlockLayout, blocks: int, device: str, stack: ExitStack) -> dict[str, Callable[[int], None]]:
    """Name -> one transfer of so many blocks, waited for. The argument is its number."""
    pool = KVPool(layout, blocks, device)
    pool.data.zero_()
    host = KVPool(layout, blocks, "cpu", pinned=device != "cpu")
    host.data.zero_()
    every = ids(range(blocks))
    exchange = Exchange()
    sides = [
        Side(one, host, LocalTransport(exchange, group=group, epoch=0, rank=0), group)
        for group, one in enumerate((pool, KVPool(layout, blocks, device)))
    ]
    sides[THERE].pool.data.zero_()
    for side in sides:
        stack.callback(side.mover.close)

    def in_process(number: int) -> None:
        sides[HERE].mover.take(Send(number, every, THERE, 0))
        sides[THERE].mover.take(Receive(number, every, HERE, 0, ("",)))
        sides[HERE].wait()
        sides[THERE].wait()

    def alone(movement: Movement) -> None:
        sides[HERE].mover.take(movement)
        sides[HERE].wait()

    result: dict[str, Callable[[int], None]] = {
        "in process": in_process,
        "to host memory": lambda number: alone(Offload(number, every, every)),
        "from host memory": lambda number: alone(Load(number, every, every)),
    }
    for kind in between_processes(device):
        side = Side(pool, None, make_transport(kind, pool, HERE), HERE)
        stack.callback(side.mover.close)
        pipe, _ = stack.enter_context(other_rank(kind, layout, blocks, other_device(device)))
        result[f"between processes, {kind}"] = partial(_between, side, pipe, every)
    return result


def between_processes(device: str) -> tuple[str, ...]:
    if device == "cpu":
        return ("sockets", "gloo")
    return ("mapped", "NCCL") if torch.cuda.device_count() > 1 else ("mapped",)


def other_device(device: str) -> str:
    """Of the other rank: a GPU of its own where there is one."""
    return device if device == "cpu" or torch.cuda.device_count() < 2 else "cuda:1"


def _between(side: Side, pipe: Pipe, blocks: bytes, number: int) -> None:
    side.mover.take(Send(number, blocks, THERE, 0))
    pipe.send(Receive(number, blocks, HERE, 0, (side.transport.address,)))
    side.wait()
    if not pipe.recv():
        raise RuntimeError("the receiver failed")


def measure_rates(layout: BlockLayout, blocks: int, device: str, rounds: int) -> list[Row]:
    with ExitStack() as stack:
        work = ways(layout, blocks, device, stack)
        rates: dict[str, list[float]] = {name: [] for name in work}
        for number in range(rounds + 1):  # the first warms up: connections, first touch
            for name, transfer in work.items():
                began_s = time.perf_counter()
                transfer(number)
                if number:
                    rates[name].append(blocks * layout.block_bytes / (time.perf_counter() - began_s) / 1e6)
        return [Row(name, Spread.of(values)) for name, values in rates.items()]


# ---- the step loop


class Loop:
    """A rank that decodes `--sequences` sequences for ever, its mover beside it."""

    def __init__(self, options: argparse.Namespace, layout: BlockLayout, kind: str) -> None:
        per_sequence = layout.blocks_for(options.max_model_len)
        self.first = options.sequences * per_sequence  # blocks from here on are moved
        self.options = options
        scratch = options.device != "cpu"  # a GPU's graphs have a block that nobody is granted
        config = WorkerConfig(
            model=str(ensure_checkpoint(options.shape, options.cache)), dtype=options.dtype, block_size=options.block_size,
            kv_memory=(self.first + options.blocks + scratch) * layout.block_bytes,
            host_kv_memory=options.blocks * layout.block_bytes,
            max_num_seqs=options.sequences + -(-options.blocks // per_sequence), max_model_len=options.max_model_len,
            report_steps=1,
        )  # fmt: skip
        built = build_rank(config, resolve(config, options.device, options.threads), Solo())
        assert built.sizes.blocks == self.first + options.blocks
        self.rank: Rank = built.rank
        self.side = Side(built.pool, built.host, make_transport(kind, built.pool, HERE), HERE)
        self.rank.mover = self.side.mover
        self.kind = kind
        self._serial = 0
        self._per_sequence = per_sequence

    def starts(self) -> list[Command]:
        """Begins all sequences anew."""
        self._serial += 1
        params = SamplingParams(max_tokens=self.options.max_model_len - PROMPT_TOKENS, temperature=0.0)
        return [
            Start(
                lease=LeaseId(self._serial * self.options.sequences + row << ROW_BITS | row),
                tokens=np.random.default_rng(row).integers(0, 500, PROMPT_TOKENS).astype(np.int32).tobytes(),
                prompt_tokens=PROMPT_TOKENS, cached_tokens=0, params=params, seed=row, choice=0, stop_ids=(),
                max_tokens=self.options.max_model_len - PROMPT_TOKENS,
                blocks=ids(range(row * self._per_sequence, (row + 1) * self._per_sequence)),
            )
            for row in range(self.options.sequences)
        ]  # fmt: skip

    def window(self, steps: int, begin: Callable[[], Movement | None], over: Callable[[], None]) -> tuple[list[float], int]:
        """(ms of each step, movements that ended) while there is always one under way."""
        for commands in (self.starts(), [], []):
            self.rank.turn(commands)
        times, ended, under_way = [], 0, False
        for _ in range(steps):
            began_s = time.perf_counter()
            commands = []
            if under_way and not self.side.said.empty():
                self.side.wait()
                over()
                ended, under_way = ended + 1, False
            if not under_way and (movement := begin()) is not None:
                commands, under_way = [movement], True
            self.rank.turn(commands)
            times.append((time.perf_counter() - began_s) * 1e3)
        if under_way:
            self.side.wait()
            over()
        return times, ended


def measure_steps(options: argparse.Namespace, layout: BlockLayout, kind: str) -> list[Row]:
    loop = Loop(options, layout, kind)
    moved, whole = ids(range(loop.first, loop.first + options.blocks)), ids(range(options.blocks))
    numbers = iter(range(10**9))
    with ExitStack() as stack:
        stack.callback(loop.rank.close)
        begins: dict[str, tuple[Callable[[], Movement | None], Callable[[], None]]] = {
            "quiet": (lambda: None, lambda: None),
            "to host memory": (lambda: Offload(next(numbers), moved, whole), lambda: None),
            "from host memory": (lambda: Load(next(numbers), whole, moved), lambda: None),
        }
        if options.device == "cpu" or torch.cuda.device_count() > 1:  # two processes take turns on one
            pipe, address = stack.enter_context(other_rank(loop.kind, layout, options.blocks, other_device(options.device)))

            def send() -> Movement:
                number = next(numbers)
                pipe.send(Receive(number, whole, HERE, 0, (loop.side.transport.address,)))
                return Send(number, moved, THERE, 0)

            def receive() -> Movement:
                number = next(numbers)
                pipe.send(Send(number, whole, HERE, 0))
                return Receive(number, moved, THERE, 0, (address,))

            begins[f"sending, {loop.kind}"] = (send, lambda: pipe.recv())
            begins[f"receiving, {loop.kind}"] = (receive, lambda: pipe.recv())
        times: dict[str, list[float]] = {name: [] for name in begins}
        rates: dict[str, list[float]] = {name: [] for name in begins}
        for number in range(options.rounds + 1):
            for name, (begin, over) in begins.items():
                step_ms, ended = loop.window(options.steps, begin, over)
                if number:
                    times[name].append(float(np.median(step_ms)))
                    rates[name].append(ended * options.blocks * layout.block_bytes / sum(step_ms) / 1e3)
        return [Row(name, Spread.of(rates[name]), Spread.of(times[name])) for name in begins]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.1B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=32, help="in each transfer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the rank that steps, on a CPU")
    parser.add_argument("--sequences", type=int, default=4, help="that decode while blocks move")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="in each window of the step loop; 0 leaves it out")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layout = BlockLayout(options.block_size, shape.layers, shape.kv_heads, shape.head_dim, options.dtype)
    print(f"{options.shape}, {options.dtype}, {options.blocks} blocks of {layout.block_bytes / 1e6:.3g} MB, {options.device}")
    rates = measure_rates(layout, options.blocks, options.device, options.rounds)
    print(table(["way", "MB/s"], [[row.way, str(row.mb_s)] for row in rates]))
    steps = measure_steps(options, layout, between_processes(options.device)[0]) if options.steps else []
    if steps:
        print(f"\n{options.sequences} sequences decode meanwhile, {options.threads} thread(s)")
        print(table(["meanwhile", "ms a step", "MB/s"], [[row.way, str(row.step_ms), str(row.mb_s)] for row in steps]))
    if options.json:
        print(json.dumps({"rates": [asdict(row) for row in rates], "steps": [asdict(row) for row in steps]}))


if __name__ == "__main__":
    main()
