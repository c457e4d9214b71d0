"""LLM: the offline interface. One process; a list of prompts in, a list of RequestOutputs out. Names are vLLM's."""

import itertools
import sys
import weakref
from collections.abc import Mapping, Sequence
from reprlib import repr as brief
from typing import Any

from quire.config import EngineConfig
from quire.engine.chat_template import ChatTemplate
from quire.engine.checkpoint import model_name, read_default_params
from quire.engine.engine import Engine
from quire.engine.input_processor import Prompt, as_batch
from quire.engine.memory_plan import MemoryPlan
from quire.engine.message_images import has_images, take_images
from quire.engine.tokenizer import Tokenizer, read_special_tokens
from quire.errors import CheckpointError, RequestError
from quire.generation_progress import show_progress
from quire.llm_vectors import VectorMethods
from quire.lora.request import LoRARequest, one_for_each
from quire.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    EngineStats,
    MemoryReport,
    RegisteredPrefix,
    RequestOutput,
)
from quire.request import Task
from quire.sampling_params import BeamSearchParams, SamplingParams

Message = Mapping[str, Any]


_METHODS_ELSEWHERE = {
    "apply_model": "Quire's model is `quire.models`; docs/debugging.md shows how to read its layers",
    "collective_rpc": "one process computes; call what you need",
    "encode": "use embed, classify or score",
    "enqueue": "generate takes all prompts at once; AsyncLLM takes them as they come",
    "enqueue_chat": "chat takes all conversations at once; AsyncLLM takes prompts as they come",
    "from_engine_args": "LLM takes the options as keywords",
    "get_metrics": "use stats and memory_report",
    "reset_mm_cache": "images are found by their content; nothing needs a reset",
    "sleep": "close frees the memory",
    "start_profile": "run the process under a profiler such as py-spy",
    "stop_profile": "run the process under a profiler such as py-spy",
    "wait_for_completion": "generate returns when all prompts have ended",
    "wake_up": "close frees the memory; a new LLM takes it again",
}
"""Methods of vLLM's LLM that Quire lacks → what to use."""


