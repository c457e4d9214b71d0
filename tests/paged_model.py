"""PagedModel: a model and a KV cache of shuffled blocks, run by hand, without scheduler or engine."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention import AttentionShape, StepArrays
from quire.attention.plan import plan_attention
from quire.attention.recurrence import plan_recurrence
from quire.kernels import AttentionPlan, Kernels, KVLayer, OutputTokens, kernels_for, reference
from quire.kernels.interface import Packing, StateLayer
from quire.layers.pipe import Pipe
from quire.layers.step_context import StepContext
from quire.model_config import ModelConfig
from quire.models.checkpoint_formats import open_checkpoint
from quire.models.registry import load_model
from quire.models.shards import Shards


class PagedModel:
    """`step` computes the next tokens of several sequences together and returns their logits."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        *,
        kernels: Kernels | None = None,
        block_size: int = 16,
        max_sequences: int = 4,
        max_model_len: int | None = None,
        kv_dtype: torch.dtype = torch.float32,
        config: ModelConfig | None = None,
        shards: Shards | None = None,
        packing: Packing | None = None,
        pipe: Pipe | None = None,
    ) -> None:
        self.config = config = config or ModelConfig.from_folder(folder)
        kernels = kernels or kernels_for("cpu")
        self.model = load_model(
            config,
            open_checkpoint(folder, config.stored),
            kernels,
            dtype,
            max_model_len=max_model_len,
            shards=shards,
            packing=packing,
            pipe=pipe,
        )
        self.block_size = block_size
        blocks_per_sequence = -(-(max_model_len or config.context_length) // block_size)
        num_blocks = max_sequences * blocks_per_sequence
        shuffled = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
        self.block_tables = shuffled.reshape(max_sequences, blocks_per_sequence)
        shapes = reference.kv_cache_shapes(num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # The old contents of a block must never matter.
        tensors = [[torch.full(shape, 1e4, dtype=kv_dtype) for shape in shapes] for _ in config.attention_layers]
        latent = config.latent
        self.layers = [
            KVLayer(keys, values) if latent is None else reference.latent_layer(keys, latent.latent_dim)
            for keys, values in tensors
        ]
        self.states = [
            StateLayer(
                torch.zeros(max_sequences, layer.conv_width - 1, layer.num_channels),
                torch.zeros(max_sequences, layer.num_heads, layer.key_dim, layer.value_dim),
            )
            for layer in config.spec.recurrent_layers
        ]
        self.lengths = [0] * max_sequences

    def step(
        self, tokens: dict[int, Sequence[int]], read: dict[int, int] | None = None, *, replan: bool = True
    ) -> dict[int, Tensor]:
        """Sequence → its next tokens; returns sequence → logits [its new tokens, vocab_size], or what a stage that is
        not the last passes on.

        With `read` only that many last tokens of each sequence are read; `replan`: they get a plan of their own.
        """
        counts = [len(new) for new in tokens.values()]
        positions, slots = [], []
        for sequence, new in tokens.items():
            here = np.arange(self.lengths[sequence], self.lengths[sequence] + len(new), dtype=np.int32)
            blocks = self.block_tables[sequence][here // self.block_size]
            positions.append(here)
            slots.append(blocks * self.block_size + here % self.block_size)
            self.lengths[sequence] += len(new)
        plan = self._plan(list(tokens), counts, np.concatenate(slots))
        recurrence = None
        if self.config.recurrent is not None:
            bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
            recurrence = plan_recurrence(bounds, list(tokens), conv_width=self.config.recurrent.conv_width)
        output_tokens = None
        if read is not None:
            end = np.cumsum(counts)
            chosen = [np.arange(end[i] - read[sequence], end[i]) for i, sequence in enumerate(tokens)]
            counts = [read[sequence] for sequence in tokens]
            rows = torch.from_numpy(np.concatenate(chosen).astype(np.int32))
            own = self._plan(list(tokens), counts, np.concatenate(slots)[rows.numpy()]) if replan else None
            output_tokens = OutputTokens(rows, own)
        ids = torch.tensor([token for new in tokens.values() for token in new], dtype=torch.int32)
        with torch.inference_mode():
            context = StepContext(
                torch.from_numpy(np.concatenate(positions)),
                self.layers,
                [plan],
                output_tokens,
                self.states,
                recurrence,
            )
            hidden = self.model(ids, context)
            is_whole = self.config.stage is None or self.config.stage.is_last
            logits = self.model.logits(hidden) if is_whole else hidden
        assert logits.dtype == torch.float32
        return dict(zip(tokens, logits.split(counts), strict=True))

    def _plan(self, sequences: list[int], counts: list[int], slots: NDArray[np.int32]) -> AttentionPlan:
        step = StepArrays(
            np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            np.array([self.lengths[sequence] for sequence in sequences], dtype=np.int32),
            self.block_tables[sequences],
            slots,
        )
        latent = self.config.latent
        shape = AttentionShape(
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            value_dim=0 if latent is None else latent.latent_dim,
            expanded_dims=(0, 0) if latent is None else (latent.head_dim, latent.value_dim),
            block_size=self.block_size,
            num_threads=torch.get_num_threads(),
        )
        return plan_attention(step, shape)
