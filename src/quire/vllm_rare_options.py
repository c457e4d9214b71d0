"""The rest of vLLM's options, in groups that share their advice, and the short forms of its flags.

Names and defaults are those of vLLM 0.32, and of older versions that scripts still name.
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType

from quire.errors import ConfigError, RequestError
from quire.vllm_options import FOREIGN_OPTIONS, ForeignOption

DEFAULT_MAX_IMAGES = 16
_OFF: tuple[object, ...] = (False,)
_UNSET: tuple[object, ...] = ()
_EMPTY: tuple[object, ...] = ({}, "{}", "[]", "")


def _words(text: str) -> list[str]:
    return text.split()


_REFUSED: Sequence[tuple[str, Mapping[str, tuple[object, ...]]]] = (
    (
        "an engine runs on one machine; `quire cluster serve` and `quire router` use several",
        {
            **dict.fromkeys(("headless", "data_parallel_hybrid_lb", "data_parallel_external_lb"), _OFF),
            **dict.fromkeys(("data_parallel_multi_port_external_lb", "enable_scale_out", "enable_elastic_ep"), _OFF),
            "nnodes": (1,),
            **dict.fromkeys(("node_rank", "data_parallel_rank", "data_parallel_start_rank"), (0,)),
        },
    ),
    ("Quire speaks HTTP", {"grpc": _OFF}),
    ("all engines of data_parallel_size run on this machine; leave it out", {"data_parallel_size_local": (1,)}),
    ("Quire divides every layer; see tensor_parallel_size", {"prefill_context_parallel_size": (1,)}),
    ("set CUDA_VISIBLE_DEVICES in the environment", {"device_ids": _UNSET}),
    (
        "start Quire under numactl or taskset",
        {"numa_bind": _OFF, "numa_bind_nodes": _UNSET, "numa_bind_cpus": _UNSET},
    ),
    ("only the model's own template is used; put it into the folder", {"trust_request_chat_template": _OFF}),
    ("a request sends chat_template_kwargs itself", {"default_chat_template_kwargs": _EMPTY}),
    ("a request sends return_tokens_as_token_ids itself", {"return_tokens_as_token_ids": _OFF}),
    ("a request sends stream_options.include_usage itself", {"enable_force_include_usage": _OFF}),
    (
        "formats of tool calls and reasoning are a table of Quire (docs/extending.md)",
        {"tool_parser_plugin": ("",), "reasoning_parser_plugin": ("",), "reasoning_config": _UNSET},
    ),
    ("a tool is strict if it says so", {"tool_strict_level": ("auto",)}),
    ("the client runs tools", {"tool_server": _UNSET}),
    (
        "access_log writes each request's tokens and milliseconds, otlp_traces_endpoint its phases",
        {"enable_per_request_metrics": _OFF},
    ),
    ("/metrics has the requests that run and wait", {"enable_server_load_tracking": _OFF}),
    ("prompts and answers are never logged", {"enable_log_outputs": _OFF}),
    (
        "put a proxy before the server (docs/deploy.md)",
        {"middleware": _UNSET},
    ),
    ("a page sends the API key in a header, for which browsers need no credentials", {"allow_credentials": _OFF}),
    ("/docs needs the API key, if there is one; a proxy can hide it", {"disable_fastapi_docs": _OFF}),
    (
        "an allowed origin may send GET, POST and DELETE, with all headers; see allow_origins",
        dict.fromkeys(("allowed_methods", "allowed_headers"), ("*", ["*"], '["*"]')),
    ),
    ("Quire reads the quantisation from the checkpoint", {"quantization_config": _UNSET}),
    ("a request sets logprobs_mode itself", {"logprobs_mode": ("raw_logprobs",)}),
    (
        "answers hold tokens and log-probabilities only",
        {
            **dict.fromkeys(("enable_return_routed_experts", "return_sampling_mask", "enable_trace_replay"), _OFF),
            "return_hidden_states": _OFF,
            "per_request_spec_decode_metrics": ("none",),
        },
    ),
    ("prompts are text, token ids and images", {"enable_prompt_embeds": _OFF, "enable_mm_embeds": _OFF}),
    (
        "see pooling_type",
        {"pooler_config": _UNSET, "override_pooler_config": _UNSET},
    ),
    (
        "Quire loads no classes of others; docs/extending.md shows where they go",
        {
            "model_class_overrides": _EMPTY,
            **dict.fromkeys(("io_processor_plugin", "scheduler_cls"), _UNSET),
            "worker_cls": ("auto",),
            "worker_extension_cls": ("",),
        },
    ),
    ("Quire reads the files itself", {"model_loader_extra_config": _EMPTY}),
    ("recurrent states have the type that their model was tested with", {"mamba_cache_dtype": ("auto",)}),
    ("recurrent states have the type that their model was tested with", {"mamba_ssm_cache_dtype": ("auto", "float32")}),
    ("all layers keep kv_cache_dtype", {"kv_cache_dtype_skip_layers": _UNSET}),
    (
        "Quire keeps all weights on the device; try quantization or device cpu",
        {"offload_backend": ("auto",), "cpu_offload_params": _UNSET, "offload_params": _UNSET},
    ),
    ("blocks go to swap_space and disk_cache", {"kv_offloading_backend": ("native",)}),
    (
        "set max_images 0 to refuse images",
        {"language_model_only": _OFF, "mm_encoder_only": _OFF, "media_io_kwargs": _EMPTY},
    ),
    ("Quire reads no video", {"video_pruning_rate": _UNSET}),
    (
        "adapters are applied as their files say (docs/adapters.md)",
        {
            **dict.fromkeys(("enable_tower_connector_lora", "enable_prompt_adapter"), _OFF),
            **dict.fromkeys(("lora_target_modules", "default_mm_loras", "qlora_adapter_name_or_path"), _UNSET),
            "lora_dtype": ("auto",),
        },
    ),
    ("see log_format and access_log", {"logging_config": _UNSET, "log_config_file": _UNSET}),
    ("see max_num_batched_tokens", {"max_num_scheduled_tokens": _UNSET}),
    ("see max_num_seqs", {"max_num_active_seqs": _UNSET}),
    ("see max_queue_size, which counts requests", {"max_num_queued_tokens": _UNSET}),
    ("the scheduler chooses how much memory it leaves free", {"watermark": (0, 0.01)}),
    (
        'write speculative_config \'{"method": "ngram"}\'',
        {
            **dict.fromkeys(("spec_method", "spec_model", "spec_tokens", "ngram_prompt_lookup_max"), _UNSET),
            "ngram_prompt_lookup_min": _UNSET,
            "speculative_draft_tensor_parallel_size": (1,),
        },
    ),
    (
        "Quire lacks it",
        {
            **dict.fromkeys(("watermark_config", "diffusion_config", "engram_config", "ec_transfer_config"), _UNSET),
            **dict.fromkeys(("weight_transfer_config", "custom_histogram_buckets"), _UNSET),
            "tokens_only": _OFF,
        },
    ),
    ("see attention_backend", {"attention_config": _EMPTY}),
    ("run `quire bench` under a profiler such as py-spy", {"profiler_config": _EMPTY}),
)
"""(advice, option → the values that ask for nothing)"""

_HARMLESS: Sequence[tuple[str, str]] = (
    (
        "an engine runs on one machine",
        "master_addr master_port distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "data_parallel_address data_parallel_rpc_port data_parallel_backend data_parallel_supervisor_port "
        "dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s dp_supervisor_probe_failure_threshold "
        "dp_sync_interval dcp_comm_backend dcp_kv_cache_interleave_size cp_kv_cache_interleave_size all2all_backend "
        "elastic_ep_max_dp_size expert_placement_strategy eplb_config mm_encoder_tp_mode",
    ),
    (
        "Quire has no such part to tune",
        "ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold mamba_backend mamba_ssu_algorithm "
        "mamba_cache_philox_rounds mamba_block_size mamba_cache_mode prefix_match_unit replayssm_buffer_len "
        "prefix_caching_hash_algo prefix_cache_retention_interval offload_group_size offload_num_in_group "
        "offload_prefetch_step mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm "
        "mm_shm_cache_max_object_size_mb mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin video_pruning_method mm_tensor_ipc "
        "mm_processor_device mm_ipc_gpu_memory_gb max_lora_cls_labels lora_extra_vocab_size "
        "long_lora_scaling_factors long_prefill_token_threshold max_long_partial_prefills prefill_schedule_interval "
        "stream_interval scheduler_delay_factor max_context_len_to_capture cudagraph_capture_sizes "
        "max_cudagraph_capture_size cuda_graph_sizes ir_op_priority kernel_config moe_backend linear_backend "
        "sparse_indexer_topk_backend gdn_prefill_backend kda_prefill_backend kda_decode_backend "
        "ec_manager_config additional_config aux_output_config mamba_config optimization_level performance_mode "
        "renderer_num_workers safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size pt_load_map_location sleep_preserve_parameter_names "
        "jit_monitor_mode h11_max_incomplete_event_size h11_max_header_count max_prompt_adapters "
        "max_prompt_adapter_token",
    ),
    ("Quire restarts an engine that dies and resumes its requests", "fault_tolerance_config"),
    ("Quire speaks HTTP", "grpc_port"),
    ("Quire has one level of logs", "log_level"),
    ("access_log leaves out /health, and no other endpoint", "disable_access_log_for_endpoints"),
    ("/metrics has Quire's own figures", "show_hidden_metrics_for_version kv_cache_metrics_sample"),
    (
        "answers have Quire's form",
        "cohere_format anthropic_disabled_thinking_effort fingerprint_mode fingerprint_value",
    ),
    ("an answer's stream is silent between tokens; a proxy's read timeout must be longer", "sse_keep_alive_interval"),
)
"""(why the options change nothing, their names); every value is accepted."""

_HARMLESS_SWITCHES: Sequence[tuple[str, str]] = (
    (
        "Quire has no such part to switch",
        "trust_request_mm_kwargs exclude_tools_when_tool_choice_none enable_log_deltas cohere_is_reasoning_model "
        "log_error_stack enable_flash_late_interaction allow_deprecated_quantization use_fp64_gumbel "
        "sleep_mode_offload_cudagraph enable_cumem_allocator enable_nccl_comm_suspend "
        "enable_mamba_cache_stochastic_rounding dcp_q_replicate enable_hc_sp enable_batch_sharded_sampling "
        "enable_ep_weight_filter enable_dbo enable_shm_tensor_arena disable_nccl_for_dp_synchronization enable_eplb "
        "ray_workers_use_nsight engine_use_ray kv_sharing_fast_prefill swa_bounded_replay "
        "enable_mamba_shared_prefix_checkpoint use_replayssm interleave_mm_strings skip_mm_profiling "
        "mm_device_do_normalize specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras "
        "long_prefill_token_threshold_adaptive disable_chunked_mm_input scheduler_reserve_full_isl "
        "disable_hybrid_kv_cache_manager enable_flashinfer_autotune jit_monitor_verbose aggregate_engine_logging "
        "fail_on_environ_validation disable_frontend_multiprocessing multi_step_stream_outputs "
        "disable_mm_preprocessor_cache disable_mm_processor_cache enable_layerwise_nvtx_tracing",
    ),
    ("Quire restarts an engine that dies and resumes its requests", "enable_fault_tolerance"),
    ("/metrics has Quire's own figures", "kv_cache_metrics cudagraph_metrics enable_mfu_metrics "
     "enable_logging_iteration_details enable_mm_processor_stats"),
    ("it is always so", "enable_tokenizer_info_endpoint enable_request_id_headers enable_offline_docs"),
)  # fmt: skip
"""The same for switches."""

_SEVERAL = frozenset(
    {
        *("cudagraph_capture_sizes", "cuda_graph_sizes", "numa_bind_nodes", "numa_bind_cpus", "lora_target_modules"),
        *("cpu_offload_params", "offload_params", "kv_cache_dtype_skip_layers", "sleep_preserve_parameter_names"),
        *("middleware", "long_lora_scaling_factors", "custom_histogram_buckets", "disable_access_log_for_endpoints"),
    }
)
"""Options whose flags take several values."""

RARE_OPTIONS: Mapping[str, ForeignOption] = MappingProxyType(
    {
        **{
            name: ForeignOption(accepted, advice, several=name in _SEVERAL)
            for advice, options in _REFUSED
            for name, accepted in options.items()
        },
        **{
            name: ForeignOption((), advice, harmless=True, several=name in _SEVERAL)
            for advice, names in _HARMLESS
            for name in names.split()
        },
        **{
            name: ForeignOption((False,), advice, harmless=True)
            for advice, names in _HARMLESS_SWITCHES
            for name in names.split()
        },
    }
)
ALL_FOREIGN_OPTIONS: Mapping[str, ForeignOption] = MappingProxyType({**RARE_OPTIONS, **FOREIGN_OPTIONS})
"""Option of vLLM that Quire lacks → what it accepts of it."""

SHORT_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "tensor_parallel_size": "-tp",
        "pipeline_parallel_size": "-pp",
        "data_parallel_size": "-dp",
        "decode_context_parallel_size": "-dcp",
        "prefill_context_parallel_size": "-pcp",
        "data_parallel_rank": "-dpn",
        "data_parallel_start_rank": "-dpr",
        "data_parallel_size_local": "-dpl",
        "data_parallel_address": "-dpa",
        "data_parallel_rpc_port": "-dpp",
        "data_parallel_backend": "-dpb",
        "data_parallel_hybrid_lb": "-dph",
        "data_parallel_external_lb": "-dpe",
        "data_parallel_multi_port_external_lb": "-dpm",
        "enable_expert_parallel": "-ep",
        "nnodes": "-n",
        "node_rank": "-r",
        "api_server_count": "-asc",
        "quantization": "-q",
        "speculative_config": "-sc",
        "diffusion_config": "-dc",
        "compilation_config": "-cc",
        "attention_config": "-ac",
    }
)
"""Option → vLLM's short form of its flag."""

