"""What each worker is told: its settings, and where its scheduler listens. Imports the settings that the scheduler shares, and
no torch: whoever places workers needs none."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.config.core import CacheConfig, Resolved
from scheduler.config.options import OptionRule, at_least, at_most, one_of, option

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
KV_DTYPES = ("auto", "fp8")
DEVICES = ("auto", "cpu", "cuda")
MODEL_IMPLEMENTATIONS = ("auto", "native", "transformers")
ATTENTION_BACKENDS = ("auto", "flash", "triton", "cpu")
QUANTIZATIONS = ("auto", "fp8", "compressed-tensors", "awq", "gptq", "mxfp4")
POOLINGS = ("auto", "last", "mean")
LORAS_UNASKED = 8
"""Adapters that are resident at once where nobody says how many may be."""

MAX_LORA_RANK, MOST_NAME_CHARACTERS = 128, 256
MAX_ROWS = 1 << 16
"""A lease id keeps 16 bits for the row (`scheduler.protocol.leaders.ROW_BITS`)."""


@dataclass(frozen=True, slots=True)
class SchedulerAddress:
    """Where the scheduler listens, and the secret to open with."""

    host: str
    port: int
    token: str


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How a checkpoint is read."""

    model_implementation: str = option(
        "auto",
        f"Whose layers compute: {', '.join(MODEL_IMPLEMENTATIONS)}. auto: Manta's own for the architectures that it has.",
        one_of(MODEL_IMPLEMENTATIONS),
    )
    quantization: str = option(
        "auto",
        f"How weights are quantised: {', '.join(QUANTIZATIONS)}. auto: as the checkpoint says; fp8 is made of 16 bits too.",
        one_of(QUANTIZATIONS),
    )
    enable_expert_parallel: bool = option(
        False, "Share out whole experts of a mixture among a group's ranks; off: each rank has a part of every expert."
    )


USUAL = ReadingConfig()
"""Of a checkpoint of which nothing else is said."""


class LoraRoom(NamedTuple):
    """What a rank keeps for LoRA adapters: so many places, each for this rank at most, and whether beside experts, too."""

    places: int
    rank: int
    experts: bool = False


@dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """What is served, and by how many."""

    model: str
    revision: str | None = option(
        None, "Branch, tag or commit, where model is an id at Hugging Face.", shown="the newest of its main branch"
    )
    download_dir: str | None = option(
        None, "Folder on each node for checkpoints that are downloaded.", shown="the cache of huggingface_hub"
    )
    tensor_parallel_size: int = option(
        1, "Ranks (GPUs or CPU workers) in each group; must divide the attention heads.", at_least(1)
    )
    groups: int = option(1, "Tensor-parallel groups, each with a whole copy of the model.", at_least(1))
    max_groups: int | None = option(None, "Groups at most; load adds them, idleness removes them.", shown="as many as groups")
    pooling: str = option(
        "auto",
        f"Of a prompt's hidden states, its embedding: {', '.join(POOLINGS)}. auto: as the checkpoint says, else the last.",
        one_of(POOLINGS),
    )
    score_tokens: str | None = option(
        None,
        'Two tokens, as "no,yes", of a model that scores pairs by which of them comes next.',
        shown="as the checkpoint says",
    )
    lora: tuple[str, ...] = option(
        (),
        "NAME=FOLDER of a LoRA adapter in PEFT's format, served as a model of that name; repeatable.",
        OptionRule(lambda pairs: all(name and folder for name, folder in map(_parted, pairs)), "is not NAME=FOLDER"),
        OptionRule(
            lambda pairs: all(is_adapter_name(name) for name, _ in map(_parted, pairs)),
            f"has a name that is none: take up to {MOST_NAME_CHARACTERS} printable characters",
        ),
        OptionRule(lambda pairs: len(dict(map(_parted, pairs))) == len(pairs), "has a name twice: choose another"),
        shown="none",
    )
    max_loras: int | None = option(
        None,
        "LoRA adapters whose weights a rank holds at once, the least used leaving for others; 0: it serves none.",
        at_least(0),
        shown=f"as many as are named, up to {LORAS_UNASKED}",
    )
    max_lora_rank: int = option(
        16,
        f"Largest rank of a LoRA adapter, up to {MAX_LORA_RANK}: memory is kept for it.",
        at_least(1),
        at_most(MAX_LORA_RANK),
    )
    lora_experts: bool = option(
        False, "Keep room beside a mixture's experts for what LoRA adapters change in them; off: adapters that do are refused."
    )

    @property
    def adapters(self) -> dict[str, str]:
        """Folders of the LoRA adapters that are named from the start, by their names."""
        return dict(_parted(pair) for pair in self.lora)

    @property
    def lora_slots(self) -> int:
        """LoRA adapters that a rank holds at once."""
        return min(len(self.lora), LORAS_UNASKED) if self.max_loras is None else self.max_loras

    @property
    def lora_room(self) -> LoraRoom:
        """What a rank keeps for them."""
        return LoraRoom(self.lora_slots, self.max_lora_rank, self.lora_experts)

    @property
    def ranks(self) -> int:
        """Of all groups at the start."""
        return self.groups * self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much a group computes at once."""

    max_num_seqs: int = option(256, "Sequences that one group runs at once.", at_least(1), at_most(MAX_ROWS))
    max_num_batched_tokens: int = option(
        2048, "Tokens that one step of a group computes; longer prompts go in chunks.", at_least(1)
    )


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ReadingConfig, BatchConfig, CacheConfig, GroupsConfig):
    """A rank's settings."""

    device: str = option(
        "auto", f"Where ranks compute: {', '.join(DEVICES)}. auto: on GPUs where the cluster has any.", one_of(DEVICES)
    )
    accelerator_type: str | None = option(
        None,
        "Kind of GPU that ranks are placed on, as Ray names it, such as H100 or A10G, in a cluster of several kinds.",
        shown="any",
    )
    dtype: str = option(
        "auto",
        f"Type of weights and KV: {', '.join(DTYPES)}. auto: the checkpoint's, or float32 on a CPU without arithmetic for it.",
        one_of(DTYPES),
    )
    kv_dtype: str = option(
        "auto",
        f"Type of the KV cache: {', '.join(KV_DTYPES)}. auto: as dtype. fp8: a byte a number (float8_e4m3fn), scaled as the "
        "checkpoint says.",
        one_of(KV_DTYPES),
    )
    kv_memory: int | None = option(
        None, 'KV cache of each rank, in bytes or as "4GiB".', at_least(1), shown="measured from free memory", size=True
    )
    host_kv_memory: int = option(
        0,
        'Host memory of each rank for blocks that leave its KV cache, in bytes or as "4GiB".',
        at_least(0),
        shown="none",
        size=True,
    )
    gpu_memory_fraction: float = option(
        0.9,
        "Share of a GPU's memory that weights, activations and KV may fill, 0 to 1.",
        OptionRule(lambda share: 0.0 < share <= 1.0, "is outside (0, 1]: try 0.9"),
    )
    max_model_len: int | None = option(None, "Longest prompt plus output, in tokens.", at_least(2), shown="the model's own")
    attention: str = option("auto", f"Attention kernels: {', '.join(ATTENTION_BACKENDS)}.", one_of(ATTENTION_BACKENDS))
    threads: int | None = option(
        None, "CPU threads of each rank.", at_least(1), shown="all cores for a single local rank, otherwise 1"
    )
    report_steps: int | None = option(
        None,
        "Steps that one report of a group to the scheduler covers.",
        at_least(1),
        shown="1 on CPUs; on GPUs those of 4 ms, up to 8",
    )
    cuda_graphs: bool = option(True, "Capture decode steps on a GPU as CUDA graphs; off: launch by launch, for debugging.")
    custom_all_reduce: bool = option(
        True, "Small sums of one host's GPUs by a kernel over each other's memory, where a trial of it is right; off: by NCCL."
    )
    abandoned_after_s: float = 60.0
    """Of nobody saying that there is a scheduler, or will be: then a group ends itself."""

    @property
    def exchanges_blocks(self) -> bool:
        """Whether ranks open a port for others: not where there is, and will be, only one group."""
        return self.prefix_fetch and self.enable_prefix_caching and max(self.groups, self.max_groups or 0) > 1


@dataclass(frozen=True, slots=True)
class ResolvedWorker(Resolved):
    """The same for a rank. device: "cpu" or "cuda". threads: of a CPU rank. report_steps, report_hold_s: as in `Reporter`.
    depth: steps under way while the host plans the next. score_tokens: as in `workers.model.pooling.Uses`. host_ranks: that may
    share a host, which is shared out among them."""

    device: str = "cpu"
    threads: int = 1
    report_steps: int = 1
    report_hold_s: float = math.inf
    depth: int = 0
    score_tokens: tuple[int, int] | None = None
    host_ranks: int = 1


def _parted(pair: str) -> tuple[str, str]:
    name, _, folder = pair.partition("=")
    return name, folder


def is_adapter_name(name: str) -> bool:
    """What a LoRA adapter may be called: it stands in requests, and in the salt of its prefixes."""
    return isinstance(name, str) and 0 < len(name) <= MOST_NAME_CHARACTERS and name.isprintable()
