"""GPT-2: LayerNorm, learned positions, a plain MLP, and matrices stored transposed.

T new tokens of all sequences, H hidden size, D head_dim.
"""

from torch import Tensor

from quire.kernels import Kernels
from quire.layers.activation import activation
from quire.layers.attention import Attention
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.norm import LayerNorm
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.blocks import embedding_and_head, run_layers
from quire.models.kv_scales import largest_projected, scales_of
from quire.models.weights import TensorSource


class GPT2:
    """Token and position embedding, layers, final norm; then logits for the rows that are asked for."""

    # Causal masks that old checkpoints store; the head may be stored although it is tied.
    ignored_tensors = (r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$")

    def __init__(
        self, config: ModelConfig, weights: TensorSource, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        hidden = config.hidden_size
        # OpenAI's own checkpoints hold the bare model, later ones a "transformer" beside the head.
        model = weights if weights.has("wte.weight") else weights.scope("transformer")
        table = model.take("wte.weight", (config.vocab_size, hidden))
        self.embed, self.head = embedding_and_head(config, table, weights, kernels, dtype)
        positions = model.take("wpe.weight", (config.max_position_embeddings, hidden))
        self.embed_position = Embedding(positions, weights.activations)
        self.layers = [
            Layer(config, index, model.scope(f"h.{index}"), kernels, dtype) for index in range(config.num_layers)
        ]
        self.norm = layer_norm(config, model.scope("ln_f"))

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        """input_ids int32 [T] -> hidden [T, H], or [R, H] of the R output tokens."""
        position = self.embed_position(context.positions)
        return self.norm(*run_layers(self.layers, self.embed(input_ids), position, context))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        return self.head(hidden)

    def scale_kv(self) -> None:
        """Scale keys and values for a cache of float8 from now on, so that none can be too large."""
        for layer in self.layers:
            bounds = largest_projected(layer.qkv, layer.attention_norm.weight, layer.attention_norm.bias)
            _, keys, values = bounds.view(3, -1, layer.head_dim)
            layer.attend.k_scale, layer.attend.v_scale = scales_of(keys), scales_of(values)


class Layer:
    """Attention and MLP, each behind a norm that first adds the last update to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, weights: TensorSource, kernels: Kernels, dtype: str) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        self.attention_norm = layer_norm(config, weights.scope("ln_1"))
        self.qkv = transposed_linear(kernels, weights.scope("attn.c_attn"), hidden, 3 * hidden, dtype)
        self.attend = Attention(kernels, index, scale=config.head_dim**-0.5)
        self.o = transposed_linear(kernels, weights.scope("attn.c_proj"), hidden, hidden, dtype)
        self.mlp_norm = layer_norm(config, weights.scope("ln_2"))
        self.up = transposed_linear(kernels, weights.scope("mlp.c_fc"), hidden, inner, dtype)
        self.activation = activation(config.activation)
        self.down = transposed_linear(kernels, weights.scope("mlp.c_proj"), inner, hidden, dtype)

    def __call__(self, residual: Tensor, update: Tensor | None, context: StepContext) -> tuple[Tensor, Tensor]:
        """residual, update [T, H] -> the same behind the layer, [T, H], or [R, H] of the output tokens.

        `update` is added to `residual`, in place.
        """
        num_tokens = residual.shape[0]
        qkv = self.qkv(self.attention_norm(residual, update))
        q, k, v = qkv.view(num_tokens, -1, self.head_dim).chunk(3, dim=1)
        update = self.o(self.attend(q, k, v, context).flatten(1))
        residual = context.select_output(residual)
        return residual, self.down(self.activation(self.up(self.mlp_norm(residual, update))))


def layer_norm(config: ModelConfig, weights: TensorSource) -> LayerNorm:
    shape = (config.hidden_size,)
    weight, bias = (weights.take(name, shape).to(weights.activations) for name in ("weight", "bias"))
    return LayerNorm(weight, bias, config.norm_eps)


def transposed_linear(
    kernels: Kernels, weights: TensorSource, in_features: int, out_features: int, dtype: str
) -> Linear:
    """GPT-2 stores a matrix as [in, out]."""
    weight = weights.take("weight", (in_features, out_features))
    return Linear(kernels, [weight.t()], weights.take("bias", (out_features,)), dtype)
