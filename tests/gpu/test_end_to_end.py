"""The whole engine on a GPU, its groups in a process of their own: it says what transformers says, and what a CPU says."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.local.engine import LocalEngine
from cluster.local.process import ProcessGroups
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from tests.end_to_end.agreement.settings import SMALL_POOL_TOKENS, Setting
from tests.end_to_end.agreement.turns import turns
from tests.end_to_end.engines import LARGE_POOL_TOKENS, LLAMA, MISTRAL, QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.prompts import OUTPUTS, PROMPTS, draw, sampling
from tests.end_to_end.reference import Ledger, Reference, embeddings
from tests.end_to_end.waiting import wait_idle
from tests.gpu.works import DEVICE, GPU
from tests.shared.checkpoints import LLAMA3_ROPE, make_checkpoint

pytestmark = GPU

LENGTHS = [2 * count for count in OUTPUTS]
PARAMS = [greedy(count) for count in LENGTHS]
SAMPLING = sampling(times=2)
ROWS = 12
LENGTH = 8192  # more than can be said before a process is killed
SCRATCH = 1
"""A block that padding writes to, out of the memory for blocks."""
TABLE: list[tuple[Setting, dict[str, Any]]] = [
    (Setting(LLAMA, 33, block=16, caching=True, small=True), {}),
    (Setting(QWEN3, 2048, block=16, caching=True, small=True), {"cuda_graphs": False}),
    (Setting(MISTRAL, 2048, block=256, caching=False, small=False), {"kv_memory": None}),
]
"""Pools in which sequences are preempted and prefixes are hit, with graphs and without; and one that measures its memory."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    extra: dict[str, dict[str, Any]] = {LLAMA: {"rope_parameters": LLAMA3_ROPE}}
    return {
        name: make_checkpoint(
            folder / name, name, seed=seed, head_dim=64, max_position_embeddings=LENGTH, **extra.get(name, {})
        )
        for seed, name in enumerate((LLAMA, MISTRAL, QWEN3))
    }


@pytest.fixture(scope="module")
def sampled_on_cpu(checkpoints: dict[str, Path]) -> dict[str, list[RequestOutput]]:
    outputs = {}
    for name, path in checkpoints.items():
        with open_llm(path, block=256, device="cpu", max_num_batched_tokens=8192) as llm:
            outputs[name] = run(llm, PROMPTS, SAMPLING)
    return outputs


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("budget", [33, 2048])
def test_embeddings_are_those_of_transformers(pooling: str, budget: int, checkpoints: dict[str, Path]) -> None:
    """In chunks, beside sequences that decode by graphs, with hits and without; theirs are the right tokens."""
    path, reference, ledger = checkpoints[QWEN3], Reference(checkpoints[QWEN3]), Ledger()
    wanted = embeddings(path, PROMPTS, pooling)
    with open_llm(path, block=16, device=DEVICE, pooling=pooling, max_num_batched_tokens=budget) as llm:
        generated: list[list[list[int]]] = []
        thread = threading.Thread(target=lambda: generated.extend(tokens(run(llm, PROMPTS, PARAMS))))
        thread.start()
        for _ in range(3):
            found = np.array([output.outputs.embedding for output in llm.embed([*PROMPTS], progress=False)])
            np.testing.assert_allclose(found, wanted, atol=1e-3)
        thread.join()
    for prompt, [output] in zip(PROMPTS, generated, strict=True):
        reference.require_same(prompt, output, ledger, "beside embeddings")
    ledger.require_rare()


def parted(outputs: list[RequestOutput], expected: list[RequestOutput]) -> list[str]:
    """In words, which choices differ."""
    return [
        f"{params}: {ours.token_ids} | {theirs.token_ids}"
        for params, output, other in zip(SAMPLING, outputs, expected, strict=True)
        for ours, theirs in zip(output.outputs, other.outputs, strict=True)
        if (ours.token_ids, ours.finish_reason) != (theirs.token_ids, theirs.finish_reason)
    ]


