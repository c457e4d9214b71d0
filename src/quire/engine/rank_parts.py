"""Which part of a model each rank holds: heads and inner widths within a stage, and layers from stage to stage.

Rank 0, the engine process, holds the last stage: hidden states come to where they are read and sampled, and no logits
travel. The ranks after its own stage's hold the stages from the first on.
"""

from quire.config import EngineConfig
from quire.model_config import ModelConfig
from quire.model_config.divided import divide
from quire.model_config.stages import take_stage


def stage_of(config: EngineConfig, rank: int) -> int:
    """The stage that a rank belongs to."""
    return (rank // config.tensor_parallel_size - 1) % config.pipeline_parallel_size


def part_of(config: EngineConfig, model: ModelConfig, rank: int = 0) -> ModelConfig:
    """The config of a rank's part. Raises `ConfigError` for a model that cannot be divided so."""
    share = divide(model, config.tensor_parallel_size, rank % config.tensor_parallel_size)
    return take_stage(share, config.pipeline_parallel_size, stage_of(config, rank))


def parts(config: EngineConfig, model: ModelConfig) -> list[ModelConfig]:
    """A part of each stage; the ranks of a stage have parts of one size."""
    share = divide(model, config.tensor_parallel_size)
    num_stages = config.pipeline_parallel_size
    return [take_stage(share, num_stages, index) for index in range(num_stages)]
