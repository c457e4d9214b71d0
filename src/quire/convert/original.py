"""Original: what is converted."""

from dataclasses import dataclass
from pathlib import Path

from quire.lora.adapter_folder import AdapterFolder
from quire.lora.merged_source import MergedSource
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.weights import TensorSource


@dataclass(frozen=True, slots=True)
class Original:
    """A model, in a folder or a GGUF file, and the adapter that is merged into it."""

    config: ModelConfig
    path: Path
    adapter: AdapterFolder | None = None

    def open(self) -> TensorSource:
        """Raises `CheckpointError`."""
        source = open_checkpoint(self.path, self.config.stored)
        if self.adapter is None:
            return source
        return MergedSource(source, self.adapter, tied=self.config.tie_word_embeddings)
