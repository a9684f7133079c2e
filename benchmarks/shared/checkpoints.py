"""Random checkpoints in the shape of Qwen3, Qwen3-MoE and gpt-oss for benchmarks: the right sizes, no tokenizer, no download.

May import torch and safetensors; never imports Manta, so that a peer can be measured on a checkpoint alone.
Weights are written one layer at a time, so a checkpoint never has to fit in memory beside an engine.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide a model's cost. tied: the embedding is also the head. experts: in each layer, `intermediate` wide,
    of which a token goes through `per_token`; 0: a dense model. gpt_oss: of that family, its experts in MXFP4; else Qwen3's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    max_positions: int = 40_960
    experts: int = 0
    per_token: int = 0
    gpt_oss: bool = False

    def config(self) -> dict[str, object]:
        """The `config.json` of the checkpoint, in the keys of a published checkpoint of the family."""
        if self.gpt_oss:
            return self._dense_config() | self._gpt_oss_config()
        return self._dense_config() | (self._experts_config() if self.experts else {})

    def _gpt_oss_config(self) -> dict[str, object]:
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(self.layers)],
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]},
        }  # fmt: skip

    def _experts_config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _dense_config(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 32, 128, 512, tied=False),
    "0.1B": Shape(768, 12, 12, 4, 64, 2048, 32_768, tied=False),
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151_936, tied=True),
    "8B": Shape(4096, 36, 32, 8, 128, 12_288, 151_936, tied=False),
    "8B-9": Shape(4096, 9, 32, 8, 128, 12_288, 151_936, tied=False),  # a quarter of its layers
    "30B-A3B": Shape(2048, 48, 32, 4, 128, 768, 151_936, tied=False, experts=128, per_token=8),
    "30B-A3B-12": Shape(2048, 12, 32, 4, 128, 768, 151_936, tied=False, experts=128, per_token=8),  # a quarter of its layers
    "70B": Shape(8192, 80, 64, 8, 128, 28_672, 128_256, tied=False),  # 141 GB: a host of two GPUs has them in /dev/shm
    "20B-A4B": Shape(2880, 24, 64, 8, 64, 2880, 201_088, False, 131_072, experts=32, per_token=4, gpt_oss=True),
}


MXFP4_SCALE = 120
"""2 to the power of -7: four random bits then spread as far as all other weights, by 0.02."""


def ensure_checkpoint(name: str, cache: Path, seed: int = 0) -> Path:
    """Return the folder of the named checkpoint under `cache`, creating it unless a complete one is there.

    Invariant: a folder under its final name is complete, since it is renamed into place as the last step.
    Raises KeyError for a name that is not in `SHAPES`.
    """
    shape = SHAPES[name]
    folder = cache / (f"gpt-oss-{name}-mxfp4-seed{seed}" if shape.gpt_oss else f"qwen3-{name}-bf16-seed{seed}")
    if folder.is_dir():
        if json.loads((folder / "config.json").read_text()) == shape.config():
            return folder
        shutil.rmtree(folder)
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    draft.chmod(0o755)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 16 GB of numbers take a CPU minutes
    _write(shape, draft, torch.Generator(device).manual_seed(seed))
    draft.rename(folder)
    return folder


def _write(shape: Shape, folder: Path, generator: torch.Generator) -> None:
    weight_map: dict[str, str] = {}
    total_bytes = 0
    parts = list(_parts(shape))
    for number, names in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _tensor(name, size, generator) for name, size in names.items()}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def _tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    if name.endswith("_scales"):
        return torch.full(size, MXFP4_SCALE, dtype=torch.uint8)
    if name.endswith("_blocks"):
        return torch.randint(256, size, dtype=torch.uint8, device=generator.device, generator=generator).cpu()
    numbers = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return numbers.normal_(0.0, 0.02, generator=generator).cpu()


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each file, name -> size: the embeddings, then one file a layer."""
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.tied:
        outer["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    yield outer
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (q_size, shape.hidden),
        "self_attn.k_proj.weight": (kv_size, shape.hidden),
        "self_attn.v_proj.weight": (kv_size, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, q_size),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    layer |= _of_gpt_oss(shape, q_size, kv_size) if shape.gpt_oss else _of_qwen3(shape)
    for number in range(shape.layers):
        yield {f"model.layers.{number}.{name}": size for name, size in layer.items()}


def _of_qwen3(shape: Shape) -> dict[str, tuple[int, ...]]:
    """What a layer has beside its projections of attention."""
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": (shape.head_dim,) for name in ("q_norm", "k_norm")}
    if shape.experts:
        layer["mlp.gate.weight"] = (shape.experts, shape.hidden)
    for block in [f"mlp.experts.{number}" for number in range(shape.experts)] or ["mlp"]:
        layer[f"{block}.gate_proj.weight"] = (shape.intermediate, shape.hidden)
        layer[f"{block}.up_proj.weight"] = (shape.intermediate, shape.hidden)
        layer[f"{block}.down_proj.weight"] = (shape.hidden, shape.intermediate)
    return layer


def _of_gpt_oss(shape: Shape, q_size: int, kv_size: int) -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.bias": (q_size,),
        "self_attn.k_proj.bias": (kv_size,),
        "self_attn.v_proj.bias": (kv_size,),
        "self_attn.o_proj.bias": (shape.hidden,),
        "self_attn.sinks": (shape.heads,),
        "mlp.router.weight": (shape.experts, shape.hidden),
        "mlp.router.bias": (shape.experts,),
    }
    projections = ("gate_up_proj", 2 * shape.intermediate, shape.hidden), ("down_proj", shape.hidden, shape.intermediate)
    for name, rows, columns in projections:
        layer[f"mlp.experts.{name}_blocks"] = (shape.experts, rows, columns // 32, 16)
        layer[f"mlp.experts.{name}_scales"] = (shape.experts, rows, columns // 32)
        layer[f"mlp.experts.{name}_bias"] = (shape.experts, rows)
    return layer


def with_words(checkpoint: Path, vocabulary: int) -> Path:
    """The same checkpoint, by links, with a tokenizer: a word for each token id. What serves text needs one.

    Returns the folder, beside the other; complete once it is there.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = checkpoint.with_name(f"{checkpoint.name}-words")
    if folder.is_dir():
        return folder
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=checkpoint.parent))
    for file in checkpoint.iterdir():
        (draft / file.name).symlink_to(file)
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(draft / "tokenizer.json"))
    (draft / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    draft.chmod(0o755)
    draft.rename(folder)
    return folder
