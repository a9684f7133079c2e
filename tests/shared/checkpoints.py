"""Small random checkpoints in Hugging Face format, made through transformers' own classes.

Weights are "sharp": scaled so that attention and MLP dominate the residual stream and the best logit stands clear of
the second. Greedy decoding in float32 is then the same in any correct engine, token by token.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILY = re.compile("Llama|Mistral|Qwen2|Qwen3")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 199,  # no multiple of any tensor parallel size, so padding is always tested
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}


def make_checkpoint(
    path: Path,
    architecture: str = "Qwen3ForCausalLM",
    *,
    seed: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    sharp: bool = True,
    max_shard_size: str = "5GB",
    **fields: Any,
) -> Path:
    """Write a checkpoint folder at `path` and return it. `fields` go into config.json, over `SIZES`.

    max_shard_size: as in `save_pretrained`; something like "40KB" splits the weights over several files with an index.
    """
    sizes = SIZES | {"tie_word_embeddings": tied} | fields
    family = FAMILY.match(architecture)
    assert family is not None, architecture
    if family[0] == "Mistral":
        sizes.setdefault("sliding_window", None)
    config = getattr(transformers, f"{family[0]}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)(config)
        if sharp:
            _sharpen(model)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


@torch.no_grad()
def _sharpen(model: torch.nn.Module) -> None:
    """Every matrix doubles the scale of what passes; norms and biases depart from 1 and 0, so that none can be lost."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(0.0, 0.3)
        elif weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            weight.normal_()
        else:
            weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5)


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the checkpoint, eager attention, ready to generate."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    if model.config.model_type == "gpt_oss":
        for layer in model.model.layers:  # before 5.19 they clamp at 7, whatever config.json says
            layer.mlp.experts.limit = getattr(model.config, "swiglu_limit", layer.mlp.experts.limit)
    return model.eval()


def generate_reference(path: Path, prompt: list[int], new_tokens: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """Greedy tokens of transformers' `generate` for one prompt of token ids; an end-of-sequence id does not stop it."""
    model = load_reference(path, dtype)
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]
