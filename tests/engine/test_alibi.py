"""ALiBi in the engine: biases follow positions, wherever keys lie and however many sequences share them."""

import random
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from tests.checkpoints import make_checkpoint, reference_model
from tests.engine.test_parity import assert_greedy

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_long_prefix_that_many_share(backend: str, tmp_path: Path) -> None:
    """Keys of a prefix are read once for all sequences, in pieces; each sequence has positions of its own."""
    folder = make_checkpoint(tmp_path, "bloom", seq_length=1024, n_head=6, hidden_size=72)
    llm = LLM(str(folder), dtype="float32", attention_backend=backend, num_blocks=400, threads=2, block_size=16)
    rng = random.Random(3)
    prefix = [rng.randrange(256) for _ in range(800)]
    prompts = [[*prefix, *(rng.randrange(256) for _ in range(rng.randint(1, 60)))] for _ in range(9)]
    llm.generate(prompts[:1], GREEDY)
    outputs = llm.generate(prompts, GREEDY)
    assert all(output.num_cached_tokens >= 800 for output in outputs)
    assert_greedy(reference_model(folder), outputs, 40)
