"""TokenCounts against a Counter."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from quire.sampling.token_counts import TokenCounts

VOCAB_SIZE = 20


@given(st.lists(st.integers(0, VOCAB_SIZE + 2)), st.lists(st.integers(0, VOCAB_SIZE + 2)))
def test_counts_distinct_prompt_tokens_and_generated_ones(prompt: list[int], output: list[int]) -> None:
    counts = TokenCounts(prompt, VOCAB_SIZE)
    for token_id in output:
        counts.append(token_id)
    expected = Counter({id: 0 for id in prompt if id < VOCAB_SIZE})
    expected.update(id for id in output if id < VOCAB_SIZE)
    assert dict(zip(counts.ids, counts.num_generated, strict=True)) == dict(expected)
