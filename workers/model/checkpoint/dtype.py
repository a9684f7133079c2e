"""Which dtype a rank computes in, where the user leaves it open. Imports torch and the checkpoint.

A processor multiplies bfloat16 or float16 fast only if it has instructions for it: without them, oneDNN has no kernel either.
Measured on AVX2, a 0.1B model in bfloat16 against float32: 25 and 96 output tokens/s over several rows, 90 and 210 prompt
tokens/s; only a row by itself is faster in bfloat16, 30 ms a token against 62, since it reads half as many bytes.
"""

from dataclasses import dataclass

import torch

from kvcache.layout import FP8
from workers.model.checkpoint.weights import StoredNumbers

WIDE_WEIGHTS_FRACTION = 0.5
"""Share of a host's memory that its ranks' weights may take together, to be kept wider than they are stored."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a device computes in at full speed, beside float32. name: of what it has, for people."""

    name: str
    bfloat16: bool
    float16: bool

    @classmethod
    def of(cls, device: torch.device) -> "Arithmetic":
        """A GPU's kernels take both."""
        if device.type != "cpu":
            return cls(device.type, True, True)
        name = str(torch.backends.cpu.get_cpu_capability())
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return cls(f"{name}, without oneDNN", False, False)
        bfloat16, float16 = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.ops.mkldnn._is_mkldnn_fp16_supported()
        return cls(name, bool(bfloat16), bool(float16))

    def has(self, dtype: torch.dtype) -> bool:
        return {torch.bfloat16: self.bfloat16, torch.float16: self.float16}.get(dtype, True)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A dtype, and why in words."""

    dtype: torch.dtype
    why: str


def kv_dtype_name(kv_dtype: str, dtype: torch.dtype) -> str:
    """What the blocks hold, as `BlockLayout` calls it. kv_dtype: as configured. dtype: that the model computes in."""
    return FP8 if kv_dtype == "fp8" else str(dtype).removeprefix("torch.")


def choose(
    config_dtype: torch.dtype | None, stored: StoredNumbers, arithmetic: Arithmetic, max_num_seqs: int, room: int
) -> Chosen:
    """For `--dtype auto`. config_dtype: as config.json says; None: as the weights are stored. max_num_seqs: that run at
    once. room: bytes of memory that there are for all of a group's weights.

    The same on all ranks that are told the same.
    """
    dtype = config_dtype or stored.dtype
    source = "as the weights are stored" if config_dtype is None else "as config.json says"
    if arithmetic.has(dtype):
        return Chosen(dtype, source)
    name, wide = str(dtype).removeprefix("torch."), 4 * stored.numbers
    lacking = f"this processor ({arithmetic.name}) has no {name} arithmetic"
    if max_num_seqs == 1:
        return Chosen(dtype, f"{source}; {lacking}, but a row by itself is bound by memory, and these weights are small")
    if wide > room:
        return Chosen(dtype, f"{source}; {lacking}, but weights in float32 take {wide:,} bytes, and there is room for {room:,}")
    return Chosen(torch.float32, f"{lacking}, and several rows are faster in float32; --dtype {name} keeps the weights small")
