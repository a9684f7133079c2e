"""What an adapter may adapt of a model: names of modules as transformers and PEFT have them, and shapes of their weights.

Imports no torch: front ends read adapters too.
"""

from workers.model.config.architectures import ModelConfig

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
STACKS = ("gate_up_proj", "down_proj")
"""Parameters that hold all experts of a layer."""

WRAPPED = ("mlp.experts.base_layer", "mlp.experts")
"""What PEFT calls the stacks that it adapts, of which it wraps one after another: the last has the shorter name."""

Place = tuple[str, int | None]
"""A projection as in `shape_of`, and which expert's it is."""


def has_experts(model: ModelConfig, layer: int) -> bool:
    return model.mixture is not None and model.mixture.sparse[layer]


def modules_of(model: ModelConfig, sparse: bool) -> dict[str, Place | None]:
    """What may be adapted of a layer, by its name behind the layer's. sparse: it has experts. None: one of its stacks."""
    found: dict[str, Place | None] = {f"self_attn.{name}": (name, None) for name in ATTENTION}
    mixture = model.mixture
    if mixture is None or not sparse:
        return found | {f"mlp.{name}": (name, None) for name in MLP}
    family = mixture.family
    found |= dict.fromkeys(WRAPPED)
    for block in {family.block, "mlp"}:  # transformers 5 has but the one
        found[f"{block}.{family.router}"] = "router", None
        if not family.packed:
            names = list(zip(family.names, MLP, strict=True))
            for expert in range(mixture.experts):
                found |= {f"{block}.experts.{expert}.{name}": (f"experts.{usual}", expert) for name, usual in names}
    if mixture.shared_intermediate:
        found |= {f"mlp.shared_expert.{name}": (f"shared_expert.{name}", None) for name in MLP}
        found["mlp.shared_expert_gate"] = "shared_expert_gate", None
    return found


def served(model: ModelConfig) -> str:
    """In words."""
    also = ", and its experts and their router" if model.mixture is not None else ""
    return f"{', '.join((*ATTENTION, *MLP))} of a decoder's layers{also} are"


def shape_of(projection: str, model: ModelConfig) -> tuple[int, int]:
    """[out, in] of the whole weight. projection: of attention and of a dense MLP as everybody calls them; of a mixture
    "experts.up_proj" and so on, "experts.gate_up_proj" of a stack, "shared_expert.up_proj", "router", "shared_expert_gate"."""
    hidden, heads, kv_heads = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    mixture, (part, _, name) = model.mixture, projection.rpartition(".")
    width = model.intermediate
    if mixture is not None and part:
        width = mixture.intermediate if part == "experts" else mixture.shared_intermediate
    shapes = {
        "q_proj": (heads, hidden), "k_proj": (kv_heads, hidden), "v_proj": (kv_heads, hidden), "o_proj": (hidden, heads),
        "gate_proj": (width, hidden), "up_proj": (width, hidden), "gate_up_proj": (2 * width, hidden),
        "down_proj": (hidden, width), "router": (mixture.experts if mixture is not None else 0, hidden),
        "shared_expert_gate": (1, hidden),
    }  # fmt: skip
    return shapes[name]
