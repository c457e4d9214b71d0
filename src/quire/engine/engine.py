"""Engine: everything in one process, text in, text out. `LLM` drives it.

add_request ─▶ InputProcessor ─▶ EngineCore.add
step        ─▶ EngineCore.step ─▶ OutputProcessor ─▶ RequestOutputs
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

from quire.config import EngineConfig
from quire.engine.checkpoint import find_model
from quire.engine.grammar_checker import GrammarChecker
from quire.engine.image_prompt import no_images
from quire.engine.input_processor import InputProcessor, Prompt
from quire.engine.limits import check_one_engine
from quire.engine.local_images import LocalImages, read_sources
from quire.engine.memory_plan import plan_memory
from quire.engine.model_task import read_model
from quire.engine.output_processor import OutputProcessor
from quire.engine.preloader import preload, without_garbage_collection
from quire.engine.text_prompts import read_text_prompts
from quire.engine.tokenizer import describe_tokenizer, load_tokenizer
from quire.errors import CheckpointError, RequestError
from quire.lora.registry import Adapter, AdapterRegistry
from quire.lora.request import LoRARequest
from quire.outputs import EngineStats, MemoryReport, RegisteredPrefix, RequestOutput
from quire.request import Task
from quire.sampling_params import SamplingParams


class Engine:
    """A model, its memory, and every request in flight."""

    def __init__(
        self,
        config: EngineConfig,
        report: Callable[[str], None],
        *,
        logits_processors: Sequence[object] | None = None,
    ) -> None:
        """Plan the memory, print the plan through `report`, load the model. Raises the errors of `quire.errors`.

        `logits_processors` replace the config's, which can only hold names.
        """
        check_one_engine(config)
        self.config = config
        self.folder = find_model(config.model, config.revision)
        self.model_config = read_model(config, self.folder)
        self.memory_plan = plan_memory(config, self.model_config)
        for line in self.memory_plan.describe():
            report(line)
        preloader = preload(config, self.model_config, self.memory_plan, self.folder)
        started = perf_counter()
        self.tokenizer = load_tokenizer(config, self.folder)
        self.text_prompts = read_text_prompts(self.folder)
        report(describe_tokenizer(self.tokenizer, perf_counter() - started))
        started = perf_counter()
        with without_garbage_collection():
            from quire.engine.build import build_core  # imports torch while the preloader reads the checkpoint
        report(f"import torch: {perf_counter() - started:.2f} s")
        self._core = build_core(
            config,
            self.model_config,
            self.memory_plan,
            self.folder,
            lambda name, seconds: report(f"{name}: {seconds:.2f} s"),
            preloader=preloader,
            logits_processors=logits_processors,
        )
        self._inputs = InputProcessor(
            self.model_config,
            self.tokenizer,
            max_model_len=self.memory_plan.max_model_len,
            max_logprobs=config.max_logprobs,
            seed=config.seed,
        )
        self._adapters = AdapterRegistry(config.lora_modules)
        self._outputs = OutputProcessor(self.tokenizer, outputs_grow=True)
        self._grammar_checker = GrammarChecker.for_model(config, self.model_config, self.folder)
        self._images: LocalImages | None = None
        if self.model_config.vision is not None and self.tokenizer is not None and config.max_images:
            self._images = LocalImages(config, self.model_config.vision, self.tokenizer)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        task: Task = Task.SAMPLE,
        priority: int = 0,
        cache_salt: str = "",
        lora_request: LoRARequest | None = None,
    ) -> RequestOutput:
        """Queue a request. Returns its output, which grows with every step until it is finished.

        Raises `RequestError` for a request that cannot be served.
        """
        if isinstance(prompt, Mapping) and (sources := read_sources(prompt)):
            prompt = self.images.prompt(prompt, sources)
        request, text = self._inputs.make_request(
            request_id,
            prompt,
            params,
            task=task,
            priority=priority,
            cache_salt=cache_salt,
            adapter=None if lora_request is None else self._find_adapter(lora_request),
        )
        if params.structured_outputs is not None:
            request = replace(request, grammar_bytes=self._grammar_checker.check(params.structured_outputs))
        self._core.add(request, wait=True)
        return self._outputs.add(request, text)

    @property
    def images(self) -> LocalImages:
        """Reads the images of prompts. Raises `RequestError` if the model reads text only."""
        if self._images is None:
            raise no_images()
        return self._images

    def _find_adapter(self, request: LoRARequest) -> Adapter:
        """Raises `RequestError` for a folder that holds no adapter."""
        if not self.config.enable_lora:
            raise RequestError(
                f"lora_request names {request.lora_name!r}, and adapters are off; make LLM with enable_lora=True",
                param="lora_request",
            )
        try:
            return self._adapters.identify(request.lora_path)
        except CheckpointError as error:
            raise RequestError(str(error), param="lora_request", code="invalid_adapter") from error

    def register_prefix(self, prefix_id: str, prefix: Prompt, *, cache_salt: str = "") -> RegisteredPrefix:
        """Compute a prefix now and hold it until `unregister_prefix`.

        Raises `RequestError` for a prefix that cannot be held, and while requests are in flight.
        """
        if self._core.has_work:
            raise RequestError("requests are in flight; register a prefix when they have ended", param="prefix")
        token_ids = self._inputs.token_ids_of(prefix)
        self._core.register_prefix(prefix_id, token_ids, (cache_salt,))
        try:
            while self._core.has_work:
                self._core.step()
        finally:
            self._core.abort(prefix_id)
        if not self._core.holds_prefix(prefix_id):
            raise RequestError("the prefix could not be computed: the model's logits are not finite", param="prefix")
        block_size = self.memory_plan.block_size
        return RegisteredPrefix(prefix_id, len(token_ids), len(token_ids) // block_size * block_size)

    def unregister_prefix(self, prefix: RegisteredPrefix) -> None:
        """Release a registered prefix; its blocks stay findable until their space is needed."""
        self._core.unregister_prefix(prefix.prefix_id)

    def abort(self, request_id: str) -> None:
        """Remove a request; its memory is free when this returns."""
        self._core.abort(request_id)
        self._outputs.discard(request_id)

    def step(self) -> Sequence[RequestOutput]:
        """Run one step; returns the outputs that grew."""
        outputs, stopped = self._outputs.process(self._core.step())
        for _, error in self._core.take_refused():  # an adapter that was damaged since its header was read
            raise error
        for request_id, index in stopped:
            self._core.stop(request_id, index)
        return outputs

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def memory_report(self) -> MemoryReport:
        return self._core.memory_report()

    def stats(self) -> EngineStats:
        return self._core.stats()

    def reset_prefix_cache(self) -> None:
        self._core.reset_prefix_cache()

    def close(self) -> None:
        """Save to the disk tier what it lacks and close its files. The engine cannot be used afterwards."""
        self._grammar_checker.close()
        if self._images is not None:
            self._images.close()
        self._core.close()
