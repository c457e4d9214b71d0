"""GPT-2: LayerNorm, learned positions, a plain MLP, and matrices stored as [inputs, outputs]."""

from quire.kernels import Kernels
from quire.layers.embedding import Embedding
from quire.model_config import ModelConfig
from quire.models.blocks import fused_attention, plain_mlp
from quire.models.builder import Builder
from quire.models.decoder import Decoder, DecoderLayer
from quire.models.weights import WeightScope


class GPT2(Decoder):
    """The position's embedding is the first update of the residual stream."""

    # Causal masks that old checkpoints store; the head may be stored although it is tied.
    ignored_tensors = (r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$")
    stores_transposed = True
    """Matrices are stored as [inputs, outputs]."""
    rows_by_kv_head = False
    """`c_attn` holds the queries, key and value of each KV head in turn."""

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        model = build.scope("transformer")
        ends = build.ends(build.table("transformer.wte", config.hidden_size))
        positions = None
        if build.is_first_stage:
            table = model.weights.take("wpe.weight", (config.max_position_embeddings, config.hidden_size))
            positions = Embedding(table, weights.activation_dtype)
        first = config.first_layer
        super().__init__(
            ends,
            [self.make_layer(model.scope(f"h.{first + index}"), index) for index in range(config.num_layers)],
            model.final_norm("ln_f"),
            position_embedding=positions,
        )

    def make_layer(self, build: Builder, index: int) -> DecoderLayer:
        return DecoderLayer(
            build.norm("ln_1"),
            fused_attention(
                build.scope("attn"),
                index,
                names=("c_attn", "c_proj"),
                by_kv_head=self.rows_by_kv_head,
                transposed=self.stores_transposed,
            ),
            build.norm("ln_2"),
            plain_mlp(build.scope("mlp"), ("c_fc", "c_proj"), transposed=self.stores_transposed),
        )
