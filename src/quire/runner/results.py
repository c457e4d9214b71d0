"""Results: what samples mean for their sequences, and when they are known.

`StepResults` adds sampled tokens to the sampling states: drafts as far as they were right, tokens that a grammar
forces, placeholders for tokens that the device has sampled but the host has not read. `PromptLogprobs` computes
log-probabilities of prompts. Nothing here knows a model.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.transfer import send, to_device
from quire.models.pooler import Pooler
from quire.runner.sampling_metadata import SamplingMetadata
from quire.runner.step_inputs import SentInputs, StepInputs
from quire.sampling.device_sampler import DeviceSampler, has_device_logprobs, read_logprobs, read_samples
from quire.sampling.logprobs import token_logprobs
from quire.sampling.sampler import SampleResult
from quire.sampling.state import SamplingState
from quire.sampling.structured_output import GrammarState
from quire.step import StepPlan, StepResult, TokenLogprobs, logprob_bytes

Finish = Callable[[], None]
"""Waits for something that the device computes, and puts it into a StepResult."""


class PendingStep:
    """A step that was launched."""

    def __init__(self, result: StepResult, finishes: Sequence[Finish] = ()) -> None:
        """`finishes` complete `result`."""
        self._result = result
        self._finishes = finishes

    @property
    def ready(self) -> bool:
        """True if `result` does not wait."""
        return not self._finishes

    def result(self) -> StepResult:
        """The step's result; waits until it is complete. Its lists are in the order of `plan.sample_rows`."""
        finishes, self._finishes = self._finishes, ()
        for finish in finishes:
            finish()
        return self._result


class StepResults:
    """Adds what was sampled to the sequences' states and to a StepResult."""

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len

    def accept(self, plan: StepPlan, sampling: SamplingMetadata, sampled: SampleResult, result: StepResult) -> None:
        """Add sampled tokens to their sequences, with drafts as far as they were right, and fill `result`."""
        result.token_ids, result.logprobs, result.errors = sampled.token_ids, sampled.logprobs, sampled.errors
        if sampling.outputs is not None and not any(sampled.errors):
            for output_token_ids, token_id in zip(sampling.outputs, sampled.token_ids, strict=True):
                output_token_ids.append(token_id)
            return
        offsets = sampling.offsets
        if plan.drafts:
            result.token_ids = [sampled.token_ids[first] for first in offsets[:-1]]
            result.logprobs = [sampled.logprobs[first] for first in offsets[:-1]]
            result.errors = [sampled.errors[first] for first in offsets[:-1]]
        for index, first in enumerate(offsets[:-1]):
            if first in sampled.candidates:
                result.candidates[index] = sampled.candidates[first]
            elif result.errors[index] is None:
                state = sampling.states[first]
                extra: list[int] = []
                state.append(result.token_ids[index])
                if index in plan.drafts:
                    samples = range(first + 1, offsets[index + 1])
                    extra, logprobs = _accept_draft(sampled, samples, plan.drafts[index], state)
                    if logprobs:
                        result.extra_logprobs[index] = logprobs
                if state.grammar is not None:
                    extra += self._append_forced(index, state, state.grammar, result)
                if extra:
                    result.extra_token_ids[index] = extra

    def accept_later(self, plan: StepPlan, sampling: SamplingMetadata, samples: Tensor, result: StepResult) -> Finish:
        """Begin to read `samples` (see `DeviceSampler.sample`); the columns after those of the states are padding.

        Without drafts the states get a placeholder at once, so that the next step can be launched. With drafts it
        cannot: the number of accepted tokens decides what comes next.
        """
        read = fetch(samples)
        states = sampling.states
        if plan.drafts:
            return lambda: self.accept(plan, sampling, read_samples(read(), states), result)
        indices = [state.append_placeholder() for state in states]

        def finish() -> None:
            sampled = read_samples(read(), states)
            result.token_ids, result.logprobs, result.errors = sampled.token_ids, sampled.logprobs, sampled.errors
            for state, index, token_id in zip(states, indices, result.token_ids, strict=True):
                state.fill_placeholder(index, token_id)

        return finish

    def _append_forced(self, index: int, state: SamplingState, grammar: GrammarState, result: StepResult) -> list[int]:
        """Add the tokens that must come next, and note in `result` if the text is complete."""
        # A grammar can force a million tokens; the request's limit holds for them too.
        limit = min(state.params.max_tokens or self._max_model_len, self._max_model_len) - state.position
        forced = state.append_forced(limit)
        if grammar.complete:
            result.terminated.append(index)
        return forced


def _accept_draft(
    sampled: SampleResult, samples: range, draft: list[int], state: SamplingState
) -> tuple[list[int], list[TokenLogprobs]]:
    """Add the samples made after draft tokens, as long as the draft token before each was the one sampled.

    Stops before a sample that failed: it fails again in the next step, as that sequence's own.
    """
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for sample in samples:
        if sampled.token_ids[sample - 1] != draft[len(token_ids)] or sampled.errors[sample] is not None:
            break
        if state.grammar is not None and not state.grammar.has_choice:
            break
        state.append(sampled.token_ids[sample])
        token_ids.append(sampled.token_ids[sample])
        logprob = sampled.logprobs[sample]
        if logprob is not None:
            logprobs.append(logprob)
    return token_ids, logprobs


