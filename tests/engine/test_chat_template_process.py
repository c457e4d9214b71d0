"""Chat templates in expendable processes: what a hostile template does hurts nobody but the request that asked."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from quire.engine.chat_template import ChatTemplate
from quire.engine.chat_template_process import ChatTemplateProcess
from quire.engine.checkpoint import bundled_folder
from quire.errors import RequestError

MESSAGES = [{"role": "user", "content": "Speak!"}, {"role": "assistant", "content": [{"type": "text", "text": "I"}]}]
HOSTILE = {
    "time: macros that call macros": (
        "{% macro a() %}{{ 1 }}{{ 1 }}{% endmacro %}"
        + "".join(
            f"{{% macro {chr(98 + i)}() %}}{{% set x = {chr(97 + i)}() ~ '' %}}{{% set y = {chr(97 + i)}() %}}"
            "{% endmacro %}"
            for i in range(24)
        )
        + "{{ y() }}"
    ),
    "memory: a filter": "{{ (messages | tojson) * 100 | replace('e', 'e' * 3000000) }}",
    "memory: a slice of columns": "{% for x in messages | slice(10**9) %}{% endfor %}",
    "memory: text that doubles inside a value": (
        "{% set x = namespace(t='x' * 1000000) %}{% set y = (x.t ~ x.t) | replace('x', 'x' * 4000) %}"
    ),
}


def run(test: Callable[[ChatTemplateProcess], Awaitable[None]], folder: Path) -> None:
    async def main() -> None:
        template = ChatTemplateProcess(folder)
        try:
            await test(template)
        finally:
            await template.close()

    asyncio.run(main())


def test_renders_as_in_this_process_and_refuses_with_the_same_words() -> None:
    local = ChatTemplate.from_folder(bundled_folder())

    async def test(template: ChatTemplateProcess) -> None:
        for options in ({}, {"add_generation_prompt": False}, {"tools": [{"type": "function"}]}):
            assert await template.render(MESSAGES, **options) == local.render(MESSAGES, **options)
        for bad in ([], [{"content": "x"}], [{"role": "user"}]):
            with pytest.raises(RequestError) as here:
                local.render(bad)
            with pytest.raises(RequestError) as there:
                await template.render(bad)
            assert (there.value.message, there.value.param) == (here.value.message, here.value.param)

    run(test, bundled_folder())


def test_hostile_templates_cost_a_process_and_no_more(tmp_path: Path) -> None:
    """Each case is a template of its own in a folder that also serves a good one, as `tool_use`."""
    good = "{{ messages[0].content }}"

    async def test(template: ChatTemplateProcess) -> None:
        assert await template.render(MESSAGES, tools=[{}]) == "Speak!"
        hostile = asyncio.create_task(template.render(MESSAGES))
        for _ in range(5):
            assert await template.render(MESSAGES, tools=[{}]) == "Speak!", "the other process answers meanwhile"
        with pytest.raises(RequestError, match=r"chat template (takes too much|refuses the messages)"):
            await hostile
        assert await template.render(MESSAGES, tools=[{}]) == "Speak!"

    for text in HOSTILE.values():
        config: Any = {"chat_template": [{"name": "default", "template": text}, {"name": "tool_use", "template": good}]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        run(test, tmp_path)


@pytest.mark.parametrize("text", ["{% for %}", "{{ '%1000000000d' % 1 }}", "{% if " + "(" * 5000])
def test_templates_that_cannot_be_compiled_refuse_each_chat(text: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(text)

    async def test(template: ChatTemplateProcess) -> None:
        for _ in range(2):
            with pytest.raises(RequestError, match="chat template"):
                await template.render(MESSAGES)

    run(test, tmp_path)
