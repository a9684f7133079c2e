"""vLLM's arguments, which Ray Serve LLM passes on: what each becomes, that it changes nothing, or the words that refuse it."""

from typing import Any

import pytest

from deploy.config.load import ENGINE_KEYS, ConfigError, endpoint_config
from deploy.ray_serve_llm.engine_kwargs import ENGINE_KWARGS, SAID_ELSEWHERE
from deploy.ray_serve_llm.llm_config import LLMConfig
from deploy.ray_serve_llm.reading import Translation

MODEL = "/models/Qwen3-8B"

BECOMES: list[tuple[str, Any, dict[str, Any]]] = [
    ("tensor_parallel_size", 2, {"tensor_parallel_size": 2}),
    ("max_model_len", 8192, {"max_model_len": 8192}),
    ("max_model_len", -1, {}),
    ("max_model_len", "auto", {}),
    ("max_num_seqs", 64, {"max_num_seqs": 64}),
    ("max_num_batched_tokens", 8192, {"max_num_batched_tokens": 8192}),
    ("gpu_memory_utilization", 0.85, {"gpu_memory_fraction": 0.85}),
    ("kv_cache_memory_bytes", 1 << 30, {"kv_memory": 1 << 30}),
    ("swap_space", 4, {"host_kv_memory": 4 << 30}),
    ("swap_space", 0, {"host_kv_memory": 0}),
    ("block_size", 16, {"block_size": 16}),
    ("kv_cache_dtype", "auto", {"kv_dtype": "auto"}),
    ("kv_cache_dtype", "fp8", {"kv_dtype": "fp8"}),
    ("kv_cache_dtype", "fp8_e4m3", {"kv_dtype": "fp8"}),
    ("dtype", "auto", {"dtype": "auto"}),
    ("dtype", "half", {"dtype": "float16"}),
    ("dtype", "float", {"dtype": "float32"}),
    ("dtype", "bfloat16", {"dtype": "bfloat16"}),
    ("enable_prefix_caching", False, {"enable_prefix_caching": False}),
    ("enable_expert_parallel", True, {"enable_expert_parallel": True}),
    ("quantization", "fp8", {"quantization": "fp8"}),
    ("quantization", "awq_marlin", {"quantization": "awq"}),
    ("enforce_eager", True, {"cuda_graphs": False}),
    ("enforce_eager", False, {"cuda_graphs": True}),
    ("disable_custom_all_reduce", True, {"custom_all_reduce": False}),
    ("seed", 7, {"seed": 7}),
    ("revision", "v2", {"revision": "v2"}),
    ("download_dir", "/cache", {"download_dir": "/cache"}),
    ("attention_backend", "FLASH_ATTN", {"attention": "flash"}),
    ("attention_backend", "TRITON_ATTN", {"attention": "triton"}),
    ("host_kv_memory", "16GiB", {"host_kv_memory": "16GiB"}),  # Manta's own
    ("tool_call_parser", "hermes", {"tool_parser": "hermes"}),
    ("tool_call_parser", "qwen3_xml", {"tool_parser": "qwen3_coder"}),
    ("enable_auto_tool_choice", False, {"tool_parser": "none"}),
    ("reasoning_parser", "qwen3", {"reasoning_parser": "think"}),
    ("reasoning_parser", "deepseek_r1", {"reasoning_parser": "think"}),
    ("reasoning_parser", "openai_gptoss", {"reasoning_parser": "openai"}),
    ("reasoning_parser", "", {"reasoning_parser": "none"}),
    ("structured_outputs_config", {"reasoning_parser": "glm45"}, {"reasoning_parser": "think"}),
    ("chat_template", "/models/chat.jinja", {"chat_template": "/models/chat.jinja"}),
]

