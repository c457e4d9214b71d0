"""decoder_layers: the layers of a family that the fields of `ModelConfig` describe completely."""

from quire.layer_spec import AttentionSpec, ExpertsSpec, KVSpec, LayerSpec, LinearSpec, MLPSpec, VectorSpec
from quire.model_config.latent import LatentShape
from quire.model_config.model_config import ModelConfig, norm_vectors


def decoder_layers(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Attention with grouped KV heads, then an MLP or experts; layers differ by these and by their windows alone."""
    windows = config.layer_windows or (0,) * config.num_layers
    kinds = [(window, config.has_experts(index)) for index, window in enumerate(windows)]
    layers = {kind: _layer(config, *kind) for kind in set(kinds)}
    return tuple(layers[kind] for kind in kinds)


def _layer(config: ModelConfig, window: int, has_experts: bool) -> LayerSpec:
    hidden = config.hidden_size
    mlp: MLPSpec | ExpertsSpec
    if has_experts:
        shared = config.shared_expert_intermediate_size
        mlp = ExpertsSpec(
            num_experts=config.num_experts,
            num_active=config.num_experts_per_token,
            router=LinearSpec("router", config.num_experts + config.shared_expert_gate, hidden, quantizes=False),
            expert=mlp_spec("expert.", hidden, config.expert_intermediate_size, gated=config.gated_mlp),
            shared=mlp_spec("shared.", hidden, shared, gated=config.gated_mlp) if shared else None,
        )
    else:
        mlp = mlp_spec("", hidden, config.intermediate_size, gated=config.gated_mlp)
    return LayerSpec(
        attention=_attention(config, window) if config.latent is None else _latent_attention(config, config.latent),
        mlp=mlp,
        vectors=(*_norms(config), *_biases(config, mlp)),
    )


def _attention(config: ModelConfig, window: int) -> AttentionSpec:
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kv = KVSpec(
        kind="window" if window else "full",
        num_heads=config.num_kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        window=window,
    )
    qkv = LinearSpec("qkv", num_queries + 2 * num_keys, config.hidden_size)
    return AttentionSpec(
        linears=(qkv, LinearSpec("o", config.hidden_size, num_queries)), num_heads=config.num_heads, kv=kv
    )


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


def mlp_spec(prefix: str, hidden_size: int, inner: int, *, gated: bool) -> MLPSpec:
    """The feed-forward network hidden_size → inner → hidden_size. Gate and up are packed as one layer."""
    up = (
        LinearSpec(f"{prefix}gate_up", 2 * inner, hidden_size)
        if gated
        else LinearSpec(f"{prefix}up", inner, hidden_size)
    )
    return MLPSpec(kind="gated" if gated else "plain", linears=(up, LinearSpec(f"{prefix}down", hidden_size, inner)))


def _norms(config: ModelConfig) -> tuple[VectorSpec, ...]:
    names = []
    if config.pre_norms:
        names.append("attention_norm")
        if config.parallel_mlp_norm or not config.parallel_residual:
            names.append("mlp_norm")
    if config.post_norms:
        names += ["attention_post_norm", "mlp_post_norm"]
    vectors = tuple(vector for name in names for vector in norm_vectors(config, name))
    if config.latent is not None:
        vectors += (VectorSpec("latent_norm", config.latent.latent_dim),)
        if config.latent.query_latent_dim:
            vectors += (VectorSpec("query_norm", config.latent.query_latent_dim),)
    if config.attention_sinks:
        vectors += (VectorSpec("sinks", config.num_heads),)
    if config.qk_norm:
        every_head = config.qk_norm_per_head or config.qk_norm_joint
        num_queries, num_keys = (config.num_heads, config.num_kv_heads) if every_head else (1, 1)
        sizes = {"q_norm": num_queries * config.head_dim, "k_norm": num_keys * config.head_dim}
        parts = ("weight", "bias") if config.qk_norm_bias else ("weight",)
        vectors += tuple(VectorSpec(f"{name}.{part}", size) for name, size in sizes.items() for part in parts)
    return vectors


def _biases(config: ModelConfig, mlp: MLPSpec | ExpertsSpec) -> tuple[VectorSpec, ...]:
    biases = []
    if config.qkv_bias and config.latent is not None:
        biases.append(VectorSpec("down.bias", config.latent.query_latent_dim + config.latent.row_dim))
    elif config.qkv_bias:
        biases.append(VectorSpec("qkv.bias", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim))
    if config.o_bias:
        biases.append(VectorSpec("o.bias", config.hidden_size))
    if config.mlp_bias and isinstance(mlp, MLPSpec):
        biases += [VectorSpec(f"{linear.name}.bias", linear.num_outputs) for linear in mlp.linears]
    if config.expert_bias and isinstance(mlp, ExpertsSpec):
        biases.append(VectorSpec("router.bias", config.num_experts))
        biases += [
            VectorSpec(f"{linear.name}.bias", config.num_experts * linear.num_outputs) for linear in mlp.expert.linears
        ]
    return tuple(biases)
