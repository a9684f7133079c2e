"""`engine_kwargs`, under the names of vLLM's arguments (`AsyncEngineArgs`, `FrontendArgs`). Manta's own options are taken
there, too, by their own names. Imports the names of the settings."""

from collections.abc import Mapping
from typing import Any

from deploy.config.load import ENGINE_KEYS, ConfigError
from deploy.config.serve import TOOL_PARSERS
from deploy.ray_serve_llm.reading import Reading, Translation, engine, idle, off, one_of, only, refuse, refused, serve, within
from scheduler.protocol.sampling import MAX_LOGPROBS

SAID_ELSEWHERE = {"model", "groups", "max_groups", "accelerator_type", "local", "ray_address"}
DTYPES = {"half": "float16", "float": "float32"}
KV_DTYPES = {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"}
KERNELS = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
"""vLLM's names for formats that have the name of a kernel in them."""

TOOLS = {name: name for name in TOOL_PARSERS[2:]} | {"qwen3_xml": "qwen3_coder"}
REASONING = dict.fromkeys(("deepseek_r1", "deepseek_v3", "glm45", "qwen3"), "think") | {"openai_gptoss": "openai", "": "none"}
ATTENTION = {"FLASH_ATTN": "flash", "TRITON_ATTN": "triton", "CPU_ATTN": "cpu", "TORCH_SDPA": "cpu"}
GIB = 1 << 30

SOURCE = "everything is read from model_source, at its revision: leave it out"
CONFIG_JSON = "write it into the checkpoint's config.json"
TEXT = "prompts are text: leave it out"
LORA = "name adapters in lora: {NAME: FOLDER}, and how many are resident in max_loras, instead"
EXPERTS = "experts stay on the ranks on which they were read, and nothing is sent to them but sums: leave it out"
GRAPHS = "the graphs that are needed are captured; enforce_eager: true captures none"
NOT_HERE = "Manta has nothing of the kind: leave it out"


def _gib(value: Any) -> Any:
    return int(value * GIB) if isinstance(value, int | float) else f"{value}GiB"


def _length(value: Any) -> Any:
    """-1 and "auto" are the longest that the model takes, which is what is meant by none here."""
    return None if value in (-1, "auto") else value


def _opposite(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


def _tokenizer(translation: Translation, path: str, value: Any) -> None:
    if value != translation.model:
        refuse(path, value, f"the tokenizer is the checkpoint's own: put its files beside the weights, in {translation.model}")


def _tool_choice(translation: Translation, path: str, value: Any) -> None:
    if value:
        translation.idle.append(f"{path}: calls of tools are read wherever a request has tools")
    else:
        serve("tool_parser")(translation, path, "none")


def _max_logprobs(_: Translation, path: str, value: Any) -> None:
    if not isinstance(value, int) or not 0 <= value <= MAX_LOGPROBS:
        refuse(path, value, f"a request may ask for {MAX_LOGPROBS} at most: lower it, or leave it out")


def _api_key(_: Translation, path: str, _value: Any) -> None:
    """Says nothing of the key."""
    raise ConfigError(f"{path}: say `serve: {{api_key_file: FILE}}` beside llm_configs instead, or set MANTA_API_KEYS")


def _hf_token(_: Translation, path: str, value: Any) -> None:
    """Says nothing of the token. True: the one that is found where huggingface_hub looks."""
    if value is not True:
        raise ConfigError(f"{path}: set HF_TOKEN in the environment of every node instead, or run `hf auth login` there")


def _images(_: Translation, path: str, value: Any) -> None:
    if not isinstance(value, Mapping) or any(value.values()):
        refuse(path, value, TEXT)


reasoning_parser = one_of(
    REASONING, serve, "reasoning_parser", "leave it out: without it the chat template says how a model marks its thoughts"
)
grammar_backend = idle("grammars and schemas are llguidance's here")

TRANSLATED: dict[str, Reading] = {
    "dtype": engine("dtype", lambda value: DTYPES.get(value, value) if isinstance(value, str) else value),
    "kv_cache_dtype": one_of(KV_DTYPES, engine, "kv_dtype", "leave it out: KV has the type of the weights"),
    "quantization": engine("quantization", lambda value: KERNELS.get(value, value) if isinstance(value, str) else value),
    "max_model_len": engine("max_model_len", _length),
    "gpu_memory_utilization": engine("gpu_memory_fraction"),
    "kv_cache_memory_bytes": engine("kv_memory"),
    "swap_space": engine("host_kv_memory", _gib),
    "enforce_eager": engine("cuda_graphs", _opposite),
    "disable_custom_all_reduce": engine("custom_all_reduce", _opposite),
    "attention_backend": one_of(ATTENTION, engine, "attention", "leave it out: the fastest that fits is taken"),
    "chat_template": serve("chat_template"),
    "tool_call_parser": one_of(
        TOOLS, serve, "tool_parser", "leave it out: without it the chat template says how a model calls tools"
    ),
    "enable_auto_tool_choice": _tool_choice,  # behind the parser: False counts above it
    "reasoning_parser": reasoning_parser,
}

AS_HERE: dict[str, Reading] = {
    "tokenizer": _tokenizer,
    "tokenizer_mode": only(("auto", "hf", "fast"), "the tokenizer is the checkpoint's tokenizer.json: leave it out"),
    "config_format": only(("auto", "hf"), "a checkpoint is a Hugging Face folder with a config.json: convert it"),
    "load_format": only(("auto", "safetensors"), "weights are read from safetensors files: convert them"),
    "task": only(("auto", "generate"), "the model generates text: docs/api.md has what its endpoint answers"),
    "runner": only(("auto", "generate"), "the model generates text: docs/api.md has what its endpoint answers"),
    "convert": only(("auto", "none"), "the model generates text: docs/api.md has what its endpoint answers"),
    "pipeline_parallel_size": only((1,), "a group is tensor-parallel on one node: raise tensor_parallel_size instead"),
    "decode_context_parallel_size": only((1,), NOT_HERE),
    "max_num_partial_prefills": only((1,), NOT_HERE),
    "max_long_partial_prefills": only((1,), NOT_HERE),
    "data_parallel_size": only((1,), "each replica is a group here: say deployment_config.num_replicas instead"),
    "distributed_executor_backend": only(("ray",), "ranks are Ray actors: leave it out"),
    "enable_chunked_prefill": only((True,), "prompts go in chunks of max_num_batched_tokens: raise that instead"),
    "logprobs_mode": only(("raw_logprobs",), "log-probabilities are those before temperature and penalties: leave it out"),
    "max_logprobs": _max_logprobs,
    "generation_config": only(
        ("vllm",), "requests that say no temperature have OpenAI's default: say it in each, and leave this out"
    ),
    "model_impl": only(("auto", "vllm"), "models are Manta's own: leave it out"),
    "limit_mm_per_prompt": _images,
    "response_role": only(("assistant",), "answers are the assistant's: leave it out"),
    "structured_outputs_config": within(
        {
            "backend": grammar_backend,
            "disable_fallback": idle("there is one backend"),
            "disable_any_whitespace": off(NOT_HERE),
            "disable_additional_properties": off(NOT_HERE),
            "reasoning_parser": reasoning_parser,
            "enable_in_reasoning": off("thoughts come before what a grammar says: leave it out"),
        }
    ),
}

CHANGES_NOTHING: dict[str, Reading] = {
    "trust_remote_code": idle("no code of a checkpoint's is ever run"),
    "use_tqdm_on_load": idle("the log and the status page say how far a group is"),
    "scheduling_policy": idle("a request's priority always counts, and equal ones go by arrival and account"),
    "async_scheduling": idle("a GPU's next step is planned while one runs"),
    "prefix_caching_hash_algo": idle("blocks are hashed by what protects accounts from one another"),
    "disable_log_stats": idle("/metrics and the status page are always there"),
    "disable_log_requests": idle("requests are logged only with request_log"),
    "enable_prompt_tokens_details": idle("cached_tokens is always told"),
    "chat_template_content_format": idle("contents are given to the template as it reads them"),
    "disable_cascade_attn": idle("attention is Manta's choice"),
    "max_parallel_loading_workers": idle("each rank reads its own part of the weights"),
    "guided_decoding_backend": grammar_backend,
    "guided_decoding_disable_fallback": idle("there is one backend"),
    "compilation_config": idle("kernels are Manta's own, and graphs are captured: enforce_eager: true captures none"),
    "max_seq_len_to_capture": idle(GRAPHS),
    "cuda_graph_sizes": idle(GRAPHS),
    "cudagraph_capture_sizes": idle(GRAPHS),
    "max_cudagraph_capture_size": idle(GRAPHS),
}

MISSING: dict[str, Reading] = {
    "model": refused("say model_loading_config.model_source instead"),
    "served_model_name": refused("say model_loading_config.model_id instead"),
    "groups": refused("say deployment_config.num_replicas, or autoscaling_config, instead"),
    "max_groups": refused("say deployment_config.autoscaling_config.max_replicas instead"),
    "speculative_config": refused("there is no speculative decoding: leave it out"),
    "kv_transfer_config": refused("groups fetch each other's blocks by themselves (prefix_fetch): leave it out"),
    "kv_events_config": refused("the scheduler owns every block, and nobody else needs to know: leave it out"),
    "kv_offloading_size": refused("say host_kv_memory instead, which is of each rank, such as 16GiB"),
    "kv_offloading_backend": refused("say host_kv_memory instead, which is of each rank, such as 16GiB"),
    "num_gpu_blocks_override": refused("say kv_cache_memory_bytes instead, which is of each GPU"),
    "otlp_traces_endpoint": refused("say `serve: {otlp_endpoint: ...}` beside llm_configs: OTLP over HTTP"),
    "enable_log_requests": off("say `serve: {request_log: FILE}` beside llm_configs: lengths and hashes, never content"),
    "api_key": _api_key,
    "hf_token": _hf_token,
    "cpu_offload_gb": off("weights stay on the GPU: raise tensor_parallel_size instead"),
    "override_generation_config": off("requests say what they want: leave it out"),
    "skip_tokenizer_init": off("the doors take and give text: leave it out"),
    "scheduler_cls": refused("the scheduler is what Manta is: leave it out"),
    "worker_cls": refused("ranks are Manta's own: leave it out"),
    "worker_extension_cls": refused("ranks are Manta's own: leave it out"),
    **dict.fromkeys(("code_revision", "tokenizer_revision", "hf_config_path"), refused(SOURCE)),
    **dict.fromkeys(("hf_overrides", "rope_scaling", "rope_theta"), off(CONFIG_JSON)),
    **dict.fromkeys(("enable_eplb", "eplb_config", "all2all_backend"), off(EXPERTS)),
    **dict.fromkeys(
        (
            "enable_lora", "max_cpu_loras", "lora_dtype", "lora_extra_vocab_size", "lora_modules", "fully_sharded_loras",
            "default_mm_loras",
        ),
        off(LORA),
    ),
    **dict.fromkeys(
        (
            "mm_processor_kwargs", "mm_processor_cache_gb", "mm_encoder_tp_mode", "media_io_kwargs", "allowed_local_media_path",
            "allowed_media_domains", "disable_mm_preprocessor_cache", "skip_mm_profiling", "interleave_mm_strings",
            "enable_mm_embeds", "enable_prompt_embeds", "language_model_only",
        ),
        off(TEXT),
    ),
    **dict.fromkeys(
        (
            "additional_config", "calculate_kv_scales", "collect_detailed_traces", "data_parallel_address",
            "data_parallel_backend", "data_parallel_rank", "data_parallel_rpc_port", "data_parallel_size_local",
            "data_parallel_start_rank", "default_chat_template_kwargs",
            "disable_hybrid_kv_cache_manager", "disable_sliding_window", "enable_force_include_usage",
            "enable_server_load_tracking", "enable_sleep_mode", "exclude_tools_when_tool_choice_none", "ignore_patterns",
            "io_processor_plugin", "kv_sharing_fast_prefill", "logits_processor_pattern", "logits_processors",
            "long_prefill_token_threshold",
            "model_loader_extra_config", "num_lookahead_slots", "override_attention_dtype", "override_pooler_config",
            "pooler_config", "ray_workers_use_nsight", "return_tokens_as_token_ids", "trust_request_chat_template",
        ),
        off(NOT_HERE),
    ),
}  # fmt: skip

ENGINE_KWARGS: dict[str, Reading] = {
    **{name: engine(name) for name in ENGINE_KEYS if name not in SAID_ELSEWHERE},
    **TRANSLATED,
    **AS_HERE,
    **CHANGES_NOTHING,
    **MISSING,
}