class LLM(VectorMethods):
    """A model for offline generation.

    >>> llm = LLM()                                     # the bundled model
    >>> llm.generate("ROMEO:", SamplingParams(max_tokens=32))[0].outputs[0].text

    Keyword arguments are the fields of `EngineConfig`; an unknown one raises `ConfigError`. `logits_processors` may
    also hold objects (see `BatchLogitsProcessor`). `verbose` prints the memory plan and the phases of start-up to
    standard error.
    """

    def __init__(
        self,
        model: str = "",
        *,
        verbose: bool = False,
        logits_processors: Sequence[object] = (),
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options({"model": str(model), **options})
        config.make_folders()
        self._engine = Engine(
            config,
            report=(lambda line: print(line, file=sys.stderr)) if verbose else (lambda line: None),
            logits_processors=logits_processors,
        )
        # Also called when the interpreter exits.
        self._finalizer = weakref.finalize(self, self._engine.close)
        self._chat_template: ChatTemplate | None = None  # read when first asked for
        self._request_ids = itertools.count()

    def __getattr__(self, name: str) -> Any:
        advice = _METHODS_ELSEWHERE.get(name)
        raise AttributeError(f"LLM has no {name}" + (f": {advice}" if advice else ""), name=name, obj=self)

    def __repr__(self) -> str:
        plan, model = self._engine.memory_plan, model_name(self._engine.config.model)
        dtype = plan.dtype if plan.quantization is None else f"{plan.dtype}, {plan.quantization}"
        return (
            f"LLM({model}, {dtype}, KV pool of {plan.num_blocks} blocks × {plan.block_size} tokens "
            f"({plan.kv_cache / 2**20:.0f} MiB, {plan.kv_cache_dtype}), {plan.device})"
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        cache_salt: str = "",
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs are in the order of the prompts.

        A prompt is a text, a list of token ids, or a mapping with `prompt` or `prompt_token_ids`, and with images in
        `multi_modal_data` as in vLLM: {"image": one or a list}, where the prompt holds the model's token for each.
        `sampling_params` is
        one `SamplingParams` for all prompts or a list with one for each; None takes the model's own defaults.
        `use_tqdm` shows a progress bar on a terminal. `lora_request` is the adapter for all prompts, or a list with one
        or None for each. Raises `RequestError` before anything runs if a prompt or its parameters cannot be served.
        """
        batch = as_batch(prompts)
        params = self._params_of(sampling_params, len(batch))
        if isinstance(priority, int):
            priority = [priority] * len(batch)
        if priority is not None and len(priority) != len(batch):
            raise RequestError(f"{len(batch)} prompts came with {len(priority)} priorities", param="priority")
        return self._run(
            batch,
            params,
            Task.SAMPLE,
            use_tqdm=use_tqdm,
            priority=priority,
            cache_salt=cache_salt,
            adapters=one_for_each(lora_request, len(batch)),
        )

    def _run(
        self,
        batch: Sequence[Prompt],
        params: Sequence[SamplingParams],
        task: Task,
        *,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
        cache_salt: str,
        adapters: Sequence[LoRARequest | None],
    ) -> list[RequestOutput]:
        """Queue all prompts and step until all have ended."""
        outputs: dict[str, RequestOutput] = {}
        try:
            for index, (prompt, one) in enumerate(zip(batch, params, strict=True)):
                request_id = str(next(self._request_ids))
                outputs[request_id] = self._engine.add_request(
                    request_id,
                    prompt,
                    one,
                    task=task,
                    priority=priority[index] if priority else 0,
                    cache_salt=cache_salt,
                    lora_request=adapters[index],
                )
            most = [one.num_samples * (one.max_tokens or self.memory_plan.max_model_len) for one in params]
            if task is Task.EMBED:
                most = [1] * len(batch)
            with show_progress(dict(zip(outputs, most, strict=True)), shown=use_tqdm) as advance:
                while self._engine.has_work:
                    advance(self._engine.step())
        except BaseException:
            # Ctrl-C too: the next call must find an empty engine.
            for request_id in outputs:
                self._engine.abort(request_id)
            raise
        for output in outputs.values():
            output.outputs.sort(key=lambda completion: completion.index)
        return list(outputs.values())

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of every prompt, best first, by a search with `params.beam_width` beams.

        `generate` does the same for `SamplingParams` with a beam width, in one batch with other requests. Raises
        `RequestError` before anything runs if a prompt or a parameter cannot be served, and afterwards if a search
        failed.
        """
        tokenizer, results = self._engine.tokenizer, []
        outputs = self.generate(prompts, params.sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)
        for output in outputs:
            failed = next((sample.error for sample in output.outputs if sample.error is not None), None)
            if failed is not None:
                raise RequestError(failed, param="prompt")
            results.append(
                BeamSearchOutput(
                    [
                        BeamSearchSequence(
                            tokens=[*output.prompt_token_ids, *sample.token_ids],
                            text=tokenizer.decode([*output.prompt_token_ids, *sample.token_ids]) if tokenizer else "",
                            cum_logprob=sample.cumulative_logprob or 0.0,
                            finish_reason=sample.finish_reason,
                            stop_reason=sample.stop_reason,
                            logprobs=sample.logprobs,
                        )
                        for sample in output.outputs
                    ]
                )
            )
        return results

    def chat(
        self,
        messages: str | Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}; a text is one such message.
        For a model that reads images a content may be a list of parts: {"type": "text", "text": …} and {"type":
        "image", "image": …} with an image of Pillow, bytes, a path or a data URL.
        `tools` are those the model may call, in OpenAI's form. `chat_template` is the text of another template.
        """
        conversations = _as_conversations(messages)
        template = self._template_of(chat_template)
        variables = {**(chat_template_kwargs or {}), **({"tools": tools} if tools else {})}
        prompts: list[Prompt] = []
        for conversation in conversations:
            shown: Sequence[Message] = conversation
            sources: list[Any] = []
            if has_images(conversation):
                shown, sources = take_images(conversation, self._engine.images.marker)
            text = template.render(
                shown,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            if sources:
                prompts.append({"prompt": text, "multi_modal_data": {"image": sources}, "add_special_tokens": False})
            else:
                token_ids = self.get_tokenizer().encode(text, add_special_tokens=False)
                prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def _template_of(self, given: str | None) -> ChatTemplate:
        """The template given as a text, else the model's own. Raises `RequestError` for a text that is no template."""
        folder = self._engine.folder
        if given is not None:
            try:
                return ChatTemplate({"default": given}, read_special_tokens(folder), origin="chat_template")
            except CheckpointError as error:
                raise RequestError(str(error), param="chat_template") from None
        if self._chat_template is None:
            self._chat_template = ChatTemplate.from_folder(folder)
        return self._chat_template

    def register_prefix(self, prefix: Prompt, *, cache_salt: str = "") -> RegisteredPrefix:
        """Compute the KV of a prefix now and keep its full blocks until `unregister_prefix`.

        Prompts with the same `cache_salt` that begin with its tokens reuse it. Raises `RequestError`, with the numbers,
        if all prefixes together would hold more than `max_pinned_share` of the pool's blocks.
        """
        return self._engine.register_prefix(f"prefix-{next(self._request_ids)}", prefix, cache_salt=cache_salt)

    def unregister_prefix(self, prefix: RegisteredPrefix) -> None:
        """Release a prefix: its blocks stay cached until their space is needed. Safe to repeat."""
        self._engine.unregister_prefix(prefix)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer in use. Raises `RequestError` if the model has none."""
        if self._engine.tokenizer is None:
            raise RequestError("the model has no tokenizer", param="tokenizer")
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of the model's generation_config.json."""
        return SamplingParams(**read_default_params(self._engine.config, self._engine.folder))

    def reset_prefix_cache(self) -> None:
        """Make all cached prefixes unfindable, except registered ones."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Save to a disk tier what it lacks and release its folder. Called automatically when the object or the process
        ends."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def memory_plan(self) -> MemoryPlan:
        return self._engine.memory_plan

    def memory_report(self) -> MemoryReport:
        """Contents of the KV pool, in total and per unfinished request, and why prompts missed the prefix cache.

        `print` shows it as a table.
        """
        return self._engine.memory_report()

    def stats(self) -> EngineStats:
        """Present counts of requests, blocks, slots and tokens."""
        return self._engine.stats()

    def _params_of(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(f"{count} prompts came with {len(params)} sampling_params", param="sampling_params")
        return params


def _as_conversations(messages: Any) -> list[list[Message]]:
    """A text or one conversation → a list of one. Raises `RequestError` for anything that is no list of messages."""
    if isinstance(messages, str):
        return [[{"role": "user", "content": messages}]]
    if isinstance(messages, Mapping):
        return [[messages]]
    if messages and isinstance(messages[0], Mapping):
        messages = [messages]
    for conversation in messages:
        if isinstance(conversation, str) or not all(isinstance(message, Mapping) for message in conversation):
            raise RequestError(
                f"messages holds {brief(conversation)}; a conversation is a list of messages such as "
                '{"role": "user", "content": "Hello"}',
                param="messages",
            )
    return [list(conversation) for conversation in messages]
