"""Scorer: how a model scores pairs of texts: the prompts to embed, and what the vectors say.

A cross-encoder reads both texts as one prompt, and its head's output is the score. A decoder that judges reads them in
the template of Qwen3-Reranker; the score is the probability of its answer yes. An embedder reads each text alone, and
the score is the cosine of both vectors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from quire.embeddings import EmbeddingRequestOutput
from quire.engine.input_processor import Prompt
from quire.engine.model_task import check_scores
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.model_config import ModelConfig

_JUDGE_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_JUDGE_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """The prompts of one scoring request, each embedded once without scaling, and the pairs that they make."""

    prompts: Sequence[Prompt]
    pairs: Sequence[tuple[int, ...]]
    """For each pair the index of its prompt, or of both."""
    scorer: "Scorer"

    def scores(self, outputs: Sequence[EmbeddingRequestOutput]) -> list[float]:
        """The score of each pair, given the prompts' vectors."""
        vectors = [output.outputs.embedding for output in outputs]
        return [
            cosine(vectors[pair[0]], vectors[pair[1]]) if len(pair) == 2 else self.scorer.score_of(vectors[pair[0]])
            for pair in self.pairs
        ]

    def token_ids(self, outputs: Sequence[EmbeddingRequestOutput]) -> list[list[int]]:
        """The tokens of each pair."""
        return [[token for index in pair for token in outputs[index].prompt_token_ids] for pair in self.pairs]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores pairs with one model."""

    model: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int

    def plan(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        truncates: bool = False,
        max_tokens_per_query: int | None = None,
        max_tokens_per_doc: int | None = None,
    ) -> ScorePlan:
        """The prompts of pairs of a query and a document. `truncates` lets a judge leave out the end of a document that
        is too long; other models truncate their prompts. Raises `RequestError` for a model that scores nothing."""
        check_scores(self.model)
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("the model has no tokenizer, without which there is no text to score", param="model")
        if max_tokens_per_query is not None or max_tokens_per_doc is not None:
            cuts = (max_tokens_per_query, max_tokens_per_doc)
            pairs = [
                (
                    a if cuts[0] is None else tokenizer.cut(a, cuts[0]),
                    b if cuts[1] is None else tokenizer.cut(b, cuts[1]),
                )
                for a, b in pairs
            ]
        pooling = self.model.pooling
        assert pooling is not None, "check_scores refuses a model without"
        if pooling.token_ids:
            prompts: list[Prompt] = self._judge_prompts(tokenizer, pairs, instruction, truncates)
        elif pooling.num_labels:
            encoded = tokenizer.encode_pairs(pairs)
            prompts = [{"prompt_token_ids": token_ids, "second_text": second} for token_ids, second in encoded]
        else:
            places: dict[str, int] = {}
            both = [tuple(places.setdefault(text, len(places)) for text in pair) for pair in pairs]
            return ScorePlan([*tokenizer.encode_all(list(places))], both, self)
        return ScorePlan(prompts, [(index,) for index in range(len(pairs))], self)

    def _judge_prompts(
        self, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], instruction: str | None, truncates: bool
    ) -> list[Prompt]:
        task = _INSTRUCTION if instruction is None else instruction
        bodies = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}" for query, document in pairs]
        prefix, suffix, *found = tokenizer.encode_all([_JUDGE_PREFIX, _JUDGE_SUFFIX, *bodies], add_special_tokens=False)
        room = max(1, self.max_model_len - len(prefix) - len(suffix)) if truncates else None
        return [[*prefix, *body[:room], *suffix] for body in found]

    def score_of(self, vector: list[float]) -> float:
        """The score of a pair that was one prompt."""
        return self.probabilities(vector)[-1]

    def probabilities(self, vector: list[float]) -> list[float]:
        """What the outputs of a classification head mean: a probability of each class."""
        pooling = self.model.pooling
        assert pooling is not None, "only classifiers have such vectors"
        if pooling.token_ids or pooling.activation == "softmax":
            return softmax(vector)
        return [sigmoid(value) for value in vector] if pooling.activation == "sigmoid" else vector

    def label(self, probabilities: Sequence[float]) -> str:
        """The name of the most likely class."""
        pooling = self.model.pooling
        labels = pooling.labels if pooling is not None else ()
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return labels[best] if best < len(labels) else f"LABEL_{best}"


def make_pairs(queries: Any, documents: Any) -> list[tuple[str, str]]:
    """One query with each document, or as many queries as documents. Raises `RequestError` for other shapes."""
    lists = []
    for name, given in (("data_1", queries), ("data_2", documents)):
        texts = [given] if isinstance(given, str) else list(given)
        if not texts:
            raise RequestError(f"{name} is empty; give a text or a list of texts", param=name)
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{name} holds something that is no text; give a text or a list of texts", param=name)
        lists.append(texts)
    first, second = lists
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise RequestError(
            f"data_1 has {len(first)} texts and data_2 {len(second)}; give one text or equally many", param="data_1"
        )
    return list(zip(first, second, strict=True))


def ranked(scores: Sequence[float], top_n: int | None) -> list[int]:
    """Indices of the best scores, best first; all of them for `top_n` None or 0."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return order[:top_n] if top_n else order


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine of the angle between two vectors; 0 where one has no length."""
    length = math.hypot(*a) * math.hypot(*b)
    return sum(map(mul, a, b)) / length if length else 0.0


def softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