AS_HERE: list[tuple[str, Any]] = [
    ("tokenizer", MODEL), ("tokenizer_mode", "auto"), ("config_format", "hf"), ("load_format", "safetensors"),
    ("task", "generate"), ("runner", "auto"), ("convert", "none"), ("pipeline_parallel_size", 1),
    ("data_parallel_size", 1), ("decode_context_parallel_size", 1), ("max_num_partial_prefills", 1),
    ("max_long_partial_prefills", 1), ("distributed_executor_backend", "ray"), ("enable_chunked_prefill", True),
    ("logprobs_mode", "raw_logprobs"), ("max_logprobs", 20), ("generation_config", "vllm"), ("model_impl", "vllm"),
    ("limit_mm_per_prompt", {"image": 0}), ("response_role", "assistant"), ("enable_lora", False), ("quantization", None),
    ("cpu_offload_gb", 0), ("hf_overrides", {}), ("enable_log_requests", False),
    ("mm_processor_kwargs", None), ("enable_sleep_mode", False), ("skip_tokenizer_init", False),
    ("override_generation_config", {}), ("hf_token", True),
]  # fmt: skip

CHANGES_NOTHING: list[tuple[str, Any, str]] = [
    ("trust_remote_code", True, "no code of a checkpoint's is ever run"),
    ("use_tqdm_on_load", False, "how far a group is"),
    ("scheduling_policy", "priority", "priority always counts"),
    ("async_scheduling", True, "planned while one runs"),
    ("prefix_caching_hash_algo", "sha256", "protects accounts"),
    ("disable_log_stats", True, "/metrics"),
    ("disable_log_requests", True, "request_log"),
    ("enable_prompt_tokens_details", True, "cached_tokens"),
    ("enable_auto_tool_choice", True, "wherever a request has tools"),
    ("chat_template_content_format", "auto", "as it reads them"),
    ("disable_cascade_attn", True, "attention"),
    ("max_parallel_loading_workers", 2, "its own part"),
    ("guided_decoding_backend", "xgrammar", "llguidance"),
    ("guided_decoding_disable_fallback", True, "one backend"),
    ("structured_outputs_config", {"backend": "xgrammar"}, "llguidance"),
    ("compilation_config", {"level": 3}, "enforce_eager"),
    ("max_seq_len_to_capture", 8192, "enforce_eager"),
    ("cuda_graph_sizes", [1, 2], "enforce_eager"),
    ("cudagraph_capture_sizes", [1, 2], "enforce_eager"),
    ("max_cudagraph_capture_size", 64, "enforce_eager"),
]

