"""Adapters on bases of few bits, and beside drafts: peft on the floats that the bits stand for is the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire import LLM, LoRARequest, SamplingParams
from quire.convert.run import convert_model
from quire.convert.target import Target
from quire.scheduler.step_times import StepCurve, StepTimes
from tests.checkpoints import make_checkpoint
from tests.lora.peft_adapters import expected_logprobs, make_adapter
from tests.models.stored.packers import CASES, pack_checkpoint

VOCAB_SIZE = 260
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_logprobs": VOCAB_SIZE,
    "threads": 1,
    "num_blocks": 200,
    "max_num_seqs": 8,
    "max_model_len": 160,
}
REPORTED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=VOCAB_SIZE)
Base = tuple[Path, Path, dict[str, Any]]
"""What is served, the folder of floats that peft reads, and options."""


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("bases") / "llama", "llama", num_hidden_layers=2, intermediate_size=128
    )


def quantised(name: str) -> Callable[[Path, Path], Base]:
    return lambda floats, work: (floats, floats, {"quantization": name})


def packed(name: str) -> Callable[[Path, Path], Base]:
    return lambda floats, work: (convert_model(floats, Target.parse(name), work / name).path, floats, {})


def gguf(block: str) -> Callable[[Path, Path], Base]:
    def make(floats: Path, work: Path) -> Base:
        file = convert_model(floats, Target.parse(f"gguf:{block}"), work / "m.gguf").path
        return file, convert_model(file, Target.parse("fp32"), work / "fp32").path, {}

    return make


def stored(case: str) -> Callable[[Path, Path], Base]:
    return lambda floats, work: (pack_checkpoint(floats, work, CASES[case]), work / "floats", {})


BASES = {
    "int8": (quantised("int8"), 0.05),
    "int4": (quantised("int4"), 0.3),
    "int4 folder": (packed("int4"), 0.3),
    "Q8_0": (gguf("Q8_0"), 1e-3),
    "Q4_0": (gguf("Q4_0"), 0.05),
    "GPTQ": (stored("gptq 4"), 5e-5),
    "GPTQ, shuffled": (stored("gptq 4 v2, shuffled"), 5e-5),
    "AWQ": (stored("awq gemm"), 5e-5),
    "FP8": (stored("FP8 channel"), 5e-5),
    "nf4": (stored("bnb nf4"), 5e-5),
}
"""Name → how it is made, and by how much log-probabilities may differ on average: inputs are rounded, for int8 and int4
weights too."""


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_on_few_bits(name: str, floats: Path, tmp_path: Path) -> None:
    """Rows with an adapter are as near to peft's as rows without one are to the base."""
    make, allowed = BASES[name]
    served, oracle, options = make(floats, tmp_path)
    adapter = make_adapter(tmp_path / "adapter", oracle, seed=3)
    ids = [7 * number % 251 for number in range(40)]
    used = [LoRARequest("a", 1, str(adapter)), None]
    with LLM(str(served), enable_lora=True, **OPTIONS, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids}] * 2, REPORTED, lora_request=used, use_tqdm=False)
    adapted, plain = (expected_logprobs(oracle, path, ids)[:-1] for path in (adapter, None))
    found = [logprobs_of(output) for output in outputs]
    rounding = (found[1] - plain).abs().mean()
    assert rounding <= allowed
    assert (found[0] - adapted).abs().mean() <= 2 * rounding
    assert (found[0] - adapted).abs().mean() < 0.5 * (adapted - plain).abs().mean()


def logprobs_of(output: Any) -> Tensor:
    return torch.tensor([[at[token].logprob for token in range(VOCAB_SIZE)] for at in output.prompt_logprobs[1:]])


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_drafts_keep_the_tokens_of_adapters(
    quantization: str | None, floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps verify several tokens of rows with different adapters; every bit is that of single tokens."""
    monkeypatch.setattr(StepTimes, "curve", lambda *_: StepCurve([(1, 1.0)]))  # every draft is computed
    paths = [make_adapter(tmp_path / str(seed), floats, seed=seed) for seed in range(2)]
    used = [
        LoRARequest("a", 1, str(paths[0])),
        None,
        LoRARequest("b", 2, str(paths[1])),
        LoRARequest("a", 1, str(paths[0])),
    ]
    prompts = [{"prompt_token_ids": [5 + number, 9, 14, 3] * 8} for number in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=1)
    found = []
    for speculative in (None, {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1}):
        options = OPTIONS | {"deterministic": True, "speculative_config": speculative, "quantization": quantization}
        with LLM(str(floats), enable_lora=True, max_loras=2, **options) as llm:
            outputs = llm.generate(prompts, params, lora_request=used, use_tqdm=False)
            found.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
            accepted = llm.stats().total_accepted_tokens
    assert found[0] == found[1]
    assert accepted > 20
    assert found[0][0] != found[0][2]