_STORED = "leave it out: Quire reads how the checkpoint stores its weights; int8 and int4 quantise while loading"
_FILES = "leave it out: Quire finds the form of the files"
_BACKEND = "leave it out: Quire takes the device's best kernels"
_CARD = "give cuda; CUDA_VISIBLE_DEVICES in the environment chooses the card"
FOREIGN_VALUES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "quantization": dict.fromkeys(
            [
                "aqlm",
                "auto-round",
                "awq",
                "awq_marlin",
                "bitblas",
                "bitsandbytes",
                "compressed-tensors",
                "deepspeedfp",
                "experts_int8",
                "fbgemm_fp8",
                "fp8",
                "gguf",
                "gptq",
                "gptq_bitblas",
                "gptq_marlin",
                "gptq_marlin_24",
                "hqq",
                "inc",
                "ipex",
                "marlin",
                "modelopt",
                "modelopt_fp4",
                "moe_wna16",
                "mxfp4",
                "petit_nvfp4",
                "ptpc_fp8",
                "quark",
                "rtn",
                "torchao",
            ],
            _STORED,
        ),
        "load_format": dict.fromkeys(
            [
                "bitsandbytes",
                "dummy_hf",
                "fastsafetensors",
                "gguf",
                "hf",
                "instanttensor",
                "mistral",
                "npcache",
                "pt",
                "runai_streamer",
                "runai_streamer_sharded",
                "sharded_state",
                "tensorizer",
            ],
            _FILES,
        ),
        "attention_backend": dict.fromkeys(
            [
                "cpu_attn",
                "flash_attn",
                "flash_attn_vllm_v1",
                "flashinfer",
                "flashinfer_mla",
                "flashmla",
                "flex_attention",
                "rocm_flash",
                "torch_sdpa",
                "triton_attn",
                "triton_attn_vllm_v1",
                "triton_mla",
                "xformers",
            ],
            _BACKEND,
        ),
        "device": {"gpu": _CARD, **{f"cuda:{index}": _CARD for index in range(16)}},
    }
)
"""Option → value of vLLM that Quire lacks, in lower case → what to do."""


