"""How much the core goes to and fro over what it is asked. Two ways:

    prompt   `submit` of one of which two blocks are cached, and 60 tokens computed by another sequence, with two groups
    block    one of a prompt that ends with its first token, in a group with host memory: `submit`, `report`, `moved`

Hops are counted in `scheduler/` (`benchmarks.shared.hops`). May import `kvcache` and `scheduler`; no torch, no ray.

    python -m benchmarks.scheduler.hops --trace
"""

import argparse

import numpy as np
import numpy.typing as npt

import scheduler
from benchmarks.shared.hops import Calls, report
from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Moved, Offload, Report, Start
from scheduler.protocol.messages import NO_TOKEN, FinishReason, Request
from scheduler.protocol.sampling import SamplingParams

BLOCK = 256
PART_TOKENS = 60
OWN_TOKENS = 100

Tokens = npt.NDArray[np.int32]


def _core(groups: int, host_blocks: int = 0) -> SchedulerCore:
    core = SchedulerCore(CoreConfig(block_size=BLOCK), Resolved(max_model_len=1 << 16))
    for group in range(groups):
        core.group_up(GroupId(group), 0, 64, 16, host_blocks=host_blocks)
    return core


def _request(stream: int, tokens: Tokens, max_tokens: int) -> Request:
    return Request(stream, tokens.tobytes(), b"", SamplingParams(max_tokens=max_tokens))


def _start(core: SchedulerCore) -> tuple[GroupId, Start]:
    ((group, start),) = (
        (group, command) for group, log in core.take_logs() for command in log.commands if isinstance(command, Start)
    )
    return group, start


def _report(core: SchedulerCore, group: GroupId, start: Start, computed: int, token: int) -> Report:
    """Of one step. A token is the last one."""
    leases, counts, tokens = np.array([start.lease]), np.array([computed], np.int32), np.array([token], np.int32)
    finished = () if token == NO_TOKEN else ((int(start.lease), int(FinishReason.LENGTH)),)
    number = core.groups[group].reports
    return Report(0, number, 1, 1, leases.tobytes(), counts.tobytes(), tokens.tobytes(), finished)


def prompt() -> Calls:
    """From its request to its `Start`."""
    random, core, calls = np.random.default_rng(0), _core(2), Calls(scheduler)
    common, part, own = (random.integers(0, 1000, size).astype(np.int32) for size in (2 * BLOCK, PART_TOKENS, OWN_TOKENS))
    core.submit(0, _request(0, np.append(common, own[:1]), 1))
    group, start = _start(core)
    core.report(group, _report(core, group, start, len(common) + 1, 1))
    core.submit(0, _request(1, np.concatenate([common, part, own[::-1]]), 16))
    group, start = _start(core)
    core.report(group, _report(core, group, start, len(part), NO_TOKEN))
    request = _request(2, np.concatenate([common, part, own]), 16)
    with calls.counted():
        core.submit(0, request)
    assert _start(core)[1].cached_tokens == len(common) + len(part), "no part of a block was shared"
    return calls


def block() -> Calls:
    """Reserved, filled, offloaded, released."""
    core, calls, group = _core(1, host_blocks=64), Calls(scheduler), GroupId(0)
    request = _request(0, np.arange(BLOCK + OWN_TOKENS, dtype=np.int32), 1)
    with calls.counted():
        core.submit(0, request)
    told = _report(core, group, _start(core)[1], BLOCK + OWN_TOKENS, 1)
    with calls.counted():
        core.report(group, told)
    (offload,) = (command for _, log in core.take_logs() for command in log.commands if isinstance(command, Offload))
    moved = Moved(0, offload.transfer, True, 0.01)
    with calls.counted():
        core.moved(group, moved)
    return calls


def main() -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="store_true", help="print each hop")
    report({"prompt": prompt(), "block": block()}, trace=parser.parse_args().trace)


if __name__ == "__main__":
    main()
