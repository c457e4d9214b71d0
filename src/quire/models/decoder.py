"""Decoder: embedding, decoder layers, final norm and output head; what every family has.

T new tokens of all sequences, R output tokens, H hidden size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quire.layers.embedding import Embedding, TokenEmbedding
from quire.layers.linear import Linear
from quire.layers.norm import Norm, Normed
from quire.layers.pipe import Pipe
from quire.layers.step_context import StepContext
from quire.models.pooler import Pooler
from quire.models.vision.encoder import ImageEncoder


class Mixer(Protocol):
    """The first half of a layer, where tokens meet those before them: attention, or a recurrent layer."""

    def __call__(self, x: Tensor | Normed, context: StepContext) -> Tensor:
        """x [T, H] -> [T, H], or [R, H] of the output tokens."""
        ...

    def scale_kv(self, norm: Norm) -> None:
        """Scale keys and values for a cache of float8 from now on. `norm` is that of the input."""
        ...


class MLP(Protocol):
    """The second half of a layer: a dense MLP or experts."""

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """x [T, H] -> [T, H]."""
        ...


class DecoderLayer:
    """Attention and MLP, each added to the residual stream.

    What a half computes is its update. The norm of the next half adds it to the residual stream, so that addition, norm
    and first product can be one kernel. Where the residual is parallel, both halves read norms of the layer's input,
    and both updates are added: two norms with `parallel_residual`, one norm for both without `mlp_norm`. Post-norms,
    where there are any, norm the updates themselves; `residual_factor` multiplies them.
    """

    def __init__(
        self,
        attention_norm: Norm,
        attention: Mixer,
        mlp_norm: Norm | None,
        mlp: MLP,
        *,
        parallel_residual: bool = False,
        post_norms: tuple[Norm, Norm] | None = None,
        residual_factor: float = 1.0,
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.residual_factor = residual_factor
        self.parallel_residual = parallel_residual
        self.attention_post_norm: Norm | None = None
        self.mlp_post_norm: Norm | None = None
        if post_norms is not None:
            self.attention_post_norm, self.mlp_post_norm = post_norms

    def __call__(self, residual: Tensor, update: Tensor | None, context: StepContext) -> tuple[Tensor, Tensor]:
        """residual, update [T, H] -> the same after the layer, [T, H], or [R, H] of the output tokens.

        `update` is added to `residual`, in place.
        """
        normed = Normed(self.attention_norm, residual, update)
        if self.mlp_norm is None:
            x = normed.compute()
            update = self.attention(x, context)
            update.add_(self.mlp(context.select_output(x)))
            return context.select_output(residual), self._scaled(update)
        update = self.attention(normed, context)
        if self.attention_post_norm is not None:
            update = self.attention_post_norm(update)
        residual = context.select_output(residual)
        if self.parallel_residual:
            update.add_(self.mlp(Normed(self.mlp_norm, residual, None)))
            return residual, self._scaled(update)
        update = self.mlp(Normed(self.mlp_norm, residual, self._scaled(update)))
        if self.mlp_post_norm is not None:
            update = self.mlp_post_norm(update)
        return residual, self._scaled(update)

    def _scaled(self, update: Tensor) -> Tensor:
        return update if self.residual_factor == 1.0 else update.mul_(self.residual_factor)


class Decoder:
    """A decoder-only model. `embedding_factor` multiplies token embeddings, then `embedding_norm` norms them;
    `logits_factor` multiplies logits; then a logit l becomes softcap * tanh(l / softcap) where `logits_softcap` is
    above 0. `projections` lead from the width of the token embeddings to that of the layers, and back before the
    head.

    One stage of a model has a `pipe`: all but the first get the residual stream from it, and all but the last pass
    theirs on to it.
    """

    pooler: Pooler | None = None

    def __init__(
        self,
        ends: tuple[TokenEmbedding | None, Linear | None],
        layers: Sequence[DecoderLayer],
        norm: Norm,
        *,
        position_embedding: Embedding | None = None,
        embedding_norm: Norm | None = None,
        projections: tuple[Linear | None, Linear | None] = (None, None),
        embedding_factor: float = 1.0,
        logits_factor: float = 1.0,
        logits_softcap: float = 0.0,
    ) -> None:
        """`ends` are the embedding and the output head; None where another stage has them."""
        self.embedding, self.head = ends
        self.layers = list(layers)
        self.norm = norm
        self.position_embedding = position_embedding
        self.embedding_norm = embedding_norm
        self.projections = projections
        self.embedding_factor = embedding_factor
        self.logits_factor = logits_factor
        self.logits_softcap = logits_softcap
        self.image_encoder: ImageEncoder | None = None
        """Set by a family that reads images."""
        self.pipe: Pipe | None = None
        """Set for one stage of a model."""

    def __call__(self, input_ids: Tensor, context: StepContext) -> Tensor:
        """input_ids int32 [T] -> hidden [T, H], or [R, H] of the output tokens; from a stage that is not the last, the
        residual stream [T, H]."""
        inner, pipe = context.for_inner_layers, self.pipe
        if pipe is None or pipe.stage.is_first:
            residual, update = self._embed(input_ids, context)
        else:
            residual, update = pipe.receive(len(input_ids), input_ids.device), None
        if pipe is not None and not pipe.stage.is_last:
            context = inner
        for layer in self.layers[:-1]:
            residual, update = layer(residual, update, inner)
        hidden = self.norm(*self.layers[-1](residual, update, context))
        if pipe is not None and not pipe.stage.is_last:
            pipe.send(hidden)
        return hidden

    def _embed(self, input_ids: Tensor, context: StepContext) -> tuple[Tensor, Tensor | None]:
        """The residual stream [T, H] before the first layer, and the first update of it."""
        assert self.embedding is not None, "the first stage has the embedding"
        residual = self.embedding(input_ids)
        if self.embedding_factor != 1.0:
            residual *= self.embedding_factor
        if context.input_rows is not None:
            residual[context.input_rows.tokens] = context.input_rows.rows.to(residual.dtype)
        if self.embedding_norm is not None:
            residual = self.embedding_norm(residual)
        if self.projections[0] is not None:
            residual = self.projections[0](residual)
        return residual, None if self.position_embedding is None else self.position_embedding(context.positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> [R, vocab_size]."""
        assert self.head is not None, "the last stage has the head"
        logits = self.head(hidden if self.projections[1] is None else self.projections[1](hidden))
        if self.logits_factor != 1.0:
            logits *= self.logits_factor
        if self.logits_softcap > 0:
            logits = torch.tanh_(logits.div_(self.logits_softcap)).mul_(self.logits_softcap)
        return logits

    def scale_kv(self) -> None:
        """Scale keys and values for a cache of float8 from now on."""
        for layer in self.layers:
            layer.attention.scale_kv(layer.attention_norm)
