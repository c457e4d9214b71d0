"""decoder_layers: the layers of a family that the fields of `ModelConfig` describe completely."""

from dataclasses import replace

from quire.layer_spec import (
    AttentionSpec,
    ExpertsSpec,
    KVSpec,
    LayerSpec,
    LinearSpec,
    MLPSpec,
    RecurrentSpec,
    VectorSpec,
)
from quire.model_config.latent import LatentShape
from quire.model_config.model_config import ModelConfig, norm_vectors
from quire.model_config.recurrent import RecurrentConfig


def decoder_layers(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Attention with grouped KV heads or a recurrent state, then an MLP or experts; layers differ by these and by their
    windows alone."""
    windows = config.layer_windows or (0,) * config.num_layers
    kinds = [
        (window, config.has_experts(index), config.recurrent if config.is_recurrent(index) else None)
        for index, window in enumerate(windows)
    ]
    layers = {kind: _layer(config, *kind) for kind in set(kinds)}
    return tuple(layers[kind] for kind in kinds)


def apertus_layers(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """The same with the numbers that each layer's xIELU learns."""
    xielu = VectorSpec("xielu", 2)
    return tuple(replace(layer, vectors=(*layer.vectors, xielu)) for layer in decoder_layers(config))


def _layer(config: ModelConfig, window: int, has_experts: bool, recurrent: RecurrentConfig | None) -> LayerSpec:
    mlp = _mlp(config, has_experts)
    if recurrent is None:
        attention: AttentionSpec | RecurrentSpec = _attention(config, window)
        vectors = (*_norms(config), *_attention_vectors(config), *_attention_biases(config), *_mlp_biases(config, mlp))
        if has_experts and config.router.kind == "biased_softmax":
            vectors += (VectorSpec("router.bias", config.num_experts),)
    else:
        attention = _recurrent(config, recurrent)
        vectors = (*_norms(config), *_recurrent_vectors(config, recurrent), *_mlp_biases(config, mlp))
    return LayerSpec(attention=attention, mlp=mlp, vectors=vectors)


def _attention(config: ModelConfig, window: int) -> AttentionSpec:
    if config.latent is not None:
        return _latent_attention(config, config.latent)
    hidden = config.hidden_size
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kv = KVSpec(
        kind="window" if window else "full",
        num_heads=config.num_kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        window=window,
    )
    num_gates = num_queries if config.attention_gate else 0
    qkv = LinearSpec("qkv", num_queries + 2 * num_keys + num_gates, hidden)
    return AttentionSpec(
        linears=(qkv, LinearSpec("o", hidden, num_queries)),
        num_heads=config.num_heads,
        kv=kv,
    )


def _recurrent(config: ModelConfig, recurrent: RecurrentConfig) -> RecurrentSpec:
    """What the convolution reads and the output's gate are one product, and the numbers that each head gets for itself
    (decay and write strength, or time step) another, which stays in floats."""
    hidden, inner = config.hidden_size, recurrent.inner_size
    per_head = 2 if recurrent.kind == "gated_delta" else 1
    return RecurrentSpec(
        linears=(
            LinearSpec("in", recurrent.num_channels + inner, hidden),
            LinearSpec("per_head", per_head * recurrent.num_heads, hidden, quantizes=False),
            LinearSpec("out", hidden, inner),
        ),
        num_channels=recurrent.num_channels,
        conv_width=recurrent.conv_width,
        num_heads=recurrent.num_heads,
        key_dim=recurrent.key_dim,
        value_dim=recurrent.value_dim,
    )


def _recurrent_vectors(config: ModelConfig, recurrent: RecurrentConfig) -> tuple[VectorSpec, ...]:
    num_heads, inner = recurrent.num_heads, recurrent.inner_size
    is_mamba = recurrent.kind == "mamba2"
    vectors = {
        "conv.weight": recurrent.num_channels * recurrent.conv_width,
        "conv.bias": recurrent.num_channels if recurrent.conv_bias else 0,
        "A_log": num_heads,
        "dt_bias": num_heads,
        "D": num_heads if is_mamba else 0,
        "state_norm.weight": inner if is_mamba else recurrent.value_dim,
        "in.bias": recurrent.num_channels + inner + num_heads if recurrent.bias else 0,
        "out.bias": config.hidden_size if recurrent.bias else 0,
    }
    return tuple(VectorSpec(name, size) for name, size in vectors.items() if size)


def _mlp(config: ModelConfig, has_experts: bool) -> MLPSpec | ExpertsSpec:
    hidden = config.hidden_size
    if has_experts:
        shared = config.shared_expert_intermediate_size
        return ExpertsSpec(
            num_experts=config.num_experts,
            num_active=config.num_experts_per_token,
            router=LinearSpec("router", config.num_experts + config.shared_expert_gate, hidden, quantizes=False),
            expert=mlp_spec(
                "expert.",
                hidden,
                config.expert_intermediate_size,
                gated=config.gated_mlp,
                is_mxfp4=config.mxfp4_experts,
            ),
            shared=mlp_spec("shared.", hidden, shared, gated=config.gated_mlp) if shared else None,
        )
    return mlp_spec("", hidden, config.intermediate_size, gated=config.gated_mlp)


def _latent_attention(config: ModelConfig, shape: LatentShape) -> AttentionSpec:
    """The matrices of `quire.models.latent_attention`; those of each head, side by side, are one LinearSpec."""
    heads, hidden = config.num_heads, config.hidden_size
    num_queries = heads * shape.head_dim
    down = LinearSpec("down", (shape.query_latent_dim or num_queries) + shape.row_dim, hidden)
    query_up = (LinearSpec("query_up", num_queries, shape.query_latent_dim),) if shape.query_latent_dim else ()
    return AttentionSpec(
        linears=(
            down,
            *query_up,
            LinearSpec("key_up", heads * shape.latent_dim, shape.nope_dim),
            LinearSpec("value_up", heads * shape.value_dim, shape.latent_dim),
            LinearSpec("o", hidden, heads * shape.value_dim),
        ),
        num_heads=heads,
        kv=KVSpec(kind="latent", num_heads=1, key_dim=shape.row_dim, value_dim=shape.latent_dim),
    )


def mlp_spec(prefix: str, hidden_size: int, inner: int, *, gated: bool, is_mxfp4: bool = False) -> MLPSpec:
    """The feed-forward network hidden_size → inner → hidden_size. Gate and up are packed as one layer."""
    up = ("gate_up", 2 * inner, hidden_size) if gated else ("up", inner, hidden_size)
    linears = tuple(
        LinearSpec(f"{prefix}{name}", outputs, inputs, is_mxfp4=is_mxfp4)
        for name, outputs, inputs in (up, ("down", hidden_size, inner))
    )
    return MLPSpec(kind="gated" if gated else "plain", linears=linears)


def _norms(config: ModelConfig) -> tuple[VectorSpec, ...]:
    names = []
    if config.pre_norms:
        names.append("attention_norm")
        if config.parallel_mlp_norm or not config.parallel_residual:
            names.append("mlp_norm")
    if config.post_norms:
        names += ["attention_post_norm", "mlp_post_norm"]
    return tuple(vector for name in names for vector in norm_vectors(config, name))


def _attention_vectors(config: ModelConfig) -> tuple[VectorSpec, ...]:
    """Norms of queries, keys and latents, and sinks."""
    vectors: tuple[VectorSpec, ...] = (VectorSpec("sinks", config.num_heads),) if config.attention_sinks else ()
    if config.latent is not None:
        sizes = {"latent_norm": config.latent.latent_dim, "query_norm": config.latent.query_latent_dim}
        vectors += tuple(VectorSpec(name, size) for name, size in sizes.items() if size)
    if not config.qk_norm:
        return vectors
    every_head = config.qk_norm_per_head or config.qk_norm_joint
    num_queries, num_keys = (config.num_heads, config.num_kv_heads) if every_head else (1, 1)
    sizes = {"q_norm": num_queries * config.head_dim, "k_norm": num_keys * config.head_dim}
    parts = ("weight", "bias") if config.qk_norm_bias else ("weight",)
    return vectors + tuple(VectorSpec(f"{name}.{part}", size) for name, size in sizes.items() for part in parts)


def _attention_biases(config: ModelConfig) -> tuple[VectorSpec, ...]:
    biases = []
    if config.qkv_bias and config.latent is not None:
        biases.append(VectorSpec("down.bias", config.latent.query_latent_dim + config.latent.row_dim))
    elif config.qkv_bias:
        biases.append(VectorSpec("qkv.bias", config.num_qkv_heads * config.head_dim))
    if config.o_bias:
        biases.append(VectorSpec("o.bias", config.hidden_size))
    return tuple(biases)


def _mlp_biases(config: ModelConfig, mlp: MLPSpec | ExpertsSpec) -> tuple[VectorSpec, ...]:
    if isinstance(mlp, MLPSpec):
        has_bias, count, linears = config.mlp_bias, 1, mlp.linears
        if config.mlp_down_bias:
            has_bias, linears = True, linears[-1:]
    else:
        has_bias, count, linears = config.expert_bias, config.num_experts, mlp.expert.linears
    if not has_bias:
        return ()
    router = (VectorSpec("router.bias", config.num_experts),) if isinstance(mlp, ExpertsSpec) else ()
    return (*router, *(VectorSpec(f"{linear.name}.bias", count * linear.num_outputs) for linear in linears))