class PromptLogprobs:
    """Computes log-probabilities of prompt tokens, on the device where it can."""

    def __init__(
        self,
        compute_logits: Callable[[Tensor, NDArray[np.int32]], Tensor],
        vocab_size: int,
        logprobs_memory: int,
        device_sampler: DeviceSampler | None,
    ) -> None:
        """`compute_logits` maps hidden states [R, H], and the R tokens of the step that they belong to, to logits
        [R, vocab_size]; `logprobs_memory` is in bytes."""
        self._compute_logits = compute_logits
        self._vocab_size = vocab_size
        self._logprobs_memory = logprobs_memory
        self._device_sampler = device_sampler

    def compute(self, step: StepInputs, sent: SentInputs, hidden: Tensor, result: StepResult) -> list[Finish]:
        """Fill in `result.prompt_logprobs` from the step's hidden states, or return what fills it in."""
        finishes: list[Finish] = []
        for index, (num_logprobs, targets) in step.plan.prompt_logprobs.items():
            first_token = step.batch.query_start_loc[index : index + 1]
            start = int(sent.hidden_indices(first_token)[0])
            entries: list[TokenLogprobs] = []
            result.prompt_logprobs[index] = entries
            # The logits of a long prompt can be larger than its KV: there is memory for so many positions at once.
            num_rows = max(1, self._logprobs_memory // logprob_bytes(self._vocab_size, num_logprobs))
            for first in range(0, len(targets), num_rows):
                token_ids = targets[first : first + num_rows]
                tokens: NDArray[np.int32] = np.arange(first, first + len(token_ids), dtype=np.int32)
                tokens += first_token
                logits = self._compute_logits(hidden[start + first : start + first + len(token_ids)], tokens)
                if self._device_sampler is None or not has_device_logprobs(num_logprobs):
                    entries += token_logprobs(logits.float().cpu(), token_ids, num_logprobs)
                else:
                    read = _fetch_logprobs(self._device_sampler, logits, token_ids, num_logprobs)
                    finishes.append(partial(_add_logprobs, entries, read, token_ids, num_logprobs))
        return finishes


def fetch_vectors(
    step: StepInputs, sent: SentInputs, hidden: Tensor, pooler: Pooler | None, result: StepResult
) -> Finish:
    """Begin to read the vectors of the plan's `pool_rows`, made of the hidden states [R, H]: by default those of last
    tokens. Returns what fills in `result.vectors`."""
    pool_rows, starts = step.plan.pool_rows, step.batch.query_start_loc
    reads_all = pooler is not None and pooler.reads_all_tokens
    if reads_all and sent.selection is None and pool_rows == list(range(len(starts) - 1)):
        vectors, lengths = hidden, np.diff(starts).astype(np.int64)
    else:
        last = starts[1:][pool_rows] - np.int32(1)
        first = starts[:-1][pool_rows] if reads_all else last
        lengths = (last - first + 1).astype(np.int64)
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = (np.repeat(first, lengths) + offsets).astype(np.int32)
        vectors = hidden[to_device(sent.hidden_indices(tokens), hidden.device)]
    if pooler is not None:
        vectors = pooler(vectors, torch.from_numpy(lengths).to(hidden.device))
    # `fetch` reads int32, and the bits of a float32 are as good.
    read = fetch(vectors.float().view(torch.int32))

    def finish() -> None:
        for index, vector in zip(pool_rows, read().view(np.float32), strict=True):
            if np.isfinite(vector).all():
                result.vectors[index] = vector.tobytes()
            else:
                result.vector_errors[index] = "the model's hidden states are not finite"

    return finish


def _fetch_logprobs(
    sampler: DeviceSampler, logits: Tensor, token_ids: list[int], num_logprobs: int
) -> Callable[[], NDArray[np.int32]]:
    num_entries = np.full(len(token_ids), 1 + num_logprobs, dtype=np.int32)
    columns = send({"tokens": np.array(token_ids, dtype=np.int32), "num_entries": num_entries}, logits.device)
    return fetch(sampler.logprobs(logits, columns["tokens"], columns["num_entries"]))


def _add_logprobs(
    entries: list[TokenLogprobs], read: Callable[[], NDArray[np.int32]], token_ids: list[int], num_logprobs: int
) -> None:
    entries += read_logprobs(read(), token_ids, [num_logprobs] * len(token_ids))


def fetch(tensor: Tensor) -> Callable[[], NDArray[np.int32]]:
    """Begin to copy a tensor to the host; the next step may overwrite it. The returned function waits for the copy."""
    if tensor.device.type == "cpu":
        tensor = tensor.clone()
    if tensor.device.type != "cuda":
        return lambda: tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> NDArray[np.int32]:
        copied.synchronize()
        return host.numpy()

    return wait
