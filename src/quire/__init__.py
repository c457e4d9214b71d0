"""Quire, an engine that serves large language models.

The names below are public. Each is imported on first use, so that `import quire` is fast and a process without a model
does not import torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME_OF = {
    "LLM": "quire.llm",
    "AsyncLLM": "quire.engine.async_engine",
    "BeamSearchOutput": "quire.outputs",
    "CompletionOutput": "quire.outputs",
    "ClassificationOutput": "quire.embeddings",
    "ClassificationRequestOutput": "quire.embeddings",
    "EmbeddingOutput": "quire.embeddings",
    "EmbeddingRequestOutput": "quire.embeddings",
    "RerankResult": "quire.embeddings",
    "ScoringOutput": "quire.embeddings",
    "ScoringRequestOutput": "quire.embeddings",
    "RegisteredPrefix": "quire.outputs",
    "RequestOutput": "quire.outputs",
    "EngineConfig": "quire.config",
    "LoRARequest": "quire.lora.request",
    "TextPrompt": "quire.inputs",
    "TokensPrompt": "quire.inputs",
    "BeamSearchParams": "quire.sampling_params",
    "BatchLogitsProcessor": "quire.sampling.logits_processors",
    "SamplingParams": "quire.sampling_params",
    "StructuredOutputsParams": "quire.structured_outputs",
    "CheckpointError": "quire.errors",
    "ConfigError": "quire.errors",
    "EngineDeadError": "quire.errors",
    "EngineUnavailableError": "quire.errors",
    "MemoryPlanError": "quire.errors",
    "QueueFullError": "quire.errors",
    "QuireError": "quire.errors",
    "RequestError": "quire.errors",
}

__all__ = ["__version__", *_HOME_OF]


_ELSEWHERE = {
    "AsyncEngineArgs": "AsyncLLM takes an EngineConfig",
    "AsyncLLMEngine": "use AsyncLLM",
    "GuidedDecodingParams": "use StructuredOutputsParams",
    "ModelRegistry": "a model is a row of a table (docs/extending.md)",
    "PromptType": "a prompt is a str, a list of token ids, a TextPrompt or a TokensPrompt",
    "RequestOutputKind": "LLM returns whole outputs, AsyncLLM streams what is new",
    "initialize_ray_cluster": "quire cluster serve runs replicas on Ray",
    "EngineArgs": "LLM takes the options as keywords; EngineConfig holds them",
    "LLMEngine": "use LLM or AsyncLLM",
    "PoolingOutput": "use EmbeddingOutput",
    "PoolingParams": "LLM.embed takes its options as keywords",
    "PoolingRequestOutput": "use EmbeddingRequestOutput",
}
"""Names of vLLM that Quire lacks → what to use."""


def __getattr__(name: str) -> object:
    if name in _ELSEWHERE:
        # `from quire import X` replaces the text of an AttributeError by its own.
        raise ImportError(f"quire has no {name}: {_ELSEWHERE[name]}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'quire' has no attribute {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
