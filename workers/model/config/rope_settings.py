"""RoPE's parameters out of config.json, in both spellings. Imports the fields and `Rope`.

transformers 5 writes `rope_parameters`, with the theta in it; older files have `rope_scaling` beside `rope_theta`, and so do
files that a user has edited as a model's card says. What transformers 5 makes of a file is what counts here.
"""

from workers.model.config.fields import Fields
from workers.model.config.rope import Rope

THETA = 10_000.0
LENGTH_OUTSIDE = "original_max_position_embeddings"


def read_rope(fields: Fields, max_position: int) -> Rope:
    """max_position: config.json's max_position_embeddings. Errors: CheckpointError."""
    scaling, theta = _block_in_force(fields)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":  # departs from the plain rotation only beyond max_position, where no sequence may go
        kind = "default"
    if kind not in Rope.KINDS:
        raise fields.error(f"RoPE scaling {kind!r} is not supported: choose a checkpoint with one of {Rope.KINDS}")
    for source in (fields, scaling):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor other than 1 is not supported: choose another checkpoint")
    original = fields.integer(LENGTH_OUTSIDE, scaling.integer(LENGTH_OUTSIDE, max_position))
    if kind in ("linear", "llama3") and scaling.get("factor") is None:
        raise fields.error(f"RoPE scaling {kind!r} has no factor: repair or download the file again")
    factor = scaling.number("factor", max_position / original)
    if factor <= 0:
        raise fields.error(f"RoPE scaling's factor must be above 0, found {factor:g}: repair or download the file again")
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=scaling.number("low_freq_factor", 1.0),
        high_freq_factor=scaling.number("high_freq_factor", 4.0),
        beta_fast=scaling.number("beta_fast", 0.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0.0) or 1.0,
        attention_factor=None if scaling.get("attention_factor") is None else scaling.number("attention_factor", 1.0),
        mscale=scaling.number("mscale", 0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0),
        truncate=bool(scaling.get("truncate", True)),
    )


def _block_in_force(fields: Fields) -> tuple[Fields, float]:
    """Of the two blocks the one that counts, and theta. `rope_scaling` goes before `rope_parameters`, as a whole: a theta in
    the block that is dropped is lost, which nobody can have meant, so that is refused."""
    modern, old = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    for name, block in (("rope_parameters", modern), ("rope_scaling", old)):
        if inner := block.objects():
            raise fields.error(f"{name} has a block for each kind of layer ({', '.join(inner)}), which is not supported")
    if not fields.get("rope_scaling"):
        return modern, modern.number("rope_theta", fields.number("rope_theta", THETA))
    theta = old.number("rope_theta", fields.number("rope_theta", THETA))
    if (dropped := modern.number("rope_theta", theta)) != theta:
        raise fields.error(
            f"rope_parameters has rope_theta {dropped:g}, but rope_scaling beside it goes before it, and then theta is "
            f"{theta:g}: move what rope_scaling says into rope_parameters"
        )
    return old, theta
