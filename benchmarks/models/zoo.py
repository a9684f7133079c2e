"""Small random checkpoints of one model type after another, as transformers writes them. Imports torch and transformers.

Weights are sharp: attention and MLP dominate the residual stream, and the best logit stands clear of the second, so greedy
decoding in float32 is the same in any correct engine. Windows and chunks are shorter than the prompts.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 199
"""No multiple of any tensor parallel size: padding is always there."""

WINDOW = 24
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip

TIED = {"tie_word_embeddings": True}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

ZOO: dict[str, dict[str, Any]] = {
    "apertus": {},
    "cohere": TIED | {"logit_scale": 0.5},
    "cohere2": TIED | MIXED | {"logit_scale": 0.5},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 48, "first_k_dense_replace": 1, "head_dim": 8,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "exaone4": MIXED,
    "gemma": TIED,
    "gemma2": TIED | MIXED | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 15.0},
    "gemma3_text": TIED | MIXED | {"query_pre_attn_scalar": 24},
    "gemma4_text": TIED | MIXED | {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 32,
        "num_global_key_value_heads": 1, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "first_k_dense_replace": 1, "use_qk_norm": True,
    },
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
    "hunyuan_v1_dense": {},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": 32,
        "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2, "floor_scale": 16, "attn_scale": 1.0,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "ministral3": {},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}  # fmt: skip
"""By model type: what departs from `SIZES`. All of it runs in the test suite."""

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
ROUTED = EXPERTS | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
OLD_NAMES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 512}

MORE: dict[str, dict[str, Any]] = {
    "afmoe": ROUTED,
    "arcee": {},
    "aria_text": ROUTED,
    "axk1": ZOO["deepseek_v3"],
    "beam": ROUTED,
    "bitnet": {},
    "cohere2_moe": ROUTED,
    "ctrl": {},
    "cwm": MIXED | {"bos_token_id": 0},
    "deepseek_v2": ZOO["deepseek_v3"] | {"topk_method": "greedy"},
    "dots1": ROUTED | {"n_shared_experts": 1},
    "exaone_moe": ROUTED,
    "flex_olmo": ROUTED,
    "flint": {},
    "gemma4_unified_text": ZOO["gemma4_text"],
    "glm4_moe_lite": ZOO["deepseek_v3"],
    "gpt-sw3": OLD_NAMES,
    "gpt2": OLD_NAMES,
    "gpt_bigcode": OLD_NAMES,
    "gpt_neox": {},
    "granite_swa": {},
    "granitemoe_swa": ROUTED,
    "granitemoeshared": ROUTED,
    "helium": {},
    "hunyuan_v1_moe": ROUTED,
    "hy_v3": ROUTED,
    "hyperclovax": {},
    "internlm3": {"qkv_bias": True, "bias": True},
    "iquestcoder": {},
    "jais2": {},
    "kolibri1": ROUTED,
    "laguna": ROUTED,
    "mellum": ROUTED,
    "mimo_v2_flash": {},
    "minicpm3": LATENT,
    "minimax_m3_vl_text": ROUTED,
    "ministral": {},
    "modernbert-decoder": {"local_attention": WINDOW, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
                           "cls_token_id": 0, "sep_token_id": 0},
    "moshi": {},
    "nanochat": {},
    "olmo": {},
    "persimmon": {},
    "solar_open": ROUTED,
    "vaultgemma": {},
    "youtu": ZOO["deepseek_v3"],
}
"""More of them, which `python -m benchmarks.models` runs as well."""


def make(model_type: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Writes a checkpoint folder at `path` and returns it. fields: of config.json, over the zoo's own."""
    config = transformers.CONFIG_MAPPING[model_type](**SIZES | (ZOO | MORE)[model_type] | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        sharpen(model)
    model.to(dtype).save_pretrained(path)
    return path


@torch.no_grad()
def sharpen(model: torch.nn.Module) -> None:
    """Every matrix doubles the scale of what passes; norms and biases depart from 1 and 0, so that none can be lost."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    table = embedding.weight
    for name, weight in model.named_parameters():
        if weight is table:
            weight.normal_(0.0, 0.25 / float(getattr(embedding, "scalar_embed_scale", 1.0)))
        elif "bias" in name.rsplit(".", 1)[-1] or name.endswith("sinks"):
            weight.normal_(0.0, 0.3)
        elif weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(0.0, 2.0 * weight.shape[-1] ** -0.5)
