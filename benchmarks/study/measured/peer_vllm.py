r"""vLLM's own KV bookkeeping (`KVCacheManager`), timed in vLLM's interpreter: the same laps as `paging.table_laps`.

    VLLM_VENV/bin/python benchmarks/study/measured/peer_vllm.py \
        '{"block": 256, "pools": [1024], "tokens": 4096, "laps": 20, "batches": [64], "steps": 128}'

Imports the standard library and vLLM; nothing of Manta. Prints one JSON object as the last line.
"""
# mypy: ignore-errors

import gc
import json
import random
import statistics
import sys
import time
from importlib.util import find_spec

import torch
from vllm import SamplingParams
from vllm import __version__ as version
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

DRAW = random.Random(0)
ALGORITHM = "xxhash" if find_spec("xxhash") else "sha256"
HASH = get_hash_fn_by_name(ALGORITHM)
LONGEST = 1 << 20
ROUNDS = 5


def manager_of(block, blocks):
    spec = FullAttentionSpec(block_size=block, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, LONGEST, scheduler_block_size=block, hash_block_size=block)


def request_of(number, tokens, hasher):
    return Request(str(number), tokens, SamplingParams(max_tokens=1 << 16), None, block_hasher=hasher)


def admit(manager, request):
    blocks, cached, _ = manager.get_computed_blocks(request)
    given = manager.allocate_slots(request, request.num_tokens - cached, cached, blocks)
    assert given is not None
    request.num_computed_tokens = request.num_tokens
    return cached


def laps(block, pool, tokens, count):
    """Microseconds of CPU time: admitting and freeing a prompt that is new, in a pool full of cached blocks, or all cached."""
    manager, hasher, number = manager_of(block, pool), get_request_block_hasher(block, HASH), 0
    prompts = []
    for _ in range(pool * block // tokens + 1):
        prompts.append([DRAW.randrange(1 << 17) for _ in range(tokens)])
        request = request_of(number, prompts[-1], hasher)
        admit(manager, request)
        manager.free(request)
        number += 1
    times = {"hash": [], "cold": [], "hit": []}
    for _ in range(count):
        fresh = [DRAW.randrange(1 << 17) for _ in range(tokens)]
        old = prompts[-1 - DRAW.randrange(max(1, pool * block // tokens // 2))]
        for name, prompt in (("hit", old), ("cold", fresh)):
            number += 1
            begin = time.thread_time()
            request = request_of(number, prompt, hasher)
            hashed = time.thread_time()
            cached = admit(manager, request)
            manager.free(request)
            end = time.thread_time()
            assert (cached > tokens // 2) == (name == "hit"), (name, cached)
            times[name].append((end - hashed) * 1e6)
            times["hash"].append((hashed - begin) * 1e6)
        prompts.append(fresh)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def step(block, batch, steps):
    """Microseconds of CPU time: a slot for one more token of each sequence, `allocate_slots` alone, in the quietest round."""
    manager, hasher = manager_of(block, batch * (2 * block // block + 2048 // block + 2)), get_request_block_hasher(block, HASH)
    requests = [request_of(n, [DRAW.randrange(1 << 17) for _ in range(1 + n % (2 * block))], hasher) for n in range(batch)]
    for request in requests:
        admit(manager, request)
    times = []
    for _ in range(ROUNDS * steps):
        for request in requests:
            request.append_output_token_ids(7)
        begin = time.thread_time()
        for request in requests:
            given = manager.allocate_slots(request, 1)
        times.append((time.thread_time() - begin) * 1e6)
        assert given is not None
        for request in requests:
            request.num_computed_tokens += 1
    return round(min(statistics.mean(times[at : at + steps]) for at in range(0, len(times), steps)), 1)


def main():
    task = json.loads(sys.argv[1])
    init_none_hash(HASH)
    gc.freeze()
    result = {
        "version": version, "hash": ALGORITHM,
        "pools": {str(pool): laps(task["block"], pool, task["tokens"], task["laps"]) for pool in task["pools"]},
        "steps": {str(batch): step(task["block"], batch, task["steps"]) for batch in task["batches"]},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
