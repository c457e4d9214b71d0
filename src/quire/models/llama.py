"""Llama, and the families that differ from it by configuration alone: Mistral (sliding window), Qwen2 (biases on
queries, keys and values), Qwen3 (norms of queries and keys).

T new tokens of all sequences, H hidden size, D head_dim.
"""

from torch import Tensor

from quire.kernels import Kernels
from quire.layers.attention import Attention
from quire.layers.norm import RMSNorm
from quire.layers.rotary import cos_sin_table
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig, RopeConfig
from quire.models.blocks import GatedMLP, embedding_and_head, fused_linear, run_layers
from quire.models.kv_scales import KVScales, largest_projected, largest_rotated, scales_of, take_kv_scales
from quire.models.weights import TensorSource


class Llama:
    """Embedding, decoder layers, final norm; then logits for the rows that are asked for."""

    # Old checkpoints store the rotary frequencies; some store the head although it is tied.
    ignored_tensors = (r"\.rotary_emb\.inv_freq$", r"^lm_head\.weight$")

    def __init__(
        self, config: ModelConfig, weights: TensorSource, kernels: Kernels, dtype: str, max_model_len: int
    ) -> None:
        model = weights.scope("model")
        table = model.take("embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self.embed, self.head = embedding_and_head(config, table, weights, kernels, dtype)
        cos_sin = cos_sin_table(config.rope or RopeConfig(), config.head_dim, max_model_len).to(table.device)
        self.layers = [
            DecoderLayer(config, index, model.scope(f"layers.{index}"), kernels, cos_sin, dtype)
            for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(kernels, model.take("norm.weight", (config.hidden_size,)).float(), config.norm_eps)

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        """input_ids int32 [T] -> hidden [T, H], or [R, H] of the R output tokens."""
        return self.norm(*run_layers(self.layers, self.embed(input_ids), None, context))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        return self.head(hidden)

    def scale_kv(self) -> None:
        """Scale keys and values for a cache of float8 from now on."""
        for layer in self.layers:
            layer.attention.scale_kv()


class DecoderLayer:
    """Attention and MLP, each behind a norm. What a half computes is added to the residual stream by the norm of the
    next half, so that addition, norm and first product are one kernel."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: TensorSource,
        kernels: Kernels,
        cos_sin: Tensor,
        dtype: str,
    ) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(kernels, weights.take(name, (config.hidden_size,)).float(), config.norm_eps)

        before = norm("input_layernorm.weight")
        self.attention = SelfAttention(config, index, weights.scope("self_attn"), kernels, cos_sin, dtype, before)
        before = norm("post_attention_layernorm.weight")
        self.mlp = GatedMLP(config, weights.scope("mlp"), kernels, dtype, before)

    def __call__(
        self,
        residual: Tensor,
        update: Tensor | None,
        context: StepContext,
    ) -> tuple[Tensor, Tensor]:
        """residual, update [T, H] -> the same behind the layer, [T, H], or [R, H] of the output tokens.

        `update` is added to `residual`, in place.
        """
        update = self.attention(residual, update, context)
        residual = context.select_output(residual)
        return residual, self.mlp(residual, update)


class SelfAttention:
    """Causal self-attention with rotary positions and grouped KV heads, of the norm of the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: TensorSource,
        kernels: Kernels,
        cos_sin: Tensor,
        dtype: str,
        norm: RMSNorm,
    ) -> None:
        self.kernels = kernels
        self.norm = norm
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = fused_linear(
            weights,
            {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
            config.hidden_size,
            bias=config.qkv_bias,
            kernels=kernels,
            dtype=dtype,
        )
        self.o = fused_linear(
            weights, {"o_proj": config.hidden_size}, q_rows, bias=config.o_bias, kernels=kernels, dtype=dtype
        )
        self.qk_norms: tuple[Tensor, Tensor] | None = None
        if config.qk_norm:
            self.qk_norms = (
                weights.take("q_norm.weight", (config.head_dim,)).float(),
                weights.take("k_norm.weight", (config.head_dim,)).float(),
            )
        self.norm_eps = config.norm_eps
        self.attend = Attention(
            kernels, index, scale=config.head_dim**-0.5, cos_sin=cos_sin, window=config.layer_windows[index]
        )
        self.stored_kv_scales = take_kv_scales(weights, config.num_kv_heads)
        """The checkpoint's own."""

    def __call__(
        self,
        residual: Tensor,
        update: Tensor | None,
        context: StepContext,
    ) -> Tensor:
        """residual, update [T, H] -> the next update, [T, H] or [R, H]; `update` is added to `residual`."""
        num_tokens = residual.shape[0]
        # Views of one [T, heads, D] matrix; what follows works on them in place.
        q, k, v = (
            self.qkv.after_norm(self.norm, residual, update)
            .view(num_tokens, -1, self.head_dim)
            .split_with_sizes(self.heads, dim=1)
        )
        if self.qk_norms is not None:
            self.kernels.rms_norm_heads_(q, self.qk_norms[0], self.norm_eps)
            self.kernels.rms_norm_heads_(k, self.qk_norms[1], self.norm_eps)
        return self.o(self.attend(q, k, v, context).flatten(1))

    def scale_kv(self) -> None:
        """Those of the checkpoint, or the least by which no key or value can be too large."""
        scales = self.stored_kv_scales
        if scales is None:
            num_heads, num_kv_heads, _ = self.heads
            bounds = largest_projected(self.qkv, self.norm.weight).view(-1, self.head_dim)
            _, keys, values = bounds.split_with_sizes((num_heads, num_kv_heads, num_kv_heads))
            if self.qk_norms is not None:
                keys = self.head_dim**0.5 * self.qk_norms[1].abs().expand_as(keys)
            scales = KVScales(scales_of(largest_rotated(keys, self.attend.cos_sin)), scales_of(values))
        self.attend.k_scale, self.attend.v_scale = scales
