"""What a model is, read from the config.json of a Hugging Face folder before a weight is read. No torch.

`ModelConfig` is the record, `ARCHITECTURES` the table of what Quire can load. A row of the table names the class that
computes the model and says what config.json leaves unsaid about it; `ModelConfig.spec` tells the model's layers as
plain values (`quire.layer_spec`), from which every size follows.
"""

from quire.model_config.architectures import ARCHITECTURES, Architecture
from quire.model_config.config_json import read_json
from quire.model_config.image_processing import ImageProcessing
from quire.model_config.model_config import ModelConfig
from quire.model_config.rope import RopeConfig
from quire.model_config.vision import VisionConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ImageProcessing",
    "ModelConfig",
    "RopeConfig",
    "VisionConfig",
    "read_json",
]