def read_max_images(value: object) -> object:
    """The images of vLLM's limit_mm_per_prompt, an object or its JSON. Raises `ConfigError` for limits of other
    things."""
    limits = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            limits = json.loads(value)
    if not isinstance(limits, Mapping) or not limits.keys() <= {"image", "video", "audio"}:
        raise ConfigError(f"limit_mm_per_prompt is {value!r}; give a number of images, such as '{{\"image\": 4}}'")
    return limits.get("image", DEFAULT_MAX_IMAGES)


def _gibibytes(value: object) -> object:
    """vLLM counts the memory of its offloading in GiB."""
    return f"{value}GiB" if isinstance(value, int | float) and value else value or None


TRANSLATED_OPTIONS: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "limit_mm_per_prompt": ("max_images", read_max_images),
    "kv_offloading_size": ("swap_space", _gibibytes),
}
"""vLLM's name → Quire's, and Quire's value of vLLM's."""


def advice_for(name: str, value: object) -> str:
    """What to do about a value that vLLM has for an option and Quire has not; "" for other values."""
    advice = FOREIGN_VALUES.get(name, {}).get(str(value).lower())
    return f"; {advice}" if advice else ""


_FOREIGN_SAMPLING_FIELDS = {
    "extra_args": "extra holds labels for logits processors",
    "flat_logprobs": "log-probabilities have one form; leave it out",
    "guided_decoding": "use structured_outputs",
    "logprob_token_ids": "logprobs=-1 reports the whole vocabulary",
    "output_kind": "LLM returns whole outputs, AsyncLLM streams what is new; leave it out",
    "prompt_logprob_start": "prompt_logprobs reports all positions",
    "prompt_logprob_token_ids": "prompt_logprobs=-1 reports the whole vocabulary",
    "repetition_detection": "see repetition_penalty and max_tokens",
    "skip_reading_prefix_cache": "a cache_salt of its own keeps a request from the prefix cache",
    "stream_interval": "AsyncLLM streams what each step adds; leave it out",
    "thinking_token_budget": "see max_tokens",
    "use_beam_search": "set beam_width, or call LLM.beam_search",
    "watermarking": "Quire lacks it",
}
"""Fields that vLLM's SamplingParams has or had, and Quire's lacks → what to do."""


def check_sampling_fields(given: Set[str], known: Set[str]) -> None:
    """Raise `RequestError` for a field that `SamplingParams` does not have."""
    if given <= known:
        return
    name = min(given - known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = _FOREIGN_SAMPLING_FIELDS.get(name) or (f"did you mean {near[0]}?" if near else "leave it out")
    raise RequestError(f"SamplingParams has no {name}: {hint}", param=name)
