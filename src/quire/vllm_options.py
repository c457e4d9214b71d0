"""Options of vLLM that Quire lacks: the values that ask for nothing are accepted, all others are refused with advice.

Command lines and notebooks written for vLLM name them. `EngineConfig.from_options` and the flags of the commands read
these tables. The rest of them, grouped, is in `vllm_rare_options`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ForeignOption:
    """One option. `accepted` are the values that ask for nothing; None always does."""

    accepted: tuple[object, ...]
    advice: str
    """What Quire does instead, and what to do."""
    harmless: bool = False
    """Every value is accepted: the option only tunes what Quire does not have."""
    several: bool = False
    """Its flag takes several values."""

    @property
    def is_switch(self) -> bool:
        return any(isinstance(value, bool) for value in self.accepted)

    def check(self, name: str, value: object) -> None:
        """Raise `ConfigError` for a value that asks for something."""
        if value is None or self.harmless or value in self.accepted:
            return
        wanted = f"it must be {self.accepted[0]}" if self.accepted else "leave it out"
        raise ConfigError(f"{name} is {value!r}; {wanted}: {self.advice}")


def _switch(advice: str, *, on: bool = False) -> ForeignOption:
    return ForeignOption((on,), advice)


def _ignored(advice: str, *, switch: bool = False) -> ForeignOption:
    return ForeignOption((False,) if switch else (), advice, harmless=True)


_RANKS = "Quire divides every layer; see tensor_parallel_size"
_ROPE = "write it into the model's config.json"
_NO_REDUCE = "sums over ranks are NCCL's or gloo's"
_FOLDER = "hub files are in the cache of huggingface_hub; set HF_HOME to move it"

FOREIGN_OPTIONS: Mapping[str, ForeignOption] = MappingProxyType(
    {
        "decode_context_parallel_size": ForeignOption((1,), _RANKS),
        "enable_expert_parallel": _switch("Quire divides every expert; see tensor_parallel_size"),
        "distributed_executor_backend": ForeignOption(("mp", "uni"), "ranks are processes of one machine"),
        "worker_use_ray": _switch("ranks are processes of one machine; replicas on Ray: quire cluster serve"),
        "disable_custom_all_reduce": _ignored(_NO_REDUCE, switch=True),
        "max_parallel_loading_workers": _ignored("Quire reads weights with all threads"),
        "trust_remote_code": _switch(
            "Quire never runs code from a checkpoint; a model needs a supported architecture (docs/models.md)"
        ),
        "model_impl": ForeignOption(
            ("auto",), "Quire takes its own class of a model, else transformers' with quire-llm[transformers]"
        ),
        "enable_chunked_prefill": _switch(
            "Quire always computes long prompts in chunks; see max_num_batched_tokens", on=True
        ),
        "num_scheduler_steps": ForeignOption((1,), "Quire plans every step; see async_scheduling"),
        "preemption_mode": ForeignOption((), "Quire resumes from device, host or disk, as measured; see swap_space"),
        "use_v2_block_manager": _ignored("Quire has one block manager", switch=True),
        "num_lookahead_slots": _ignored("Quire takes blocks when a draft needs them"),
        "max_seq_len_to_capture": _ignored("Quire captures steps by their number of tokens"),
        "compilation_config": _ignored("Quire does not compile models"),
        "disable_async_output_proc": _ignored("Quire answers in another process", switch=True),
        "disable_cascade_attn": _ignored("Quire chooses its attention by the step", switch=True),
        "disable_sliding_window": _switch("Quire keeps a model's windows; a smaller max_model_len avoids them"),
        "enable_sleep_mode": _switch("Quire holds its memory; stop the server to free it"),
        "cpu_offload_gb": ForeignOption((0,), "Quire keeps all weights on the device; try quantization or device cpu"),
        "calculate_kv_scales": _switch("Quire's KV types need no scales; see kv_cache_dtype"),
        "fully_sharded_loras": _switch("adapters need one rank"),
        "max_cpu_loras": _ignored("adapters that are not in one of max_loras slots are read from their folders"),
        "mm_processor_kwargs": ForeignOption(({},), "images are resized as the model's preprocessor_config.json says"),
        "allowed_local_media_path": ForeignOption(({},), "a client sends the image itself, as a data URL"),
        "tokenizer_mode": ForeignOption(("auto",), "Quire reads the tokenizer that the folder has"),
        "skip_tokenizer_init": _switch(
            "Quire reads a tokenizer if there is one; prompts may be token ids all the same"
        ),
        **dict.fromkeys(
            ("tokenizer_revision", "code_revision"), ForeignOption((), "one revision holds for all files; see revision")
        ),
        "hf_config_path": ForeignOption((), "config.json is the model folder's"),
        "hf_overrides": ForeignOption(({},), _ROPE),
        "rope_scaling": ForeignOption((), _ROPE),
        "rope_theta": ForeignOption((), _ROPE),
        "hf_token": ForeignOption((), "set HF_TOKEN in the environment"),
        "download_dir": ForeignOption((), _FOLDER),
        "config_format": ForeignOption(("auto", "hf"), "Quire reads Hugging Face's config.json"),
        "ignore_patterns": _ignored("Quire fetches only what it reads"),
        "use_tqdm_on_load": _ignored("verbose shows the phases of start-up", switch=True),
        "runner": ForeignOption(("auto", "generate", "pooling"), "one engine generates and embeds"),
        "convert": ForeignOption(("auto", "none", "embed"), "one engine generates and embeds"),
        "override_generation_config": ForeignOption(({},), "give the values in SamplingParams or in the request"),
        **dict.fromkeys(
            ("guided_decoding_backend", "structured_outputs_config"),
            _ignored("Quire has one grammar engine; see max_grammars"),
        ),
        "speculative_model": ForeignOption((), 'Quire drafts by n-grams: speculative_config \'{"method": "ngram"}\''),
        "num_speculative_tokens": ForeignOption((), "it is a key of speculative_config"),
        "quantization_param_path": ForeignOption((), "Quire's KV types need no scales; see kv_cache_dtype"),
        **dict.fromkeys(
            ("disable_log_requests", "enable_log_requests", "disable_uvicorn_access_log"),
            _ignored("Quire writes no line per request; see access_log", switch=True),
        ),
        **dict.fromkeys(("uvicorn_log_level", "max_log_len"), _ignored("Quire writes no line per request")),
        "enable_reasoning": _ignored("reasoning_parser says it all", switch=True),
        "enable_prompt_tokens_details": _ignored("usage always has cached tokens", switch=True),
        "chat_template": ForeignOption((), "put it into the model's folder as chat_template.jinja"),
        "chat_template_content_format": _ignored("Quire finds the form that the template takes"),
        "response_role": ForeignOption(("assistant",), "answers have the role assistant"),
        "collect_detailed_traces": _ignored("a span has the seconds of each phase; see otlp_traces_endpoint"),
        "enable_ssl_refresh": _ignored("Quire reads renewed certificates by itself", switch=True),
        "ssl_ciphers": ForeignOption((), "Quire takes the ciphers that OpenSSL takes by default"),
        "api_server_count": ForeignOption((1,), "one process answers; run a server per GPU behind a proxy"),
    }
)

RENAMED = MappingProxyType(
    {
        **dict.fromkeys(
            ("max_seq_len", "max_seq_length", "max_sequence_length", "max_length", "max_context_len", "context_length"),
            "max_model_len",
        ),
        **dict.fromkeys(("n_ctx", "num_ctx", "ctx_size", "max_context_length", "max_total_tokens"), "max_model_len"),
        **dict.fromkeys(("max_batch_size", "max_running_requests", "max_concurrent_requests"), "max_num_seqs"),
        **dict.fromkeys(("gpu_memory_fraction", "mem_fraction_static"), "gpu_memory_utilization"),
        **dict.fromkeys(("n_threads", "num_threads"), "threads"),
        **dict.fromkeys(("model_path", "model_name", "model_id"), "model"),
        **dict.fromkeys(("tp", "tp_size"), "tensor_parallel_size"),
        **dict.fromkeys(("pp", "pp_size"), "pipeline_parallel_size"),
        "tokenizer_path": "tokenizer",
        "torch_dtype": "dtype",
        "disable_cuda_graph": "enforce_eager",
    }
)
"""Names in other engines and in guesses → the name here, for the error about an unknown option."""
