"""What type checkers see of the lazy names in __init__.py; a test holds the two equal."""

from quire.config import EngineConfig as EngineConfig
from quire.embeddings import ClassificationOutput as ClassificationOutput
from quire.embeddings import ClassificationRequestOutput as ClassificationRequestOutput
from quire.embeddings import EmbeddingOutput as EmbeddingOutput
from quire.embeddings import EmbeddingRequestOutput as EmbeddingRequestOutput
from quire.embeddings import RerankResult as RerankResult
from quire.embeddings import ScoringOutput as ScoringOutput
from quire.embeddings import ScoringRequestOutput as ScoringRequestOutput
from quire.engine.async_engine import AsyncLLM as AsyncLLM
from quire.errors import CheckpointError as CheckpointError
from quire.errors import ConfigError as ConfigError
from quire.errors import EngineDeadError as EngineDeadError
from quire.errors import EngineUnavailableError as EngineUnavailableError
from quire.errors import MemoryPlanError as MemoryPlanError
from quire.errors import QueueFullError as QueueFullError
from quire.errors import QuireError as QuireError
from quire.errors import RequestError as RequestError
from quire.inputs import TextPrompt as TextPrompt
from quire.inputs import TokensPrompt as TokensPrompt
from quire.llm import LLM as LLM
from quire.lora.request import LoRARequest as LoRARequest
from quire.outputs import BeamSearchOutput as BeamSearchOutput
from quire.outputs import CompletionOutput as CompletionOutput
from quire.outputs import RegisteredPrefix as RegisteredPrefix
from quire.outputs import RequestOutput as RequestOutput
from quire.sampling.logits_processors import BatchLogitsProcessor as BatchLogitsProcessor
from quire.sampling_params import BeamSearchParams as BeamSearchParams
from quire.sampling_params import SamplingParams as SamplingParams
from quire.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__: str
