"""decoder_layers: the layers of a family that the fields of `ModelConfig` describe completely."""

from quire.layer_spec import AttentionSpec, ExpertsSpec, KVSpec, LayerSpec, LinearSpec, MLPSpec, VectorSpec
from quire.model_config.model_config import ModelConfig, norm_vectors


def decoder_layers(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Attention with grouped KV heads, then an MLP or experts; layers differ by these and by their windows alone."""
    windows = config.layer_windows or (0,) * config.num_layers
    kinds = [(window, config.has_experts(index)) for index, window in enumerate(windows)]
    layers = {kind: _layer(config, *kind) for kind in set(kinds)}
    return tuple(layers[kind] for kind in kinds)


def _layer(config: ModelConfig, window: int, has_experts: bool) -> LayerSpec:
    hidden = config.hidden_size
    num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kv = KVSpec(
        kind="window" if window else "full",
        num_heads=config.num_kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        window=window,
    )
    qkv, output = LinearSpec("qkv", num_queries + 2 * num_keys, hidden), LinearSpec("o", hidden, num_queries)
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
        attention=AttentionSpec(linears=(qkv, output), num_heads=config.num_heads, kv=kv),
        mlp=mlp,
        vectors=(*_norms(config), *_biases(config, mlp)),
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
    if config.qk_norm:
        every_head = config.qk_norm_per_head or config.qk_norm_joint
        num_queries, num_keys = (config.num_heads, config.num_kv_heads) if every_head else (1, 1)
        sizes = {"q_norm": num_queries * config.head_dim, "k_norm": num_keys * config.head_dim}
        parts = ("weight", "bias") if config.qk_norm_bias else ("weight",)
        vectors += tuple(VectorSpec(f"{name}.{part}", size) for name, size in sizes.items() for part in parts)
    return vectors


def _biases(config: ModelConfig, mlp: MLPSpec | ExpertsSpec) -> tuple[VectorSpec, ...]:
    biases = []
    if config.qkv_bias:
        biases.append(VectorSpec("qkv.bias", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim))
    if config.o_bias:
        biases.append(VectorSpec("o.bias", config.hidden_size))
    if config.mlp_bias and isinstance(mlp, MLPSpec):
        biases += [VectorSpec(f"{linear.name}.bias", linear.num_outputs) for linear in mlp.linears]
    return tuple(biases)
