"""is_computed_by_transformers: whether a model without a row of ARCHITECTURES runs through the transformers library.

Any decoder of transformers 5 that takes its attention from the library's interface does; the extra `transformers` of
Quire installs it. Kinds of models that the paged cache cannot hold are refused here by what their config.json says,
others when the model is built (`quire.models.transformers_model`).
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError
from quire.model_config.architecture_names import is_causal, known_architecture

_REASONS = {
    "is_encoder_decoder": "it has an encoder beside its decoder",
    "kv_lora_rank": "its layers keep latent vectors in the place of keys and values",
    "ssm_cfg": "its layers keep a recurrent state",
    "mamba_d_state": "its layers keep a recurrent state",
    "ssm_state_size": "its layers keep a recurrent state",
    "state_size": "its layers keep a recurrent state",
    "linear_num_key_heads": "its layers keep a recurrent state",
    "rwkv_version": "its layers keep a recurrent state",
    "auto_map": "it is computed by code of its own repository, which is not run",
}
"""A key of config.json that is set → why the model cannot run on the paged cache."""


def is_computed_by_transformers(path: Path, config: dict[str, Any]) -> bool:
    """False for a model with a row and for a model that generates no text. Raises `CheckpointError` for a decoder that
    transformers cannot compute on Quire's cache, or only if it were installed."""
    if known_architecture(path, config) is not None:
        return False
    names = [name for name in config.get("architectures") or () if is_causal(name)]
    if not names:
        return False
    for key, reason in _REASONS.items():
        if config.get(key):
            raise CheckpointError(f"{path}: {names[0]} is not supported: {reason} ({key})")
    if find_spec("transformers") is None:
        raise CheckpointError(
            f"{path}: architectures is {names[0]}, which Quire has no class for; transformers can compute it: "
            "pip install 'quire-llm[transformers]'"
        )
    return True
