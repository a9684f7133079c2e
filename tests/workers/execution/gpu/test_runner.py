"""What executes on a GPU, whole, under Triton's interpreter: it gives the tokens of what executes on a CPU.

There are no graphs without a GPU; but their function, called with their sizes, pads as they do.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models.zoo import make
from scheduler.protocol.messages import FinishReason
from scheduler.protocol.sampling import Grammar, SamplingParams
from tests.shared.adapters import OF_EXPERTS, make_adapter
from tests.shared.checkpoints import make_checkpoint
from tests.shared.tokenizers import EOS, byte_level, save
from tests.workers.pattern import NAN, fill, require_untouched
from tests.workers.stepping import Stepped, Work
from workers.attention.forms import Form
from workers.config import LoraRoom
from workers.execution.gpu import chunks
from workers.execution.gpu import runner as gpu_runner
from workers.execution.gpu.graphs import Launch
from workers.kernels.rows import reduce
from workers.kernels.rows.peers import PROGRAMS, Peers
from workers.model.config.architectures import read_config
from workers.model.gpu import fused
from workers.model.layers import experts
from workers.model.lora.files import read_adapter
from workers.parallel.in_process import PeerLost, Solo
from workers.process import build

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


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "experts"
    make(
        "qwen2_moe", path, vocab_size=419, eos_token_id=EOS, hidden_size=32, num_hidden_layers=2, mlp_only_layers=[1],
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    return save(byte_level(), path)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "gpt_oss"
    make(
        "gpt_oss", path, vocab_size=419, eos_token_id=EOS, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, sliding_window=10,
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


def build_stepped(checkpoint: Path, depth: int, **options: Any) -> Stepped:
    return Stepped(checkpoint, device="cpu", depth=depth, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET, max_model_len=32,
                   **options)  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kind", "implementation", "kv_dtype"),
    [
        ("checkpoint", "native", "auto"), ("checkpoint", "transformers", "auto"), ("with_experts", "native", "auto"),
        ("gpt_oss", "native", "auto"), ("checkpoint", "native", "fp8"),
    ],
)  # fmt: skip
def test_it_gives_the_tokens_of_a_cpu_and_writes_where_it_may(
    kind: str, implementation: str, kv_dtype: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = request.getfixturevalue(kind)
    monkeypatch.setattr(experts, "can_pack", lambda *_: False)  # the kernels read the plain numbers
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


@pytest.mark.usefixtures("interpreted")
def test_no_token_of_a_step_that_has_lost_a_rank_is_committed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device a collective that is given up ends like any other, with whatever numbers."""
    lost: list[str] = []

    def check(_: Solo) -> None:
        if lost:
            raise PeerLost(lost[0])

    monkeypatch.setattr(Solo, "check", check)
    stepped = build_stepped(checkpoint, 1, attention="triton", cuda_graphs=False)
    lease = stepped.start(WORKS[1])
    while not lease.tokens:
        stepped.turn()
    committed = list(lease.tokens)
    lost.append("a peer has gone")
    with pytest.raises(PeerLost, match="a peer has gone"):
        stepped.turn()
    assert lease.tokens == committed
    stepped.close()


