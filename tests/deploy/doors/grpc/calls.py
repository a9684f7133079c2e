"""Requests that tests make, and waiting for what must come true."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb

BLOCK_SIZE = 16
PATIENCE_S = 60.0
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n"


def text(prompt: str = PROMPT, *, request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text=prompt), request_id=request_id, sampling=pb.SamplingParams(**sampling))


def ids(*tokens: int, **sampling: Any) -> pb.GenerateRequest:
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=tokens))
    return pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParams(**sampling))


def endless(request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    return text(request_id=request_id, max_tokens=1900, ignore_eos=True, **sampling)


async def consumed(stream: Any) -> list[pb.GenerateResponse]:
    """Every message; the status of a call comes after them, so a test that waits for an end must read."""
    return [part async for part in stream]


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            met = condition()
            if await met if inspect.isawaitable(met) else met:
                return
            await asyncio.sleep(0.01)


async def all_is_free(service: Service) -> None:
    """Waits until no request is under way and no block is held."""

    async def free() -> bool:
        engine = (await service.cluster.status()).engine
        assert engine is not None
        return service.under_way == 0 and all(group.held_blocks == 0 and group.running == 0 for group in engine.groups)

    await until(free)
