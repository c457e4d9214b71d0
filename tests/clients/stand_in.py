"""StandIn: a scripted engine whose answer fits the question, so that a client's whole program runs without a model.

It calls the tool that the prompt offers, answers from the tool's result, fills a schema of a person, and else recites.
An answer that the request's grammar refuses is an error: what the server forces must be what the client reads.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from quire.grammar.compiler import GrammarCompiler
from quire.sampling_params import SamplingParams
from quire.structured_outputs import StructuredOutputsParams
from tests.server.scripted_engine import ANSWER, BUNDLED, ScriptedEngine, bundled_tokenizer

MODEL = "scripted"
QUESTION = "What is the weather in Paris?"
RESULT = "21 degrees"
"""What the tools of all programs return."""
REPORT = "It is 21 degrees in Paris."
PERSON = {"name": "Ada", "age": 36}
_CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("final_answer", {"answer": REPORT}),
    ("get_weather", {"city": "Paris"}),
    ("final_result", PERSON),
    ("Person", PERSON),
    ("PartialPerson", PERSON),
)
"""Tools that programs offer, and the arguments to call them with."""


@cache
def _compiler() -> GrammarCompiler:
    source = (BUNDLED / "tokenizer.json").read_text()
    eos = [bundled_tokenizer().eos_token_id or 0]
    return GrammarCompiler(source, vocab_size=bundled_tokenizer().vocab_size, eos_token_ids=eos)


@dataclass
class StandIn(ScriptedEngine):
    """Long prompts are let in, as agents send them."""

    max_model_len: int = 200_000

    def answer_to(self, prompt: list[int], params: SamplingParams) -> str:
        text = bundled_tokenizer().decode(prompt, skip_special_tokens=False)
        answers = [*possible_answers(text), "hello"]
        constraint = params.structured_outputs
        if constraint is None:
            return answers[0]
        for answer in answers:
            if accepts(constraint, answer):
                return answer
        raise AssertionError(f"the grammar of {constraint} takes none of {answers}")


def possible_answers(prompt: str) -> list[str]:
    """What could be said to `prompt`, likeliest first."""
    answered = RESULT in prompt
    calls = [_call(name, arguments) for name, arguments in _CALLS if re.search(rf'"name": ?"{name}"', prompt)]
    if answered:  # by then only a tool that ends the conversation is called again
        calls = [call for call in calls if "get_weather" not in call]
    else:
        calls = [call for call in calls if "final_answer" not in call or len(calls) == 1]
    if "[[ ## name ## ]]" in prompt:  # DSPy asks for each field under a heading of its own
        calls = [*(f"[[ ## {name} ## ]]\n{value}\n\n" for name, value in PERSON.items()), "[[ ## completed ## ]]"]
        return ["".join(calls)]
    return [*calls, *([REPORT] if answered else []), ANSWER, json.dumps(PERSON)]


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def accepts(constraint: StructuredOutputsParams, answer: str) -> bool:
    """Whether the compiled constraint accepts the whole answer."""
    matcher = _compiler().compile(constraint).matcher()
    tokens = bundled_tokenizer().encode(answer, add_special_tokens=False)
    return bool(matcher.validate_tokens(tokens) == len(tokens))