@pytest.mark.usefixtures("interpreted")
def test_what_sums_through_the_ranks_memory_gives_the_same_tokens(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank, which meets itself: steps of one token, which have room there, and of two, which have not."""
    expected = build_stepped(checkpoint, 0, attention="triton", cuda_graphs=False)
    leases = expected.generate(WORKS[:2])
    expected.close()
    packets, used = 32, list[bool]()
    inbox, given_up = torch.zeros(2, packets, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    turns = torch.zeros(PROGRAMS, dtype=torch.int32)
    peers = Peers(0, 1, packets, torch.tensor([inbox.data_ptr()]), turns, given_up.data_ptr())

    def takes(peers: Peers, x: torch.Tensor) -> bool:
        used.append(reduce.takes(peers, x))
        return used[-1]

    monkeypatch.setattr(Solo, "peers", peers)
    monkeypatch.setattr(fused, "takes", takes)
    stepped = build_stepped(checkpoint, 0, attention="triton", cuda_graphs=False)
    ours = stepped.generate(WORKS[:2])
    stepped.close()
    assert {*used} == {True, False}
    assert turns.sum() > 0
    assert [lease.tokens for lease in ours] == [lease.tokens for lease in leases]


@pytest.mark.few(1)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("gpt_oss", "transformers"), ("mistral", "native"), ("gemma2", "transformers"), ("gemma4_text", "transformers")],
)
def test_layers_of_every_form(kind: str, implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that end in the midst of blocks, in all layers and in some; sinks; soft caps and scales; heads that differ from
    layer to layer: prompts in chunks beside decodes, some longer than a window and some shorter."""
    path = make(kind, tmp_path / kind, sliding_window=10)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    works = [Work(list(range(40, 65)), greedy), Work([4, 5], greedy), Work(list(range(7, 20)), greedy)]
    options: dict[str, Any] = {"model_implementation": implementation}
    stepped = build_stepped(path, 1, attention="triton", cuda_graphs=False, **options)
    leases = stepped.generate(works)
    stepped.close()
    monkeypatch.undo()
    on_cpu = build_stepped(path, 0, attention="cpu", **options)
    expected = on_cpu.generate(works)
    on_cpu.close()
    assert [lease.tokens for lease in leases] == [lease.tokens for lease in expected]
    monkeypatch.setattr(Form, "within", lambda form, _: replace(form, window=None))
    blind = build_stepped(path, 0, attention="cpu", **options)
    assert [lease.tokens for lease in blind.generate(works)] != [lease.tokens for lease in expected], "windows matter here"
    blind.close()


@pytest.mark.few(1)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["checkpoint", "with_experts"])  # the second has a layer without experts, too
def test_rows_of_several_adapters_and_of_none_get_the_tokens_of_a_cpu(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are slots, and one more: it waits until one of them is used no more."""
    checkpoint = request.getfixturevalue(kind)
    monkeypatch.setattr(experts, "can_pack", lambda *_: False)
    model, adapters = read_config(checkpoint), []
    for number, rank in enumerate((3, 16, 20)):
        folder = make_adapter(tmp_path / str(number), checkpoint, rank=rank, seed=number, targets=OF_EXPERTS)
        adapters.append(read_adapter(str(number), folder, model, LoraRoom(2, 32, experts=True)).adapter)
    works = [replace(work, adapter=adapter) for work, adapter in zip(WORKS, [*adapters, None, adapters[0]], strict=True)]
    room = {"max_loras": 2, "max_lora_rank": 32, "lora_experts": True}
    stepped = build_stepped(checkpoint, 1, attention="triton", cuda_graphs=False, **room)
    runner: Any = stepped.rank.executor
    runner._whole, runner._unsampled = Padded(ROWS, runner._decode_and_sample), Padded(ROWS, runner._decode)
    launches = (ROWS, runner._decode_and_sample), (ROWS, runner._decode), (BUDGET, runner._prefill_padded)
    padded: list[Any] = [Padded(size, partial(launch, adapted=True)) for size, launch in launches]
    runner._adapted = gpu_runner.Graphs(*padded)
    leases = stepped.generate(works)
    stepped.close()
    monkeypatch.undo()
    on_cpu = build_stepped(checkpoint, 0, attention="cpu", **room)
    expected, plain = on_cpu.generate(works), on_cpu.generate(WORKS)
    on_cpu.close()
    assert [lease.tokens for lease in leases] == [lease.tokens for lease in expected]
    same = [ours.tokens == theirs.tokens for ours, theirs in zip(expected, plain, strict=True)]
    assert same == [False, False, False, True, False], "adapters that change nothing would show nothing"
