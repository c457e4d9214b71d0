"""Names that code written for vLLM imports: the types of prompts, and what stands in the place of others."""

import pytest

import quire
from quire.inputs import TextPrompt, TokensPrompt


def test_prompts_are_plain_dicts() -> None:
    assert quire.TokensPrompt is TokensPrompt
    assert TokensPrompt(prompt_token_ids=[5, 6]) == {"prompt_token_ids": [5, 6]}
    assert TextPrompt(prompt="ROMEO:") == {"prompt": "ROMEO:"}


@pytest.mark.parametrize(
    ("name", "instead"),
    [("PoolingParams", "LLM.embed"), ("AsyncLLMEngine", "use AsyncLLM"), ("EngineArgs", "keywords")],
)
def test_an_import_that_fails_says_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=instead):
        exec(f"from quire import {name}")
