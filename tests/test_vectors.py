"""`LLM.embed`, `classify`, `score` and `rerank` of encoders, sentence-transformers folders, classifiers and judges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from quire import LLM, RequestError
from quire.engine.scoring import _INSTRUCTION, _JUDGE_PREFIX, _JUDGE_SUFFIX
from quire.errors import CheckpointError, ConfigError
from tests.embedders import make_bert, make_judge, make_modules

TEXTS = ["The cat sat on the mat.", "What is the capital of France?", "paris", "dogs running, unheard"]


def hidden_of(model: Any, folder: Path, text: str, pair: str | None = None) -> Any:
    """transformers' hidden states and logits of a text."""
    with torch.no_grad():
        return model(**BertTokenizer(str(folder / "vocab.txt"))(text, pair, return_tensors="pt"))


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, make_bert(folder)


def test_a_vocab_txt(bert: tuple[Path, Any]) -> None:
    """Its tokens are those of transformers, and vectors follow."""
    folder, model = bert
    for text, found in zip(TEXTS, LLM(str(folder)).embed(TEXTS), strict=True):
        states = hidden_of(model, folder, text).last_hidden_state[0].numpy()
        assert len(found.prompt_token_ids) == len(states)
        np.testing.assert_allclose(found.outputs.embedding, unit(states.mean(0)), atol=1e-5)


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    """Two poolings joined, a Dense layer, no scaling, a default prompt, the longest text, trained dimensions."""
    model = make_bert(tmp_path, matryoshka_dimensions=[6])
    joined = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    make_modules(tmp_path, "Pooling", pooling=joined)
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "query: ", "plain": ""}, "default_prompt_name": "query"})
    )
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    llm = LLM(str(tmp_path))
    states = hidden_of(model, tmp_path, "query: paris").last_hidden_state[0].numpy()
    expected = np.concatenate((states[0], states.mean(0)))
    np.testing.assert_allclose(llm.embed("paris")[0].outputs.embedding, expected, atol=1e-4)
    other = hidden_of(model, tmp_path, "paris").last_hidden_state[0].numpy()
    (plain,) = llm.embed("paris", prompt_name="plain", dimensions=6)
    np.testing.assert_allclose(plain.outputs.embedding, unit(other[0][:6]), atol=1e-5)
    assert llm.memory_plan.max_model_len == 9
    (cut,) = llm.embed("the " * 30, prompt_name="plain", truncate_prompt_tokens=-1)
    assert len(cut.prompt_token_ids) == 9
    assert cut.prompt_token_ids[0] == 2  # [CLS]
    assert cut.prompt_token_ids[-1] == 3  # [SEP]
    for options, words in (
        ({"dimensions": 7}, "trained for 6"),
        ({"dimensions": 65}, "64 numbers"),
        ({"prompt_name": "x"}, "query, plain"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.embed("paris", **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="maximum context length is 9"):
        llm.embed("the " * 30)


def test_a_dense_module(tmp_path: Path) -> None:
    model = make_bert(tmp_path)
    linear = make_modules(tmp_path, "Pooling", "Dense", "Normalize", pooling={"pooling_mode": "cls"})
    (found,) = LLM(str(tmp_path)).embed("the big red dog")
    with torch.no_grad():
        state = hidden_of(model, tmp_path, "the big red dog").last_hidden_state[0, 0]
        np.testing.assert_allclose(found.outputs.embedding, unit(torch.tanh(linear(state)).numpy()), atol=1e-5)


def test_classes(tmp_path: Path) -> None:
    model = make_bert(tmp_path, num_labels=3)
    llm = LLM(str(tmp_path))
    for text, found in zip(TEXTS, llm.classify(TEXTS, use_tqdm=False), strict=True):
        expected = hidden_of(model, tmp_path, text).logits[0].softmax(0).numpy()
        np.testing.assert_allclose(found.outputs.probs, expected, atol=1e-5)
        assert found.label == f"class {expected.argmax()}"
    for refused in (llm.embed, llm.generate, lambda text: llm.score(text, text)):
        with pytest.raises(RequestError) as error:
            refused("paris")
        assert error.value.code == "wrong_task"


@pytest.mark.parametrize("identity", [False, True])
def test_a_cross_encoder(tmp_path: Path, identity: bool) -> None:
    """Token types mark the second text; scores pass a sigmoid unless the folder says otherwise."""
    options: dict[str, Any] = {"sbert_ce_default_activation_function": "torch.nn.Identity"} if identity else {}
    model = make_bert(tmp_path, num_labels=1, **options)
    llm = LLM(str(tmp_path))
    expected = [hidden_of(model, tmp_path, TEXTS[1], text).logits[0, 0] for text in TEXTS]
    expected = [float(score if identity else score.sigmoid()) for score in expected]
    found = [output.outputs.score for output in llm.score(TEXTS[1], TEXTS)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    best = llm.rerank(TEXTS[1], TEXTS, top_n=2)
    assert [result.index for result in best] == np.argsort(expected)[::-1][:2].tolist()
    assert best[0].document == TEXTS[best[0].index]
    with pytest.raises(RequestError, match="2 texts and data_2 4"):
        llm.score(TEXTS[:2], TEXTS)


def test_scores_of_an_embedder_are_cosines(bert: tuple[Path, Any]) -> None:
    llm = LLM(str(bert[0]))
    vectors = [np.array(output.outputs.embedding) for output in llm.embed(TEXTS)]
    found = [output.outputs.score for output in llm.score(TEXTS[:2], TEXTS[2:])]
    np.testing.assert_allclose(found, [vectors[0] @ vectors[2], vectors[1] @ vectors[3]], atol=1e-5)


def test_a_judge(tmp_path: Path) -> None:
    """Qwen3-Reranker: the probability of yes beside no after its template."""
    model = make_judge(tmp_path)
    llm = LLM(str(tmp_path), task="score")
    tokenizer = llm.get_tokenizer()
    (found,) = llm.score("what is paris", "paris is a city")
    body = f"<Instruct>: {_INSTRUCTION}\n<Query>: what is paris\n<Document>: paris is a city"
    ids = [token for text in (_JUDGE_PREFIX, body, _JUDGE_SUFFIX) for token in tokenizer.encode(text, False)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    no, yes = (tokenizer.encode(word, False)[0] for word in ("no", "yes"))
    assert found.outputs.score == pytest.approx(float(logits[[no, yes]].softmax(0)[1]), abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_that_embeds(tmp_path: Path, pooling: str) -> None:
    """By the last token in chunks, by the mean of all in one step."""
    model = make_judge(tmp_path)
    llm = LLM(str(tmp_path), task="embed", pooling_type=pooling, max_model_len=100)
    prompts = [np.random.default_rng(length).integers(5, 40, length).tolist() for length in (1, 70, 33)]
    for prompt, found in zip(prompts, llm.embed(prompts), strict=True):
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0].numpy()
        expected = states[-1] if pooling == "last" else states.mean(0)
        np.testing.assert_allclose(found.outputs.embedding, unit(expected), atol=1e-5)


def test_int8(bert: tuple[Path, Any]) -> None:
    exact, rounded = (LLM(str(bert[0]), **options).embed(TEXTS) for options in ({}, {"quantization": "int8"}))
    for a, b in zip(exact, rounded, strict=True):
        assert 0.995 < np.dot(a.outputs.embedding, b.outputs.embedding) < 1 - 1e-9


def test_what_a_folder_cannot_be(bert: tuple[Path, Any], tmp_path: Path) -> None:
    folder = str(bert[0])
    for options, words in (
        ({"task": "generate"}, "'embed'"),
        ({"task": "classify"}, "'embed'"),
        ({"pooling_type": "first"}, "must be one of auto, mean"),
        ({"max_model_len": 41}, "knows 40 positions"),
        ({"max_num_batched_tokens": 20, "max_num_seqs": 2, "max_model_len": 30}, "in one step"),
        ({"swap_space": "1GiB"}, "keeps no KV"),
    ):
        with pytest.raises(ConfigError, match=words):
            LLM(folder, **options)
    make_bert(tmp_path)
    make_modules(tmp_path, "Pooling", "LSTM")
    with pytest.raises(CheckpointError, match="LSTM is not supported"):
        LLM(str(tmp_path))


def test_a_small_step_still_embeds_whole_texts(bert: tuple[Path, Any]) -> None:
    """`max_num_batched_tokens` bounds the text, and no text is cut in chunks."""
    llm = LLM(str(bert[0]), max_num_batched_tokens=20, max_num_seqs=3)
    assert llm.memory_plan.max_model_len == 20
    wide = LLM(str(bert[0]))
    prompts = [[5 + (i * j) % 30 for i in range(j)] for j in (20, 1, 7, 19, 13, 20)]
    for a, b in zip(llm.embed(prompts), wide.embed(prompts), strict=True):
        np.testing.assert_allclose(a.outputs.embedding, b.outputs.embedding, atol=1e-5)
