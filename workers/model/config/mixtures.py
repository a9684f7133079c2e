"""What config.json says about a mixture of experts, and how the ranks of a group divide it.

Imports no torch: front ends need none. One more family is one more `MixtureFamily` in `architectures.FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.model.config.fields import Fields

Scoring = Literal["all", "chosen"]
"""Whose scores the softmax is over: of all experts, before the best are chosen, or of the chosen ones alone."""


@dataclass(frozen=True, slots=True)
class Gating:
    """How a gate and an up projection become one: `silu(gate) * up`, or with a limit, as gpt-oss has it,
    `(clamp(up) + 1) * gate * sigmoid(alpha * gate)` where the gate is cut above the limit, and up on both sides."""

    alpha: float = 1.0
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class MixtureFamily:
    """How the mixtures of one family are told and stored. counts: fields that say how many experts there are, the first that is
    there. intermediate: the field that says how wide one is. names: of gate, up and down of an expert; two: gate and up in one
    tensor of all experts, their columns in turns, inputs first, and down. dense: config.json may say that some layers have no
    experts. normalized: the weights of a token's experts add up to one; None: as `norm_topk_prob` says."""

    block: str = "mlp"
    router: str = "gate"
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    counts: tuple[str, ...] = ("num_experts",)
    intermediate: str = "moe_intermediate_size"
    scoring: Scoring = "all"
    normalized: bool | None = None
    dense: bool = False
    shared: bool = False
    bias: bool = False  # on the router and in the experts

    @property
    def packed(self) -> bool:
        """All experts are one tensor."""
        return len(self.names) == 2


QWEN2_MOE = MixtureFamily(dense=True, shared=True)
QWEN3_MOE = MixtureFamily(dense=True, counts=("num_experts", "num_local_experts"))
MIXTRAL = MixtureFamily(
    block="block_sparse_moe", names=("w1", "w3", "w2"), counts=("num_local_experts",), intermediate="intermediate_size",
    normalized=True,
)  # fmt: skip
GPT_OSS = MixtureFamily(
    router="router", names=("gate_up_proj", "down_proj"), counts=("num_local_experts", "num_experts"),
    intermediate="intermediate_size", scoring="chosen", normalized=False, bias=True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """The mixtures of a model. experts: of a layer. per_token: that each token goes through. sparse: by layer, whether it has
    experts. shared_intermediate: of the expert that every token goes through; 0 without one. parallel: whole experts are shared
    out among the ranks of a group, instead of a part of each."""

    family: MixtureFamily
    experts: int
    per_token: int
    intermediate: int
    shared_intermediate: int
    normalized: bool
    gating: Gating
    sparse: tuple[bool, ...]
    parallel: bool = False

    def refusal(self, size: int) -> str | None:
        """Why `size` ranks cannot share it; None if they can."""
        if self.parallel and self.experts % size:
            return f"does not divide the model's {self.experts} experts"
        if not self.parallel and self.intermediate % size:
            return f"does not divide the experts' intermediate size {self.intermediate}"
        if self.shared_intermediate % size:
            return f"does not divide the shared expert's intermediate size {self.shared_intermediate}"
        return None

    def shard(self, rank: int, size: int) -> MixtureShape:
        """Of ranks that can share it."""
        held = self.experts // size if self.parallel else self.experts
        wide = self.intermediate if self.parallel else self.intermediate // size
        return MixtureShape(
            experts=held,
            expert_start=rank * held if self.parallel else 0,
            intermediate=wide,
            intermediate_start=0 if self.parallel else rank * wide,
            shared=self.shared_intermediate // size,
            shared_start=rank * self.shared_intermediate // size,
        )


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """One rank's part: experts [expert_start, expert_start + experts), of each as many numbers as `intermediate` from
    `intermediate_start` on, and as many as `shared` of the shared expert."""

    experts: int
    expert_start: int
    intermediate: int
    intermediate_start: int
    shared: int
    shared_start: int


def read_mixture(fields: Fields, family: MixtureFamily, layers: int) -> MixtureConfig:
    """Errors: CheckpointError."""
    named = next((name for name in family.counts if fields.get(name) is not None), family.counts[0])
    experts, per_token = fields.integer(named), fields.integer("num_experts_per_tok")
    if per_token > experts:
        raise fields.error(f"num_experts_per_tok={per_token} is above {named}={experts}: repair or download the file again")
    normalized = bool(fields.get("norm_topk_prob", False)) if family.normalized is None else family.normalized
    clamped = Gating(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0))
    return MixtureConfig(
        family=family,
        experts=experts,
        per_token=per_token,
        intermediate=fields.integer(family.intermediate),
        shared_intermediate=fields.integer("shared_expert_intermediate_size") if family.shared else 0,
        normalized=normalized,
        gating=clamped if family.packed else Gating(),
        sparse=_sparse(fields, family, layers),
    )


def _sparse(fields: Fields, family: MixtureFamily, layers: int) -> tuple[bool, ...]:
    if not family.dense:
        return (True,) * layers
    step, dense = fields.integer("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise fields.error(f"mlp_only_layers must be a list, found {dense!r}: repair or download the file again")
    return tuple(number not in dense and (number + 1) % step == 0 for number in range(layers))
