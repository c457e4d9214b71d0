"""ModelRunner: executes a StepPlan with a model, its KV cache and the sampler.

One step, read from top to bottom in `execute`: take in rows and block tables, copy blocks that are about to be written,
lay out the inputs, plan attention once for all layers, run the model while a thread computes what grammars forbid, draw
samples. It decides nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quire.attention.plan import plan_attention
from quire.grammar.cache import GrammarCache
from quire.kernels.interface import Kernels
from quire.kv_cache.storage import KVCache
from quire.model_config import ModelConfig
from quire.models.registry import Model
from quire.runner.block_store import BlockStore
from quire.runner.input_batch import make_input_batch
from quire.runner.request_rows import RequestRows
from quire.runner.sample_points import SamplePoints, make_sample_points
from quire.sampling.logits_processors import BatchLogitsProcessor
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import Sampler, SampleResult
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import MaskWorker
from quire.step import StepPlan, StepResult, TokenLogprobs, logprob_bytes


class ModelRunner:
    """Owns the model, the KV tensors and the rows."""

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        model_config: ModelConfig,
        kernels: Kernels,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_threads: int,
        logprobs_memory: int,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
        block_store: BlockStore | None = None,
        grammars: GrammarCache | None = None,
        fast_forward: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        """`grammars` holds those of the requests that will come; `fast_forward` takes what they force for granted.

        `batch_invariant`: no bit of a sequence's logits depends on what shares its step.
        """
        self._block_store = block_store
        self._model = model
        self._kv_cache = kv_cache
        self._config = model_config
        self._kernels = kernels
        self._num_threads = num_threads
        self._max_model_len = max_model_len
        self._batch_invariant = batch_invariant
        # With one window for all layers the plan leaves out keys that no layer sees.
        windows = set(model_config.layer_windows) or {0}
        self._window = 0 if 0 in windows else max(windows)
        self._rows = RequestRows(
            max_num_seqs=max_num_seqs,
            max_blocks=-(-max_model_len // kv_cache.block_size),
            vocab_size=model_config.vocab_size,
            grammars=grammars,
            fast_forward=fast_forward and not logits_processors,  # they are there to see every token's logits
        )
        self._logprobs_memory = logprobs_memory
        self._sampler = Sampler(model_config.vocab_size, logprobs_memory, logits_processors)
        self._masks = MaskWorker(model_config.vocab_size, num_threads=max(1, num_threads // 2))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. The result's lists are in the order of `plan.sample_rows`."""
        self._rows.apply(plan)
        load_seconds = 0.0
        if self._block_store is not None and plan.moves is not None:
            load_seconds = self._block_store.move(plan.moves)
        result = StepResult()
        if plan.rows:
            self._compute(plan, result)
        if self._block_store is not None:
            result.moved = self._block_store.collect(wait=plan.moves is not None and plan.moves.wait)
            result.moved.load_seconds = load_seconds
        return result

    def close(self) -> None:
        """Let go of files."""
        if self._block_store is not None:
            self._block_store.close()

    def _compute(self, plan: StepPlan, result: StepResult) -> None:
        points = make_sample_points(plan, self._rows.sampling_states(plan.sample_rows))
        self._masks.start([state.grammar for state in points.states if state.grammar is not None])
        self._copy_blocks(plan)
        batch = make_input_batch(plan, self._rows, self._kv_cache.block_size)
        attention = plan_attention(
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
            batch.slots,
            num_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            block_size=self._kv_cache.block_size,
            num_threads=self._num_threads,
            window=self._window,
            batch_invariant=self._batch_invariant,
        )
        hidden = self._model(
            torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions), self._kv_cache, attention
        )
        if plan.sample_after:
            self._sample(plan, points, hidden, result)
        for index, (num_logprobs, targets) in plan.prompt_logprobs.items():
            first = int(batch.query_start_loc[index])
            rows = hidden[first : first + len(targets)]
            result.prompt_logprobs[index] = self._prompt_logprobs(rows, targets, num_logprobs)

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.block_copies:
            self._kernels.copy_blocks(self._kv_cache.layers, torch.tensor(plan.block_copies, dtype=torch.int32))

    def _sample(self, plan: StepPlan, points: SamplePoints, hidden: torch.Tensor, result: StepResult) -> None:
        if np.array_equal(points.tokens, np.arange(len(hidden))):
            logits = self._model.logits(hidden)  # a step of decoding: something is drawn after every token
        else:
            rows, place = torch.unique_consecutive(torch.from_numpy(points.tokens), return_inverse=True)
            logits = self._model.logits(hidden[rows])
            if len(rows) < len(points.tokens):
                logits = logits[place]  # where a prompt ends and n samples part, each draws from a copy
        self._masks.join()
        sampled = self._sampler.sample(logits, points.states)
        for index, first in enumerate(points.first[:-1]):
            result.token_ids.append(sampled.token_ids[first])
            result.logprobs.append(sampled.logprobs[first])
            result.errors.append(sampled.errors[first])
            if first in sampled.candidates:
                result.candidates[index] = sampled.candidates[first]
            elif sampled.errors[first] is None:
                state, num_points = points.states[first], points.first[index + 1] - first
                following, logprobs = self._accept(sampled, first, num_points, plan.drafts.get(index, []), state)
                following += self._follow_grammar(index, state, result)
                if following:
                    result.following[index] = following
                if logprobs:
                    result.following_logprobs[index] = logprobs

    @staticmethod
    def _accept(
        sampled: SampleResult, first: int, num_points: int, draft: list[int], state: SamplingState
    ) -> tuple[list[int], list[TokenLogprobs]]:
        """Let a sequence take its sample, and those after drafted tokens as far as these are what was drawn.

        Returns what follows the first sample. A sample that failed is drawn again, and fails again, in the next step.
        """
        following: list[int] = []
        logprobs: list[TokenLogprobs] = []
        state.append(sampled.token_ids[first])
        for point in range(first + 1, first + num_points):
            if sampled.token_ids[point - 1] != draft[len(following)] or sampled.errors[point] is not None:
                break
            if state.grammar is not None and not state.grammar.has_choice:
                break
            state.append(sampled.token_ids[point])
            following.append(sampled.token_ids[point])
            logprob = sampled.logprobs[point]
            if logprob is not None:
                logprobs.append(logprob)
        return following, logprobs

    def _follow_grammar(self, index: int, state: SamplingState, result: StepResult) -> list[int]:
        """Take the tokens that can only come next, and see whether the text is complete."""
        if state.grammar is None:
            return []
        # Never more than the request may have: a grammar can force a million tokens.
        limit = min(state.params.max_tokens or self._max_model_len, self._max_model_len) - state.position
        forced = state.take_forced(limit)
        if state.grammar.complete:
            result.complete.append(index)
        return forced

    def _prompt_logprobs(self, hidden: torch.Tensor, targets: list[int], num_logprobs: int) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        # Logits of a long prompt would be larger than its KV: as many positions exist at once as the plan has room for.
        num_rows = max(1, self._logprobs_memory // logprob_bytes(self._config.vocab_size, num_logprobs))
        for first in range(0, len(targets), num_rows):
            part = slice(first, first + num_rows)
            entries += token_logprobs(self._model.logits(hidden[part]), targets[part], num_logprobs)
        return entries
