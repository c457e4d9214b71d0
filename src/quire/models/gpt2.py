"""GPT-2: LayerNorm, learned positions, a plain MLP, and matrices stored as [inputs, outputs]."""

from quire.kernels import Kernels
from quire.layers.attention import Attention
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.model_config import ModelConfig
from quire.models.blocks import PlainMLP, SelfAttention
from quire.models.builder import Builder
from quire.models.decoder import Decoder, DecoderLayer
from quire.models.weights import WeightScope


class GPT2(Decoder):
    """The position's embedding is the first update of the residual stream."""

    # Causal masks that old checkpoints store; the head may be stored although it is tied.
    ignored_tensors = (r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$")

    def __init__(
        self, config: ModelConfig, weights: WeightScope, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        build = Builder(config, weights, kernels, dtype)
        # OpenAI's own checkpoints hold the bare model, later ones a "transformer" beside the head.
        model = build if weights.has("wte.weight") else build.scope("transformer")
        hidden = config.hidden_size
        ends = build.ends(model.weights.take("wte.weight", (config.vocab_size, hidden)))
        positions = model.weights.take("wpe.weight", (config.max_position_embeddings, hidden))
        super().__init__(
            ends,
            [make_layer(model.scope(f"h.{index}"), index) for index in range(config.num_layers)],
            model.norm("ln_f"),
            position_embedding=Embedding(positions, weights.activation_dtype),
        )


def make_layer(build: Builder, index: int) -> DecoderLayer:
    config = build.config
    hidden, inner = config.hidden_size, config.intermediate_size

    def linear(name: str, num_inputs: int, num_outputs: int) -> Linear:
        return build.linear({name: num_outputs}, num_inputs, bias=True, transposed=True)

    return DecoderLayer(
        build.norm("ln_1"),
        SelfAttention(
            config,
            linear("attn.c_attn", hidden, 3 * hidden),
            Attention(build.kernels, index, scale=config.attention_scale),
            linear("attn.c_proj", hidden, hidden),
        ),
        build.norm("ln_2"),
        PlainMLP(linear("mlp.c_fc", hidden, inner), linear("mlp.c_proj", inner, hidden), config.activation),
    )
