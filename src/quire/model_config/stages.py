"""take_stage: the config of one rank's layers, where several ranks hold them one after the other (pipeline
parallelism).

Every field that tells something of single layers is cut to the stage's own, so that a family builds them as it builds a
whole model, and every size that follows from them (`ModelConfig.spec`) is the stage's.
"""

from dataclasses import replace

from quire.errors import ConfigError
from quire.layer_stage import Stage
from quire.model_config.architectures import ARCHITECTURES
from quire.model_config.model_config import ModelConfig
from quire.quantization.stored import KeptBits


def layer_counts(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each stage: equally many, and what is left over goes to the stages before the last, which has the
    output head, as in vLLM."""
    counts = [num_layers // num_stages] * num_stages
    for place in range(num_layers % num_stages):
        counts[-2 - place] += 1
    return counts


def take_stage(model: ModelConfig, num_stages: int, index: int) -> ModelConfig:
    """The part of the stage `index` of a whole model. Raises `ConfigError` for a model that cannot be cut into so
    many."""
    if num_stages == 1:
        return model
    _check_kind(model, num_stages)
    counts = layer_counts(model.num_layers, num_stages)
    firsts = [sum(counts[:place]) for place in range(num_stages)]
    for first, count in zip(firsts, counts, strict=True):
        _check_layers(model, num_stages, range(first, first + count))
    first, count = firsts[index], counts[index]
    own = range(first, first + count)
    stage = Stage(
        index,
        num_stages,
        first,
        count,
        model.num_layers,
        tuple(model.spec.kvs),
        first_kv=sum(layer < first for layer in model.attention_layers),
    )
    recurrent = model.recurrent
    if recurrent is not None:
        recurrent = replace(recurrent, layers=_shifted(recurrent.layers, own))
    return replace(
        model,
        stage=stage,
        num_layers=count,
        dense_layers=_shifted(model.dense_layers, own),
        layer_windows=model.layer_windows[first : own.stop],
        layer_ropes=model.layer_ropes[first : own.stop],
        recurrent=recurrent,
        block_bytes=_share(model, model.block_bytes, stage),
        kept=None if model.kept is None else _share_of_bits(model.kept, stage),
    )


def _shifted(layers: frozenset[int], own: range) -> frozenset[int]:
    return frozenset(layer - own.start for layer in layers if layer in own)


def _share(model: ModelConfig, num_bytes: int, stage: Stage) -> int:
    """This stage's part of bytes that all layers and both ends take: that of its layers, and the ends for who has one
    of them."""
    spec = model.spec
    layers = spec.layer_parameters * stage.num_layers // stage.num_all_layers
    ends = spec.num_parameters - spec.layer_parameters
    return num_bytes * (layers + (ends if stage.is_first or stage.is_last else 0)) // spec.num_parameters


def _share_of_bits(kept: KeptBits, stage: Stage) -> KeptBits:
    layers = stage.num_layers / stage.num_all_layers
    return KeptBits(
        int(kept.layer_parameters * layers),
        int(kept.layer_bytes * layers),
        kept.head_bytes if stage.is_last else 0,
    )


def _check_kind(model: ModelConfig, num_stages: int) -> None:
    in_the_way = {
        "a model that transformers computes": bool(model.computed_by) or model.architecture not in ARCHITECTURES,
        "an encoder": model.is_encoder,
        "an image encoder": model.vision is not None,
        "norms that follow the additions": not model.norm_before,
        "packed weights, which lie in one order": model.packed_as is not None,
    }
    reasons = [what for what, found in in_the_way.items() if found]
    if reasons:
        raise ConfigError(
            f"pipeline_parallel_size is {num_stages}, but {model.architecture} has {', '.join(reasons)}, which Quire "
            "cannot cut into stages; leave it out, or use data_parallel_size"
        )


def _check_layers(model: ModelConfig, num_stages: int, own: range) -> None:
    """Every stage needs a layer of each kind that leaves something, since one plan is for the caches of all."""
    recurrent = frozenset() if model.recurrent is None else model.recurrent.layers
    kinds = {"layer": bool(own), "attention layer": any(layer not in recurrent for layer in own)}
    if recurrent:
        kinds["recurrent layer"] = any(layer in recurrent for layer in own)
    for kind, found in kinds.items():
        if not found:
            raise ConfigError(
                f"pipeline_parallel_size is {num_stages}, too many for the {model.num_layers} layers of "
                f"{model.architecture}: each rank needs one {kind} at least"
            )