@pytest.mark.parametrize(("setting", "options"), TABLE, ids=str)
def test_same_tokens(
    setting: Setting, options: dict[str, Any], checkpoints: dict[str, Path], sampled_on_cpu: dict[str, list[RequestOutput]]
) -> None:
    """Greedy as transformers, sampled as on a CPU, but for near ties: of either, one may be parted by rounding."""
    path, ledger = checkpoints[setting.architecture], Ledger()
    reference = Reference(path)
    blocks = (SMALL_POOL_TOKENS[setting.block] if setting.small else LARGE_POOL_TOKENS) // setting.block
    options = {"max_num_seqs": ROWS, "kv_memory": kv_memory(path, blocks + SCRATCH, setting.block)} | options
    options |= {"max_num_batched_tokens": setting.budget, "enable_prefix_caching": setting.caching}
    with open_llm(path, block=setting.block, device=DEVICE, **options) as llm:
        for turn, outputs in enumerate(turns(llm, setting, PARAMS)):
            for prompt, output, count in zip(PROMPTS, outputs, LENGTHS, strict=True):
                assert len(output.outputs[0].token_ids) == count
                reference.require_same(prompt, output.outputs[0].token_ids, ledger, f"{setting}, turn {turn}")
        sampled = run(llm, PROMPTS, SAMPLING)
        wait_idle(llm)
    ledger.require_rare()
    different = parted(sampled, sampled_on_cpu[setting.architecture])
    print(f"{setting}: {ledger.compared} greedy outputs, near ties {ledger.exempt}")
    print(f"{setting}: sampled otherwise than on a CPU: {different}")
    assert len(different) <= 1


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_sequences_that_share_a_long_prompt_say_what_each_says_alone(checkpoints: dict[str, Path], graphs: bool) -> None:
    """Two prompts, many questions: their blocks are read for several sequences at once, whoever comes and goes meanwhile."""
    common = [draw(608, seed=1), draw(400, seed=2)]
    prompts = [common[number % 3 == 0] + draw(1 + number * 5 % 37, seed=10 + number) for number in range(24)]
    lengths = [5 + number * 7 % 30 for number in range(24)]
    reference, ledger = Reference(checkpoints[QWEN3]), Ledger()
    options: dict[str, Any] = {"device": DEVICE, "max_num_seqs": 20, "max_num_batched_tokens": 2048, "cuda_graphs": graphs}
    with open_llm(checkpoints[QWEN3], block=16, **options) as llm:
        for turn in ("cold", "cached"):
            for prompt, output, length in zip(prompts, run(llm, prompts, [greedy(n) for n in lengths]), lengths, strict=True):
                assert len(output.outputs[0].token_ids) == length
                reference.require_same(prompt, output.outputs[0].token_ids, ledger, turn)
        wait_idle(llm)
    ledger.require_rare()


def test_a_lost_process_in_the_middle_of_replay_fails_what_is_under_way(checkpoints: dict[str, Path]) -> None:
    """And the device serves the next engine."""
    endless = SamplingParams(temperature=0.0, max_tokens=LENGTH - 100, ignore_eos=True)
    reference, prompt = Reference(checkpoints[QWEN3]), PROMPTS[11]
    with open_llm(checkpoints[QWEN3], device=DEVICE, max_num_seqs=4) as llm:
        stream = llm.iterate([prompt], endless)
        next(iter(stream))
        os.kill(_child_of(llm), signal.SIGKILL)
        *_, (_, last) = stream
        assert last.error is not None
        assert "process of the local groups has ended" in last.error
    with open_llm(checkpoints[QWEN3], device=DEVICE, max_num_seqs=4) as llm:
        output = run(llm, [prompt], greedy(20))[0].outputs[0]
    reference.require_same(prompt, output.token_ids, Ledger(), "after a lost process")


def _child_of(llm: LLM) -> int:
    engine = llm._engine
    assert isinstance(engine, LocalEngine)
    assert isinstance(engine._groups, ProcessGroups)
    assert engine._groups._child is not None
    return engine._groups._child.pid
