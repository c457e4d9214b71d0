"""VectorMethods: the part of `LLM` that makes vectors: embed, classify, score and rerank. Names are vLLM's."""

from collections.abc import Sequence

from quire.embeddings import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RerankResult,
    ScoringOutput,
    ScoringRequestOutput,
    embedding_params,
    make_embedding,
    shortened,
)
from quire.engine.engine import Engine
from quire.engine.input_processor import Prompt, as_batch
from quire.engine.model_task import check_classifies, check_dimensions_of, check_embeds
from quire.engine.scoring import Scorer, make_pairs, ranked
from quire.errors import RequestError
from quire.lora.request import LoRARequest, one_for_each
from quire.outputs import RequestOutput
from quire.request import Task
from quire.sampling_params import SamplingParams


class VectorMethods:
    """What `LLM` inherits; it has the engine and runs the prompts."""

    _engine: Engine

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
        raise NotImplementedError

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        cache_salt: str = "",
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for every prompt, in the order of the prompts: pooled as the model's folder says, by default the
        last token's hidden state after the final norm.

        `normalize` scales it to length 1; None does so unless the folder's modules leave it out. `dimensions` keeps the
        first numbers, scaled to length 1. `prompt_name` is a prompt of the folder, put before texts.
        `truncate_prompt_tokens` keeps only so many tokens of a prompt, of a decoder without pooling the last; −1: as
        many as the context holds. Raises `RequestError` before anything runs if a prompt cannot be served, and
        afterwards if one failed.
        """
        model = self._engine.model_config
        check_embeds(model)
        check_dimensions_of(model, dimensions)
        batch = self._with_prompt(as_batch(prompts), prompt_name)
        vectors = self._vectors(batch, truncate_prompt_tokens, normalize, use_tqdm, cache_salt, lora_request)
        if dimensions is not None:
            allowed = () if model.pooling is None else model.pooling.matryoshka_dimensions
            for vector in vectors:
                vector.outputs.embedding = shortened(vector.outputs.embedding, dimensions, allowed)
        return vectors

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, truncate_prompt_tokens: int | None = None, use_tqdm: bool = True
    ) -> list[ClassificationRequestOutput]:
        """The probability of each of a classifier's labels for every prompt. Raises `RequestError` as `embed` does."""
        check_classifies(self._engine.model_config)
        scorer, found = self._scorer, []
        for output in self._vectors(as_batch(prompts), truncate_prompt_tokens, False, use_tqdm, ""):
            probabilities = scorer.probabilities(output.outputs.embedding)
            found.append(
                ClassificationRequestOutput(
                    output.request_id,
                    output.prompt_token_ids,
                    ClassificationOutput(probabilities),
                    scorer.label(probabilities),
                )
            )
        return found

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well each text of `data_2` fits the one of `data_1`: one text for all, or as many as there are. The
        scores are a cross-encoder's, a judge's (Qwen3-Reranker), or cosines of an embedding model's vectors.

        `instruction` is a judge's task. Raises `RequestError` as `embed` does.
        """
        truncates = truncate_prompt_tokens is not None
        plan = self._scorer.plan(make_pairs(data_1, data_2), instruction=instruction, truncates=truncates)
        outputs = self._vectors(plan.prompts, truncate_prompt_tokens, False, use_tqdm, "")
        return [
            ScoringRequestOutput(outputs[pair[0]].request_id, tokens, ScoringOutput(score))
            for pair, tokens, score in zip(plan.pairs, plan.token_ids(outputs), plan.scores(outputs), strict=True)
        ]

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, instruction: str | None = None
    ) -> list[RerankResult]:
        """The documents that fit the query best, best first; all, or `top_n`. Raises `RequestError` as `score` does."""
        if top_n is not None and top_n < 0:
            raise RequestError(f"top_n is {top_n}; give a number of documents, or 0 for all", param="top_n")
        documents = list(documents)
        outputs = self.score(query, documents, instruction=instruction, use_tqdm=False)
        scores = [output.outputs.score for output in outputs]
        return [RerankResult(index, scores[index], documents[index]) for index in ranked(scores, top_n)]

    @property
    def _scorer(self) -> Scorer:
        engine = self._engine
        return Scorer(engine.model_config, engine.tokenizer, engine.memory_plan.max_model_len)

    def _with_prompt(self, batch: Sequence[Prompt], name: str | None) -> Sequence[Prompt]:
        """The batch with the named prompt of the folder, or its default one, before every text."""
        prompts = self._engine.text_prompts
        return [prompts.apply([prompt], name)[0] if isinstance(prompt, str) else prompt for prompt in batch]

    def _vectors(
        self,
        batch: Sequence[Prompt],
        truncate: int | None,
        normalize: bool | None,
        use_tqdm: bool,
        cache_salt: str = "",
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        params, adapters = [embedding_params(truncate)] * len(batch), one_for_each(lora_request, len(batch))
        outputs = self._run(batch, params, Task.EMBED, use_tqdm=use_tqdm, cache_salt=cache_salt, adapters=adapters)
        if normalize is None:
            normalize = self._engine.model_config.normalizes
        return [make_embedding(output, normalize=normalize) for output in outputs]
