"""Mixtures of experts on a GPU: graphs say what single launches say, both what transformers says; no step has the host wait."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models.zoo import make
from scheduler.protocol.sampling import SamplingParams
from tests.end_to_end.prompts import OUTPUTS, PROMPTS
from tests.gpu.judge import Judge
from tests.gpu.test_graphs_equal_eager import require_padded_batches, watching
from tests.gpu.test_sync import STEPS, prefilled, steady, warm
from tests.gpu.works import DEVICE, GPU, SHAPE, VOCAB, loop, mixture
from tests.shared.quantising import MXFP4, is_stack, quantise
from tests.shared.tokenizers import EOS, byte_level, save
from tests.workers.stepping import Stepped, Work
from workers.execution.gpu.runner import GpuRunner
from workers.kernels.experts.stacked import Stacked
from workers.model.config.architectures import read_config
from workers.model.decoders.native import load_model
from workers.model.gpu.fused import FusedDecoder
from workers.model.layers.experts import Mixture
from workers.model.quantization.forms import keeps_fewer_bits
from workers.parallel.connect import Solo

pytestmark = GPU

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "num_local_experts": 16, "num_experts_per_tok": 4},
    "qwen2_moe": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 80},
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4, "swiglu_limit": 2.0},
}
OPTIONS: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 512, "max_model_len": 512}


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save(byte_level(), make(request.param, folder, vocab_size=VOCAB, eos_token_id=EOS, **SHAPE | KINDS[request.param]))


def greedy() -> list[Work]:
    """Prompts around the borders of blocks, which end one after another."""
    return [
        Work(prompt, SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(PROMPTS, OUTPUTS, strict=True)
    ]


def test_float32_equals_transformers_with_graphs_and_without(path: Path) -> None:
    judge = Judge(path)
    with contextlib.closing(loop(path, **OPTIONS)) as rank:
        with watching(rank) as seen:
            graphs = rank.generate(greedy())
        with rank.eager():
            eager = rank.generate(greedy())
    require_padded_batches(seen)
    for lease, other in zip(graphs, eager, strict=True):
        judge.require_best(lease, "graphs")
        judge.require_same(lease, other, "graphs | eager")
    judge.require_rare()


def test_no_step_waits_and_padding_is_counted_for_no_expert(path: Path) -> None:
    """Nine rows are padded to ten: a step's tokens go through as many experts as nine rows have."""
    with contextlib.closing(loop(path, dtype="bfloat16", **OPTIONS)) as rank:
        warm(rank)
        leases = prefilled(rank, mixture(9, 60))
        rank.turn()
        layers = mixtures(rank)
        torch.cuda.synchronize()
        before = [int(layer.load.sum()) for layer in layers]
        steady(rank, leases)
        torch.cuda.synchronize()
        for layer, counted in zip(layers, before, strict=True):
            assert int(layer.load.sum()) - counted == 9 * STEPS * layer.config.per_token
        rank.drop_all()


def test_stacks_are_read_onto_the_device_as_numbers_and_in_mxfp4(tmp_path: Path) -> None:
    """They lie transposed in the file; MXFP4 stays so where the device has kernels for it, and else becomes numbers there."""
    plain, quantised = make("gpt_oss", tmp_path / "plain"), tmp_path / "quantised"
    quantise(plain, quantised, MXFP4, is_stack)
    expected = load_file(plain / "model.safetensors")
    for path in (plain, quantised):
        decoder = load_model(path, read_config(path), Solo(), torch.bfloat16, torch.device(DEVICE), None)
        for number, layer in enumerate(decoder.layers):
            assert isinstance(layer.mlp, Mixture)
            for name, got in (("gate_up_proj", layer.mlp.experts.gate_up), ("down_proj", layer.mlp.experts.down)):
                whole = expected[f"model.layers.{number}.mlp.experts.{name}"].transpose(1, 2)
                assert isinstance(got, Stacked) == (path is quantised and keeps_fewer_bits(torch.device(DEVICE)))
                for expert in range(len(whole)):
                    numbers = got.numbers(expert, torch.bfloat16) if isinstance(got, Stacked) else got[expert]
                    assert torch.equal(numbers.cpu(), whole[expert].bfloat16()), (path.name, number, name, expert)


def mixtures(rank: Stepped) -> list[Mixture]:
    """The rank's layers with experts."""
    runner = rank.rank.executor
    assert isinstance(runner, GpuRunner)
    assert isinstance(runner._model, FusedDecoder)
    return [layer.mlp for layer in runner._model._layers if isinstance(layer.mlp, Mixture)]