REFUSED: list[tuple[str, Any, str]] = [
    ("model", "/m", r"model_loading_config\.model_source"),
    ("served_model_name", "m", r"model_loading_config\.model_id"),
    ("groups", 2, r"deployment_config\.num_replicas"),
    ("max_groups", 2, r"autoscaling_config\.max_replicas"),
    ("tokenizer", "other/tokenizer", "put its files beside the weights"),
    ("tokenizer_mode", "mistral", r"tokenizer\.json"),
    ("config_format", "mistral", "Hugging Face folder"),
    ("load_format", "runai_streamer", "safetensors"),
    ("load_format", "dummy", "safetensors"),
    ("task", "embed", "generates text"),
    ("runner", "pooling", "generates text"),
    ("convert", "embed", "generates text"),
    ("dtype", "fp8", "choose one of auto, bfloat16"),
    ("kv_cache_dtype", "fp8_e5m2", "Manta has auto, fp8, fp8_e4m3; leave it out"),
    ("block_size", 8, "power of two from 16 up"),
    ("gpu_memory_utilization", 1.5, r"outside \(0, 1\]"),
    ("tensor_parallel_size", "two", "tensor_parallel_size: expected `int`"),
    ("swap_space", "much", "not a size"),
    ("enforce_eager", "no", "cuda_graphs: expected `bool`"),
    ("attention_backend", "FLASHINFER", "FLASH_ATTN, TRITON_ATTN"),
    ("pipeline_parallel_size", 2, "raise tensor_parallel_size instead"),
    ("data_parallel_size", 4, r"deployment_config\.num_replicas"),
    ("decode_context_parallel_size", 2, "leave it out"),
    ("max_num_partial_prefills", 2, "leave it out"),
    ("max_long_partial_prefills", 2, "leave it out"),
    ("distributed_executor_backend", "mp", "Ray actors"),
    ("enable_chunked_prefill", False, "max_num_batched_tokens"),
    ("logprobs_mode", "processed_logprobs", "before temperature"),
    ("max_logprobs", 100, "20 at most"),
    ("generation_config", "auto", "say it in each"),
    ("override_generation_config", {"temperature": 0.7}, "requests say"),
    ("model_impl", "transformers", "Manta's own"),
    ("limit_mm_per_prompt", {"image": 2}, "prompts are text"),
    ("response_role", "system", "the assistant's"),
    ("quantization", "bitsandbytes", "quantization: quantization='bitsandbytes'.* auto, fp8, compressed-tensors"),
    ("speculative_config", {"method": "ngram"}, "no speculative decoding"),
    ("kv_transfer_config", {"kv_connector": "NixlConnector"}, "prefix_fetch"),
    ("kv_events_config", {"publisher": "zmq"}, "owns every block"),
    ("kv_offloading_size", 16, "host_kv_memory"),
    ("kv_offloading_backend", "native", "host_kv_memory"),
    ("num_gpu_blocks_override", 100, "kv_cache_memory_bytes"),
    ("otlp_traces_endpoint", "http://c:4317", "otlp_endpoint"),
    ("enable_log_requests", True, "request_log"),
    ("api_key", "secret", "api_key_file"),
    ("cpu_offload_gb", 8, "tensor_parallel_size"),
    ("skip_tokenizer_init", True, "the doors take and give text"),
    ("scheduler_cls", "a.B", "leave it out"),
    ("worker_cls", "a.B", "leave it out"),
    ("worker_extension_cls", "a.B", "leave it out"),
    ("tool_call_parser", "granite", "the chat template says"),
    ("reasoning_parser", "granite", "the chat template says"),
    ("structured_outputs_config", {"enable_in_reasoning": True}, "enable_in_reasoning=True: thoughts come before"),
    ("structured_outputs_config", {"bakend": "x"}, r"structured_outputs_config\.bakend is unknown: did you mean 'backend'"),
    *((key, "main", "read from model_source") for key in ("code_revision", "tokenizer_revision", "hf_config_path")),
    ("hf_token", "secret", "set HF_TOKEN in the environment"),
    *((key, {"a": 1}, r"config\.json") for key in ("hf_overrides", "rope_scaling", "rope_theta")),
    *((key, True, "on which they were read") for key in ("enable_eplb", "eplb_config")),
    ("all2all_backend", "pplx", "on which they were read"),
    *(
        (key, 8, "name adapters in lora")
        for key in (
            "enable_lora", "max_cpu_loras", "lora_dtype", "lora_extra_vocab_size", "lora_modules", "fully_sharded_loras",
            "default_mm_loras",
        )
    ),
    *(
        (key, 1, "prompts are text")
        for key in (
            "mm_processor_kwargs", "mm_processor_cache_gb", "mm_encoder_tp_mode", "media_io_kwargs", "allowed_local_media_path",
            "allowed_media_domains", "disable_mm_preprocessor_cache", "skip_mm_profiling", "interleave_mm_strings",
            "enable_mm_embeds", "enable_prompt_embeds", "language_model_only",
        )
    ),
    *(
        (key, 1, "nothing of the kind")
        for key in (
            "additional_config", "calculate_kv_scales", "collect_detailed_traces", "data_parallel_address",
            "data_parallel_backend", "data_parallel_rank", "data_parallel_rpc_port", "data_parallel_size_local",
            "data_parallel_start_rank", "default_chat_template_kwargs", "disable_hybrid_kv_cache_manager",
            "disable_sliding_window", "enable_force_include_usage", "enable_server_load_tracking", "enable_sleep_mode",
            "exclude_tools_when_tool_choice_none", "ignore_patterns", "io_processor_plugin", "kv_sharing_fast_prefill",
            "logits_processor_pattern", "logits_processors", "long_prefill_token_threshold", "model_loader_extra_config",
            "num_lookahead_slots", "override_attention_dtype", "override_pooler_config", "pooler_config",
            "ray_workers_use_nsight", "return_tokens_as_token_ids", "trust_request_chat_template",
        )
    ),
    ("tensor_paralel_size", 2, r"engine_kwargs\.tensor_paralel_size is unknown: did you mean 'tensor_parallel_size'"),
    ("frobnicate", 1, "is unknown: leave it out"),
]  # fmt: skip


