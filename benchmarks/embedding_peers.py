"""A peer of `benchmarks.embeddings` in its own interpreter, which needs neither Quire nor its dependencies.

Reads lines of JSON, [texts as token ids, how often they are embedded], and answers each with [seconds, CPU seconds, the
first vector].
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TokenIds = list[list[int]]
BATCH = 32
"""Texts of a batch, the default of sentence-transformers."""


def main() -> None:
    peer, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints is no answer
    embed = PEERS[peer](model, threads)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        texts, repeats = json.loads(line)
        started, cpu = time.perf_counter(), time.process_time()
        batch = len(texts) if peer == "vllm" else BATCH  # vLLM makes its own batches
        for _ in range(repeats):
            vectors = [embed(texts[first : first + batch]) for first in range(0, len(texts), batch)]
        seconds = time.perf_counter() - started, time.process_time() - cpu
        print(json.dumps([*seconds, vectors[0][0].tolist()]), file=answers, flush=True)


def transformers(model: Path, threads: int) -> Callable[[TokenIds], Any]:
    """Mean pooling of the last hidden states."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(threads)
    network = AutoModel.from_pretrained(model).eval()

    @torch.inference_mode()
    def embed(texts: TokenIds) -> Any:
        ids = torch.tensor(texts)
        vectors = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
        return torch.nn.functional.normalize(vectors)

    return embed


def sentence_transformers(model: Path, threads: int) -> Callable[[TokenIds], Any]:
    """All modules of the folder."""
    import torch
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    modules = SentenceTransformer(str(model), device="cpu")

    @torch.inference_mode()
    def embed(texts: TokenIds) -> Any:
        ids = torch.tensor(texts)
        return modules({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]

    return embed


def onnxruntime(model: Path, threads: int) -> Callable[[TokenIds], Any]:
    """The export that fastembed runs as well, with mean pooling; `export_onnx` writes it where there is none."""
    import numpy as np
    from onnxruntime import InferenceSession, SessionOptions  # type: ignore[import-not-found]

    if not (path := model / "onnx" / "model.onnx").is_file():
        export_onnx(model, path)
    options = SessionOptions()
    options.intra_op_num_threads = threads
    session = InferenceSession(str(path), options)
    names = {entry.name for entry in session.get_inputs()}

    def embed(texts: TokenIds) -> Any:
        ids = np.array(texts, dtype=np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        vectors = session.run(None, {name: array for name, array in given.items() if name in names})[0].mean(1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed


def fastembed(model: Path, threads: int) -> Callable[[TokenIds], Any]:
    """TextEmbedding over the same graph. Its tokenizer is left out, since every peer is given ids."""
    import numpy as np
    from fastembed import TextEmbedding  # type: ignore[import-not-found]
    from fastembed.common.model_description import ModelSource, PoolingType  # type: ignore[import-not-found]

    if not (model / "onnx" / "model.onnx").is_file():
        export_onnx(model, model / "onnx" / "model.onnx")
    TextEmbedding.add_custom_model(
        model="local",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local"),
        dim=json.loads((model / "config.json").read_text())["hidden_size"],
        model_file="onnx/model.onnx",
    )
    network = TextEmbedding("local", specific_model_path=str(model), threads=threads).model
    network.tokenize = lambda texts, **_: [_Encoded(ids) for ids in texts]  # the others are given ids as well

    def embed(texts: TokenIds) -> Any:
        return np.array(list(network.embed(texts, batch_size=BATCH)))

    return embed


class _Encoded:
    """What the tokenizer of fastembed makes of a text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.attention_mask = ids, [1] * len(ids)


def vllm(model: Path, threads: int) -> Callable[[TokenIds], Any]:
    """One process, so that its CPU seconds are all there are."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import numpy as np
    from vllm import LLM

    llm = LLM(model=str(model), runner="pooling", dtype="float32")

    def embed(texts: TokenIds) -> Any:
        outputs = llm.embed([{"prompt_token_ids": ids} for ids in texts], use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs])

    return embed


def export_onnx(model: Path, path: Path) -> None:
    """Write the graph of a model in float32, with any number of texts and tokens."""
    import torch
    from transformers import AutoModel

    path.parent.mkdir(exist_ok=True)
    network = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    class Hidden(torch.nn.Module):
        """The last hidden states, from arguments by place."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.network(input_ids=ids, attention_mask=mask).last_hidden_state

    ids = torch.ones(2, 9, dtype=torch.int64)
    axes = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        Hidden(),
        (ids, torch.ones_like(ids)),
        path,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes},
        dynamo=False,
    )


PEERS = {
    "transformers": transformers,
    "sentence-transformers": sentence_transformers,
    "onnxruntime": onnxruntime,
    "fastembed": fastembed,
    "vllm": vllm,
}

if __name__ == "__main__":
    main()
