"""`manta plan` says before anything is loaded what a rank then takes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.models.zoo import make
from cluster.config import EngineConfig
from cluster.resolve import resolve
from deploy.cli.planning import in_units, plan_lines
from manta.commands import app
from tests.shared.checkpoints import make_checkpoint
from tests.shared.quantising import MXFP4, is_stack, quantise
from workers.config import LoraRoom, ReadingConfig
from workers.model.config.architectures import torch_dtype
from workers.model.config.fields import CheckpointError
from workers.model.reading import read_model
from workers.parallel.in_process import Solo
from workers.process.build import LOADING, build_rank
from workers.process.footprint import footprint


@pytest.mark.few
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma4_text", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_a_rank_reads_and_holds(kind: str, dtype: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / kind)
    config = EngineConfig(model=str(path), dtype=dtype, kv_memory=1 << 22, block_size=16, threads=1)
    read: list[int] = []

    def phase(what: str, _: int, total: int) -> None:
        if what == LOADING:
            read.append(total)

    model = read_model(path)
    block_bytes = []
    for kv_dtype in ("auto", "fp8"):
        config = replace(config, kv_dtype=kv_dtype)
        built = build_rank(config, resolve(config, "cpu"), Solo(), phase)
        taken = footprint(model, 1, torch_dtype(dtype), 16, kv_dtype)
        assert taken.weight_bytes == read[-1]
        pools = [built.pool] if built.narrow is None else [built.pool, built.narrow[0]]
        assert taken.layout == replace(built.pool.layout, layers=sum(pool.layout.layers for pool in pools))
        block_bytes.append(taken.layout.block_bytes)
        lines, _ = plan_lines(config, None)
        if built.narrow is None:
            assert lines[-1].startswith(f"blocks           {(1 << 22) // block_bytes[-1]:,}")
        else:
            assert lines[-2].startswith("blocks ")
        built.rank.executor.close()
    assert block_bytes[0] == block_bytes[1] * torch_dtype(dtype).itemsize


def test_without_memory_it_says_what_batches_need(tmp_path: Path) -> None:
    """No more and no less: with so much there is room for just so many sequences of the longest context."""
    config = EngineConfig(model=str(make("qwen3", tmp_path / "qwen3")), dtype="float32", block_size=16, max_num_seqs=3)
    taken = footprint(read_model(config.model), 1, torch.float32, 16)
    lines, fits = plan_lines(config, None)
    assert fits
    for rows, line in zip((1, 3), lines[-2:], strict=True):
        blocks = rows * taken.layout.blocks_for(512)
        needs = int((taken.weight_bytes + blocks * taken.layout.block_bytes) / 0.9)
        assert line.startswith(f"batch of {rows} ")
        assert f"{blocks:,} blocks, at the longest context: {in_units(needs)} a rank" in line
        room = plan_lines(config, needs + 1)[0][-1]
        assert f"blocks           {blocks:,}, {blocks * 16:,} tokens: {rows} sequence(s)" in room


def test_two_ranks_hold_half(tmp_path: Path) -> None:
    path = make("mixtral", tmp_path / "mixtral")
    alone, shared = (footprint(read_model(path), size, read_model(path).dtype, 16) for size in (1, 2))  # type: ignore[arg-type]
    assert 0.5 < shared.weight_bytes / alone.weight_bytes < 0.55
    assert 2 * shared.layout.block_bytes == alone.layout.block_bytes


def test_weights_that_a_gpu_keeps_in_fewer_bits(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "Qwen3ForCausalLM", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)

    def says(**options: str) -> list[str]:
        return plan_lines(EngineConfig(model=str(path), **options), None)[0][:2]  # type: ignore[arg-type]

    linear = 2 * (256 * (64 + 2 * 32) + 64 * 256 + 3 * 256 * 512)
    plain = footprint(read_model(path), 1, torch.bfloat16, 16).weight_bytes
    scales = 2 * 4 * (64 + 2 * 32 + 256 + 2 * 512 + 256)
    heading = "Qwen3ForCausalLM, bfloat16, KV in bfloat16, 1 rank(s) a group"
    assert says() == [heading, f"weights          {in_units(plain)} a rank"]
    heading += ", weights quantised: FP8, made while loading, kept as"
    fewer = in_units(plain - linear + scales)
    assert says(quantization="fp8") == [f"{heading} they are", f"weights          {fewer} a rank"]
    assert says(quantization="fp8", device="cpu") == [f"{heading} plain numbers", f"weights          {in_units(plain)} a rank"]


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """Take the room of plain ones on a CPU; on a GPU a byte for two numbers, of whole spans of 128, and one for 32."""
    plain, quantised = make("gpt_oss", tmp_path / "plain", dtype=torch.bfloat16), tmp_path / "quantised"
    quantise(plain, quantised, MXFP4, is_stack)

    def says(path: Path, **options: Any) -> list[str]:
        config = EngineConfig(model=str(path), tensor_parallel_size=2, enable_expert_parallel=True, **options)
        return plan_lines(config, None)[0]

    told = says(plain, device="cpu")
    heading = f"{told[0]}, weights quantised: mxfp4 (MXFP4), MXFP4 of experts kept as"
    assert says(quantised, device="cpu") == [f"{heading} plain numbers", *told[1:]]
    how = ReadingConfig(enable_expert_parallel=True)
    weights = footprint(read_model(plain, how), 2, torch.bfloat16, 16).weight_bytes
    kept = footprint(read_model(quantised, how), 2, torch.bfloat16, 16, keeps=True).weight_bytes
    assert says(quantised)[:2] == [f"{heading} they are", f"weights          {in_units(kept)} a rank"]
    assert kept < weights


def test_the_command_reads_no_weights(tmp_path: Path) -> None:
    path = make("gemma2", tmp_path / "gemma2")
    (path / "model.safetensors").unlink()
    result = CliRunner().invoke(app, ["plan", str(path), "--memory", "2MiB", "--block-size", "16", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Gemma2ForCausalLM, float32, KV in float32, 1 rank(s) a group\n")
    assert re.search(r"^KV +512 bytes a token, 8.00 KiB a block of 16 tokens, a rank$", result.output, re.MULTILINE)
    assert re.search(r"^longest context +512 tokens: 256.00 KiB a rank$", result.output, re.MULTILINE)
    assert re.search(r"^blocks +\d+, [\d,]+ tokens: \d sequence\(s\) of the longest context", result.output, re.MULTILINE)


def test_where_every_layer_sees_a_window_a_sequence_holds_no_more(tmp_path: Path) -> None:
    """Two blocks that are seen, the one that is filled, and three chunks ahead, as the scheduler has it on a GPU."""
    path = make("mistral", tmp_path / "mistral", sliding_window=24)
    asked = ["plan", str(path), "--model-implementation", "transformers", "--block-size", "16", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*asked, "--max-num-batched-tokens", "16", "--kv-memory", "96KiB"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^KV .* 8.00 KiB a block", result.output, re.MULTILINE)
    assert re.search(r"^longest context +512 tokens: 48.00 KiB a rank$", result.output, re.MULTILINE)
    assert re.search(r"^blocks +12, 192 tokens: 2 sequence\(s\) of the longest context", result.output, re.MULTILINE)


@pytest.mark.parametrize(("memory", "said"), [("100KiB", "it does not fit"), ("420KiB", "lower max_model_len to that")])
def test_what_does_not_fit(memory: str, said: str, tmp_path: Path) -> None:
    path = make("gemma2", tmp_path / "gemma2")
    result = CliRunner().invoke(app, ["plan", str(path), "--memory", memory, "--block-size", "16", "--dtype", "float32"])
    assert result.exit_code == 1, result.output
    assert said in result.output


def test_where_some_layers_see_a_window_both_kinds_are_counted(tmp_path: Path) -> None:
    """And there are as many blocks as a rank then has."""
    path = make("gpt_oss", tmp_path / "gpt_oss", sliding_window=20)
    config = EngineConfig(
        model=str(path), dtype="float32", block_size=16, max_num_batched_tokens=32, max_num_seqs=4, max_model_len=512,
        kv_memory=1 << 18, threads=1, report_steps=1,
    )  # fmt: skip
    lines, fits = plan_lines(config, None)
    assert fits
    built = build_rank(config, resolve(config, "cpu"), Solo())
    built.rank.executor.close()
    assert built.sizes.narrow < built.sizes.blocks
    assert any("512 bytes a token" in line for line in lines)
    assert any("256 bytes in layers that see a window" in line for line in lines)
    assert lines[-2].startswith("blocks ")
    assert lines[-1].startswith("  and ")


def test_what_it_says_to_do_helps_and_why_there_is_less_than_would_fit(tmp_path: Path) -> None:
    """32.07 MiB are the longest context, and of 32.08 narrow layers have enough for several that are shorter."""
    path = make("gpt_oss", tmp_path / "gpt_oss", sliding_window=200)

    def says(kv_memory: int, max_model_len: int | None = None) -> tuple[str, bool]:
        lines, fits = plan_lines(
            EngineConfig(
                model=str(path), dtype="float32", block_size=16, max_num_batched_tokens=16, max_num_seqs=4,
                max_model_len=max_model_len, kv_memory=kv_memory,
            ), None,
        )  # fmt: skip
        return "\n".join(lines), fits

    for kv_memory, longest_fits in ((20_000, False), (1 << 20, False), (32 << 20, False), (33_636_352, True)):
        said, fits = says(kv_memory)
        assert not fits
        assert ("since          the longest would leave too few blocks" in said) == longest_fits
        most = int(re.findall(r"a sequence of ([\d,]+) tokens at most; lower max_model_len to that", said)[0].replace(",", ""))
        said, fits = says(kv_memory, most)
        assert fits
        assert "1 sequence(s) of the longest context" in said
    said, fits = says(8191)
    assert not fits
    assert said.endswith("blocks           none: one takes 8.00 KiB; raise kv_memory, or lower block_size")


def test_no_more_blocks_than_a_rank_has(tmp_path: Path) -> None:
    path = make("llama", tmp_path / "llama")
    config = EngineConfig(
        model=str(path), dtype="float32", block_size=16, max_num_seqs=2, kv_memory=1 << 20, threads=1, max_model_len=64
    )
    built = build_rank(config, resolve(config, "cpu"), Solo())
    built.rank.executor.close()
    assert built.sizes.blocks == 8, "of 128 that there is memory for"
    assert plan_lines(config, None)[0][-1] == "blocks           8, 128 tokens: 2 sequence(s) of the longest context at once"


def test_a_pool_that_is_asked_for_must_fit_too(tmp_path: Path) -> None:
    path = make("gemma2", tmp_path / "gemma2")
    asked = ["plan", str(path), "--memory", "2MiB", "--block-size", "16", "--dtype", "float32", "--kv-memory"]
    fits, does_not = (CliRunner().invoke(app, [*asked, kv_memory]) for kv_memory in ("512KiB", "3MiB"))
    assert (fits.exit_code, does_not.exit_code) == (0, 1), (fits.output, does_not.output)
    assert "kv_memory is 3.00 MiB" in does_not.output


def test_what_is_not_served(tmp_path: Path) -> None:
    path = make("hunyuan_v1_dense", tmp_path / "hunyuan")
    result = CliRunner().invoke(app, ["plan", str(path), "--tensor-parallel-size", "2"])
    assert result.exit_code == 2
    assert "no tensor-parallel plan" in result.output


def test_units() -> None:
    assert [in_units(number) for number in (0, 1023, 1536, 3 << 30)] == ["0 bytes", "1,023 bytes", "1.50 KiB", "3.00 GiB"]


def test_room_for_adapters_is_counted(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "Qwen3ForCausalLM", dtype=torch.bfloat16)

    def room(**options: int) -> int:
        _, *lines = plan_lines(EngineConfig(model=str(path), **options), 1 << 24)[0]  # type: ignore[arg-type]
        (said,) = (line for line in lines if line.startswith("blocks"))
        return int(said.split()[1].rstrip(",").replace(",", ""))

    taken = footprint(read_model(path), 1, torch.bfloat16, 256, adapters=LoraRoom(8, 128))
    fewer = taken.adapter_bytes / taken.layout.block_bytes
    assert fewer > 10
    assert abs(room() - room(max_loras=8, max_lora_rank=128) - fewer) < 1


def test_room_for_adapters_of_experts_is_counted(tmp_path: Path) -> None:
    """In numbers for each rank of an adapter, A and B of each layer."""
    path = make("qwen2_moe", tmp_path, num_hidden_layers=1)

    def room(size: int, experts: bool = True, **how: Any) -> float:
        adapters = LoraRoom(2, 16, experts)
        taken = footprint(read_model(path, ReadingConfig(**how)), size, torch.float32, 16, adapters=adapters)
        return taken.adapter_bytes / (2 * 16 * torch.float32.itemsize)

    hidden, width, router, whole = 64, 48, 2 * 64 + 6 + 1, 3 * 64 + (64 + 2 * 32) + 64 + 64
    expert, half = 3 * hidden + 3 * width, 3 * hidden + 3 * width // 2  # the shared one is as large, and always halved
    assert room(1) == whole + router + expert + 6 * expert
    assert room(1, experts=False) == whole + router + expert
    assert room(2) == whole - 64 - 32 + router + half + 6 * half
    assert room(2, enable_expert_parallel=True) == whole - 64 - 32 + router + half + 3 * expert


def test_room_beside_experts_is_asked_for_where_there_are_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none are served: name some with lora, or give max_loras"):
        plan_lines(EngineConfig(model=str(make("qwen3_moe", tmp_path)), lora_experts=True), None)


def test_adapters_of_a_model_that_can_have_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="LoRA adapters need Manta's own layers"):
        plan_lines(EngineConfig(model=str(make("gemma2", tmp_path)), max_loras=2), None)
