"""What executes on a GPU, whole, under Triton's interpreter: it gives the tokens of what executes on a CPU.

There are no graphs without a GPU; but their function, called with their sizes, pads as they do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from scheduler.protocol.messages import FinishReason
from scheduler.protocol.sampling import Grammar, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.tokenizers import EOS, byte_level, save
from tests.workers.pattern import NAN, fill, require_untouched
from tests.workers.stepping import Stepped, Work
from workers import build
from workers.execution import chunks, gpu_runner
from workers.execution.graphs import Launch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests/gpu runs on it")

ROUNDING = 1e-4
ROWS = 4
BUDGET = 12
WORKS = [
    Work(list(range(1, 16)), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)),
    Work([4, 5], SamplingParams(temperature=1.0, top_p=0.8, max_tokens=5, logprobs=2, ignore_eos=True), 1),
    Work([9, 8, 9, 8], SamplingParams(temperature=0.7, frequency_penalty=0.9, max_tokens=4, ignore_eos=True), 2),
    Work([6], SamplingParams(temperature=1.0, grammar=Grammar("regex", "[ab][cd]!"), max_tokens=6), 3),
    Work(list(range(30, 51)), SamplingParams(temperature=1.0, top_k=5, max_tokens=3, prompt_logprobs=1, ignore_eos=True), 4),
]
"""Prompts in chunks beside decodes, one measured and one not; five ways to sample; more sequences than rows."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "small"
    make_checkpoint(
        path, vocab_size=419, eos_token_id=EOS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48,
    )  # fmt: skip
    return save(byte_level(), path)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on a CPU are built as on a GPU; fewer sequences fill up a step of chunks, since each takes its time here."""
    monkeypatch.setattr(build, "_cpu_runner", build._gpu_runner)
    for module in (chunks, gpu_runner):
        monkeypatch.setattr(module, "PADDED_CHUNKS", ROWS)


@dataclass(frozen=True, slots=True)
class Padded:
    """Stands in for `StepGraphs`: what would have been captured is launched at each replay."""

    size: int
    replay: Launch

    def fit(self, size: int) -> int | None:
        return self.size if size <= self.size else None


def build_stepped(checkpoint: Path, depth: int, **options: str | bool) -> Stepped:
    return Stepped(checkpoint, device="cpu", depth=depth, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET, max_model_len=32,
                   **options)  # fmt: skip


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("implementation", "kv_dtype"), [("native", "auto"), ("transformers", "auto"), ("native", "fp8")]
)
def test_it_gives_the_tokens_of_a_cpu_and_writes_where_it_may(
    implementation: str, kv_dtype: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = build_stepped(
        checkpoint, 1, attention="triton", cuda_graphs=False, model_implementation=implementation, kv_dtype=kv_dtype
    )
    runner: Any = stepped.rank.executor
    runner._whole, runner._unsampled = Padded(ROWS, runner._decode_and_sample), Padded(ROWS, runner._decode)
    runner._prefills = Padded(BUDGET, runner._prefill_padded)
    fill(stepped, NAN)
    leases = stepped.generate(WORKS)
    stepped.close()
    require_untouched(stepped, NAN, leases)
    monkeypatch.undo()
    on_cpu = build_stepped(checkpoint, 0, attention="cpu", kv_dtype=kv_dtype)
    expected = on_cpu.generate(WORKS)
    on_cpu.close()
    assert [lease.tokens for lease in leases] == [lease.tokens for lease in expected]
    assert leases[3].finish is FinishReason.STOP
    assert [len(lease.tokens) for lease in leases] == [5, 5, 4, 4, 3]
    for ours, theirs in zip(leases, expected, strict=True):
        assert len(ours.logprobs) == len(theirs.logprobs)
        told = zip([*ours.prompt_logprobs, *ours.logprobs], [*theirs.prompt_logprobs, *theirs.logprobs], strict=True)
        for mine, other in told:
            assert mine.top_ids == other.top_ids
            assert (mine.logprob, *mine.top_logprobs) == pytest.approx((other.logprob, *other.top_logprobs), abs=ROUNDING)
    assert [len(lease.prompt_logprobs) for lease in leases] == [0, 0, 0, 0, 20]
