"""Rows found by name, and by the texts of a chat template."""

import json
import re

import pytest
import tokenizers

from quire.engine.checkpoint import bundled_folder
from quire.engine.tokenizer import Tokenizer
from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.server.tools.detect import find_format
from quire.server.tools.format_types import Framed, Thinking, ToolFormat
from quire.server.tools.formats import PLAIN_JSON, TOOL_FORMATS
from quire.server.tools.thinking_formats import THINKINGS

TEMPLATES = {
    "hermes": '<tool_call>\\n{"name": <function-name>}</tool_call>',
    "qwen3": "<think>\\n\\n</think> <tool_call></tool_call>",
    "qwen3_coder": "<tool_call>\\n<function=example>\\n<parameter=p>",
    "llama3_json": 'Respond in the format {"name": function name, "parameters": dictionary of argument name and value}',
    "pythonic": "[func_name1(params_name1=params_value1)]",
    "llama4_pythonic": "<|python_start|>",
    "mistral_v3": "[AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]",
    "mistral_v11": "[TOOL_CALLS]name[CALL_ID]id[ARGS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '```json'",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'",
    "deepseek_v32": "<｜DSML｜function_calls>",
    "deepseek_v4": "<｜DSML｜tool_calls>",
    "granite": "<|tool_call|>",
    "phi4_mini_json": "<|tool|>' + tools + '<|/tool|>",
    "openai": "<|start|>assistant<|channel|>final<|message|>",
    "glm45": "<tool_call>{name}<arg_key>{k}</arg_key><think>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_argument_begin|>",
    "minimax_m2": "<minimax:tool_call>",
    "minimax_m3": "{%- set ns_token = ']<]minimax[>[' -%}<tool_call><mm:think></mm:think>",
    "gemma4": "<|tool_call>call:' + name + '{' <tool_call|> <|channel>thought\\n<channel|>",
    "functiongemma": "<start_function_call>call:",
    "command_r": "<|START_THINKING|><|START_ACTION|>",
    "olmo3": "<function_calls>",
    "dots": "<dots_function_call>",
    "deepseek_v41": "<｜DSML｜ calls><｜DSML｜ invoke",
    "step3": '<｜tool_sep｜><steptml:invoke name="',
    "hy_v3": "<tool_calls><tool_call>' + name + '<tool_sep><arg_key>",
    "hy_v4": "<tool_calls><tool_call>' + name + '<arg_key>",
    "jamba": "<tool_calls>[",
    "lfm2": "List of tools: <|tool_list_start|>[",
    "longcat": "<longcat_tool_call>",
    "internlm": "<|action_start|><|plugin|>",
    "gigachat3": "<|function_call|>{",
    "seed_oss": "<seed:tool_call><seed:think></seed:think><function=f><parameter=p>",
    "k2_horizon": "<ifm|think_fast><ifm|tool_call>' + name + '<ifm|arg_key>",
    "plamo3": "<|plamo:begin_tool_requests:plamo|><|plamo:begin_tool_request:plamo|>",
    "apertus": "<|inner_prefix|><|tools_prefix|>[",
    "minicpm5": '<think><function name="\' + name + \'"><param name="',
    "muse_glimmer": '<|start|>assistant to=self<|message|><atem:function_calls><atem:invoke name="',
    "inkling": "<|message_model|><|content_thinking|><|content_invoke_tool_json|>",
    "kimi_k3": '<|open|>message role="assistant"<|sep|>',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_row(name: str) -> None:
    row = find_format(TEMPLATES[name], None).tools
    assert row is not None
    assert name in row.names


@pytest.mark.parametrize("row", [row for row in TOOL_FORMATS if row is not PLAIN_JSON], ids=lambda row: row.names[0])
def test_no_row_hides_another(row: ToolFormat | Framed) -> None:
    """A template that holds a row's texts, and those of its reasoning, belongs to that row."""
    assert row.in_template
    for group in row.in_template:
        assert find_format(" ".join(group), None).tools is row
    for thinking in (each for each in THINKINGS if set(each.names) & set(row.names)):
        found = find_format(" ".join([*row.in_template[0], thinking.open, thinking.close]), None)
        assert (found.tools, found.thinking) == (row, thinking)


def test_reasoning_is_found_too() -> None:
    found = {name: find_format(template, None).thinking for name, template in TEMPLATES.items()}
    names = {name: row.names[0] for name, row in found.items() if row is not None}
    assert names == {
        "qwen3": "deepseek_r1",
        "openai": "openai",
        "glm45": "deepseek_r1",
        "minimax_m3": "minimax_m3",
        "gemma4": "gemma4",
        "command_r": "cohere_command3",
        "seed_oss": "seed_oss",
        "k2_horizon": "k2_horizon",
        "apertus": "apertus",
        "minicpm5": "deepseek_r1",
        "muse_glimmer": "muse_glimmer",
        "inkling": "inkling",
        "kimi_k3": "kimi_k3",
    }


def test_unknown_templates_get_plain_json() -> None:
    form = find_format("{{ messages }}", None)
    assert (form.tools, form.thinking) == (PLAIN_JSON, None)


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.names[0])
def test_every_name_finds_its_row(row: object) -> None:
    for name in row.names:  # type: ignore[attr-defined]
        assert find_format("<tool_call>", None, name).tools is row
    for thinking in THINKINGS:
        assert all(find_format("", None, "none", name).thinking is thinking for name in thinking.names)


@pytest.mark.parametrize(("name", "suffix"), [("hy_v3", ":opensource"), ("hy_v4", ":6124c78e")])
def test_a_checkpoint_may_add_a_suffix_to_every_tag(name: str, suffix: str) -> None:
    """The tags are found in the template, or among the tokens where the template puts them together."""
    template = TEMPLATES[name] + "<think></think>"
    for shown, tokenizer in (
        (re.sub("<(/?[a-z_]+)>", rf"<\1{suffix}>", template), None),
        ("", suffixed(template, suffix)),
    ):
        form = find_format(shown, tokenizer)
        assert isinstance(form.tools, ToolFormat)
        assert isinstance(form.thinking, Thinking)
        assert name in form.tools.names
        assert form.tools.section[0].strip() == f"<tool_calls{suffix}>"
        assert form.thinking.closes == (f"</think{suffix}>",)


def suffixed(template: str, suffix: str) -> Tokenizer:
    """A tokenizer with the tags of a template as tokens."""
    backend = tokenizers.Tokenizer.from_file(str(bundled_folder() / "tokenizer.json"))
    backend.add_special_tokens([f"<{tag}{suffix}>" for tag in re.findall("<(/?[a-z_]+)>", template)])
    return Tokenizer(backend, {})


def test_hf_prefers_the_response_template_of_the_tokenizer() -> None:
    marks = {"open": "<ponder>", "close": "</ponder>"}
    calls = {"open": "<invoke>", "close": "</invoke>", "content": "json"}
    response_template = json.dumps({"fields": {"thinking": marks, "tool_calls": calls}})
    found = [find_format("<tool_call><think>", None, name, name, response_template) for name in ("auto", "hf")]
    assert [(form.tools.names[0], form.thinking.names[0]) for form in found if form.tools and form.thinking] == [
        ("hermes", "deepseek_r1"),
        ("hf", "hf"),
    ]


def test_names_are_checked_at_start() -> None:
    ServerSettings(tool_call_parser="hermes", reasoning_parser="qwen3", enable_auto_tool_choice=True)
    for options in ({"tool_call_parser": "herms"}, {"reasoning_parser": "hermes"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*one of"):
            ServerSettings(**options)  # type: ignore[arg-type]