def translated(**engine_kwargs: Any) -> Translation:
    config = LLMConfig(model_loading_config={"model_id": "qwen", "model_source": MODEL}, engine_kwargs=engine_kwargs)
    return config.translate("LLMConfig")


NOTHING_SAID = translated()


def settings(translation: Translation) -> dict[str, Any]:
    """What was said, beyond what any model has."""
    return {
        name: value
        for section, bare in ((translation.engine, NOTHING_SAID.engine), (translation.serve, NOTHING_SAID.serve))
        for name, value in section.items()
        if name not in bare
    }


@pytest.mark.parametrize(("key", "value", "becomes"), BECOMES)
def test_what_becomes_a_setting(key: str, value: Any, becomes: dict[str, Any]) -> None:
    translation = translated(**{key: value})
    assert settings(translation) == becomes
    assert not translation.idle
    endpoint_config({"engine": translation.engine, "serve": translation.serve})


@pytest.mark.parametrize(("key", "value"), AS_HERE)
def test_what_is_so_here_in_any_case(key: str, value: Any) -> None:
    translation = translated(**{key: value})
    assert not settings(translation)
    assert not translation.idle


@pytest.mark.parametrize(("key", "value", "words"), CHANGES_NOTHING)
def test_what_changes_nothing_is_told(key: str, value: Any, words: str) -> None:
    translation = translated(**{key: value})
    assert not settings(translation)
    (line,) = translation.idle
    assert line.startswith(f"LLMConfig.engine_kwargs.{key}")
    assert words in line
    assert "secret" not in line


@pytest.mark.parametrize(("key", "value", "words"), REFUSED)
def test_what_is_refused_by_name(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        translated(**{key: value})
    assert str(refusal.value).startswith(f"LLMConfig.engine_kwargs.{key}")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("key", sorted(ENGINE_KWARGS))
def test_what_is_none_was_left_out(key: str) -> None:
    translation = translated(**{key: None})
    assert not settings(translation)
    assert not translation.idle


def test_each_argument_is_here() -> None:
    told = {key for key, *_ in (*BECOMES, *AS_HERE, *CHANGES_NOTHING, *REFUSED)}
    assert set(ENGINE_KWARGS) - set(ENGINE_KEYS) <= told
    assert set(ENGINE_KEYS) - SAID_ELSEWHERE <= set(ENGINE_KWARGS)


def test_what_is_said_twice_is_refused_once_it_differs() -> None:
    assert settings(translated(swap_space=4, host_kv_memory=4 << 30)) == {"host_kv_memory": 4 << 30}
    with pytest.raises(ConfigError, match=r"swap_space=4: LLMConfig.engine_kwargs.host_kv_memory says host_kv_memory='2GiB'"):
        translated(swap_space=4, host_kv_memory="2GiB")


def test_no_tools_at_all_counts_above_a_parser() -> None:
    assert settings(translated(tool_call_parser="hermes", enable_auto_tool_choice=False)) == {"tool_parser": "none"}
    assert settings(translated(tool_call_parser="hermes", enable_auto_tool_choice=True)) == {"tool_parser": "hermes"}
