"""The table of formats: how each model family writes tool calls. A format is data.

A further family is one row; `format_types` says what the fields mean. Reasoning is in `thinking_formats`.
"""

from dataclasses import replace

from quire.server.tools.format_types import (
    BracedBody,
    Framed,
    HeaderBody,
    JsonBody,
    PythonBody,
    TagBody,
    ToolFormat,
)
from quire.server.tools.framed_formats import FRAMED_FORMATS

_DSML = "｜DSML｜"
_MINIMAX = "]<]minimax[>["

PLAIN_JSON = ToolFormat(
    names=("json", "xlam"),
    body=JsonBody(listed=True),
    bare=True,
)
"""For models whose template shows no format: a reply that is nothing but a list of calls."""

_DEEPSEEK_V32 = ToolFormat(
    names=("deepseek_v32",),
    section=(f"<{_DSML}function_calls>\n", f"\n</{_DSML}function_calls>"),
    also_opens=(f"<{_DSML}invoke",),
    body=TagBody(
        name_open=f'<{_DSML}invoke name="',
        name_close='">\n',
        key_open=f'<{_DSML}parameter name="',
        key_close='" string="{is_text}">',
        value_close=f"</{_DSML}parameter>\n",
        end=f"</{_DSML}invoke>",
    ),
    between="\n",
    in_template=((_DSML,),),
)

_INVOKE = TagBody(
    name_open='<invoke name="',
    name_close='">\n',
    key_open='<parameter name="',
    key_close='">',
    value_close="</parameter>\n",
    end="</invoke>",
)
_ARG_KEYS = TagBody(
    name_open="",
    name_close="\n",
    key_open="<arg_key>",
    key_close="</arg_key>\n<arg_value>",
    value_close="</arg_value>\n",
    end="",
)

TOOL_FORMATS: tuple[ToolFormat | Framed, ...] = (
    *FRAMED_FORMATS,
    ToolFormat(
        names=("deepseek_v41",),
        section=(f"<{_DSML} calls>\n", f"\n</{_DSML} calls>"),
        also_opens=(f"<{_DSML} invoke",),
        body=TagBody(
            name_open=f'<{_DSML} invoke name="',
            name_close='">\n',
            key_open=f'<{_DSML} parameter name="',
            key_close='" string="{is_text}">',
            value_close=f"</{_DSML} parameter>\n",
            end=f"</{_DSML} invoke>",
        ),
        between="\n",
        in_template=((f"{_DSML} calls",),),
    ),
    replace(
        _DEEPSEEK_V32,
        names=("deepseek_v4",),
        section=(f"<{_DSML}tool_calls>\n", f"\n</{_DSML}tool_calls>"),
        in_template=((f"{_DSML}tool_calls",),),
    ),
    _DEEPSEEK_V32,
    ToolFormat(
        names=("deepseek_v3", "deepseek_r1"),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call=("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```<｜tool▁call▁end｜>"),
        body=HeaderBody(middle="\n```json\n"),
        between="\n",
        in_template=(("<｜tool▁sep｜>", "```json"),),
    ),
    ToolFormat(
        names=("deepseek_v31",),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        body=HeaderBody(middle="<｜tool▁sep｜>"),
        in_template=(("<｜tool▁sep｜>",),),
    ),
    ToolFormat(
        names=("kimi_k2",),
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        call=("<|tool_call_begin|>", "<|tool_call_end|>"),
        body=HeaderBody(middle="<|tool_call_argument_begin|>", header="functions.{name}:{index}"),
        id_style="header",
        in_template=(("<|tool_call_argument_begin|>",), ("<|tool_calls_section_begin|>",)),
    ),
    ToolFormat(
        names=("k2_horizon",),
        section=("<ifm|tool_calls>\n", "\n</ifm|tool_calls>"),
        call=("<ifm|tool_call>", "</ifm|tool_call>"),
        body=TagBody(
            name_open="",
            name_close="\n",
            key_open="<ifm|arg_key>",
            key_close="</ifm|arg_key>\n<ifm|arg_value>",
            value_close="</ifm|arg_value>\n",
            end="",
            type_tag=("<ifm|arg_type>", "</ifm|arg_type>"),
        ),
        between="\n",
        in_template=(("<ifm|tool_call>",),),
    ),
    ToolFormat(
        names=("plamo3",),
        section=("<|plamo:begin_tool_requests:plamo|>", "<|plamo:end_tool_requests:plamo|>"),
        call=(
            "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>",
            "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>",
        ),
        body=HeaderBody(
            middle="<|plamo:end_tool_name:plamo|><|plamo:begin_tool_arguments:plamo|>"
            "<|plamo:constrain|>json<|plamo:msg|>",
        ),
        in_template=(("<|plamo:begin_tool_request:plamo|>",), ("<|plamo:begin_tool_requests:plamo|>",)),
    ),
    ToolFormat(
        names=("apertus",),
        section=("<|tools_prefix|>", "<|tools_suffix|>"),
        body=JsonBody(listed=True, keyed=True),
        in_template=(("<|tools_prefix|>",),),
    ),
    ToolFormat(
        names=("minicpm5",),
        call=('<function name="', "</function>"),
        body=TagBody(
            name_open="",
            name_close='">',
            key_open='<param name="',
            key_close='">',
            value_close="</param>",
            end="",
            quote=("<![CDATA[", "]]>"),
        ),
        in_template=(('<function name="', '<param name="'),),
    ),
    ToolFormat(
        names=("minimax_m3",),
        section=(f"{_MINIMAX}<tool_call>\n", f"\n{_MINIMAX}</tool_call>"),
        body=TagBody(
            prefix=_MINIMAX,
            name_open=f'{_MINIMAX}<invoke name="',
            name_close='">',
            key_open=f"{_MINIMAX}<",
            key_close=">",
            value_close=f"{_MINIMAX}</{{key}}>",
            end=f"{_MINIMAX}</invoke>",
        ),
        between="\n",
        also_opens=(f'{_MINIMAX}<invoke name="',),
        in_template=((_MINIMAX,),),
    ),
    ToolFormat(
        names=("minimax_m2", "minimax"),
        section=("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        body=_INVOKE,
        between="\n",
        also_opens=('<invoke name="',),
        in_template=(("<minimax:tool_call>",),),
    ),
    ToolFormat(
        names=("gemma4",),
        call=("<|tool_call>", "<tool_call|>"),
        body=BracedBody(head="call:", quote='<|"|>'),
        in_template=(("<|tool_call>",),),
    ),
    ToolFormat(
        names=("functiongemma",),
        call=("<start_function_call>", "<end_function_call>"),
        body=BracedBody(head="call:", quote="<escape>"),
        in_template=(("<start_function_call>",),),
    ),
    ToolFormat(
        names=("dots",),
        section=("<dots_function_call>\n", "\n</dots_function_call>"),
        body=_INVOKE,
        between="\n",
        in_template=(("<dots_function_call>",),),
    ),
    ToolFormat(
        names=("step3",),
        section=("<｜tool_calls_begin｜>\n", "\n<｜tool_calls_end｜>"),
        call=("<｜tool_call_begin｜>function<｜tool_sep｜>", "<｜tool_call_end｜>"),
        body=TagBody(
            name_open='<steptml:invoke name="',
            name_close='">',
            key_open='<steptml:parameter name="',
            key_close='">',
            value_close="</steptml:parameter>",
            end="</steptml:invoke>",
        ),
        between="\n",
        in_template=(("<steptml:invoke",),),
    ),
    ToolFormat(
        names=("hy_v3",),
        section=("<tool_calls>\n", "\n</tool_calls>"),
        call=("<tool_call>", "</tool_call>"),
        body=replace(_ARG_KEYS, name_close="<tool_sep>\n"),
        between="\n",
        in_template=(("<tool_sep>",),),
    ),
    ToolFormat(
        names=("hy_v4",),
        section=("<tool_calls>\n", "\n</tool_calls>"),
        call=("<tool_call>", "</tool_call>"),
        body=_ARG_KEYS,
        between="\n",
        in_template=(("<tool_calls>", "<arg_key>"),),
    ),
    ToolFormat(
        names=("jamba", "hunyuan_a13b"),
        section=("<tool_calls>", "</tool_calls>"),
        body=JsonBody(listed=True),
        in_template=(("<tool_calls>",),),
    ),
    ToolFormat(
        names=("glm45", "glm47", "glm4_moe", "ling3", "poolside_v1"),
        call=("<tool_call>", "</tool_call>"),
        body=_ARG_KEYS,
        between="\n",
        in_template=(("<arg_key>",),),
    ),
    ToolFormat(
        names=("seed_oss",),
        call=("<seed:tool_call>\n", "\n</seed:tool_call>"),
        body=TagBody(
            name_open="<function=",
            name_close=">\n",
            key_open="<parameter=",
            key_close=">",
            value_close="</parameter>\n",
            end="</function>",
        ),
        between="\n",
        also_opens=("<function=",),
        in_template=(("<seed:tool_call>",),),
    ),
    ToolFormat(
        names=("qwen3_coder", "qwen3_xml", "step3p5", "mimo"),
        call=("<tool_call>\n", "\n</tool_call>"),
        body=TagBody(
            name_open="<function=",
            name_close=">\n",
            key_open="<parameter=",
            key_close=">\n",
            value_close="\n</parameter>\n",
            end="</function>",
        ),
        between="\n",
        also_opens=("<function=",),
        in_template=(("<function=", "<parameter="),),
    ),
    ToolFormat(
        names=("cohere_command3", "cohere_command4", "command_r", "cohere"),
        section=("<|START_ACTION|>", "<|END_ACTION|>"),
        body=JsonBody(name_key="tool_name", arguments_key="parameters", id_key="tool_call_id", listed=True),
        in_template=(("<|START_ACTION|>",),),
    ),
    ToolFormat(
        names=("granite", "granite-20b-fc"),
        section=("<|tool_call|>", ""),
        also_opens=("<tool_call>",),
        body=JsonBody(listed=True),
        in_template=(("<|tool_call|>",),),
    ),
    ToolFormat(
        names=("mistral_v11", "mistral_v13", "devstral", "magistral"),
        call=("[TOOL_CALLS]", ""),
        body=HeaderBody(middle="[ARGS]", id_mark="[CALL_ID]"),
        id_style="nine",
        in_template=(("[TOOL_CALLS]", "[ARGS]"),),
    ),
    ToolFormat(
        names=("mistral", "mistral_v3", "mistral_v7"),
        section=("[TOOL_CALLS]", ""),
        body=JsonBody(listed=True),
        id_style="nine",
        in_template=(("[TOOL_CALLS]",),),
    ),
    ToolFormat(
        names=("phi4_mini_json", "phi4"),
        section=("functools", ""),
        body=JsonBody(listed=True),
        in_template=(("functools",), ("<|tool|>", "<|/tool|>")),
    ),
    ToolFormat(
        names=("llama4_pythonic",),
        section=("<|python_start|>", "<|python_end|>"),
        body=PythonBody(),
        bare=True,
        in_template=(("<|python_start|>",),),
    ),
    ToolFormat(
        names=("lfm2",),
        section=("<|tool_call_start|>", "<|tool_call_end|>"),
        body=PythonBody(),
        in_template=(("<|tool_call_start|>",), ("<|tool_list_start|>",)),
    ),
    ToolFormat(
        names=("longcat",),
        call=("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
        body=JsonBody(),
        between="\n",
        in_template=(("<longcat_tool_call>",),),
    ),
    ToolFormat(
        names=("internlm",),
        call=("<|action_start|><|plugin|>\n", "\n<|action_end|>"),
        body=JsonBody(arguments_key="parameters"),
        between="\n",
        in_template=(("<|plugin|>",),),
    ),
    ToolFormat(
        names=("gigachat3",),
        call=("<|function_call|>", ""),
        also_opens=("function call<|role_sep|>\n",),
        body=JsonBody(),
        in_template=(("<|function_call|>",), ("function call<|role_sep|>",)),
    ),
    ToolFormat(
        names=("olmo3",),
        section=("<function_calls>\n", "\n</function_calls>"),
        body=PythonBody(bracketed=False),
        between="\n",
        in_template=(("<function_calls>",),),
    ),
    ToolFormat(
        names=("pythonic", "llama_pythonic"),
        body=PythonBody(),
        bare=True,
        in_template=(("[func_name1(",), ("func_name(params_name",)),
    ),
    ToolFormat(
        names=("hermes", "qwen", "qwen2_5", "qwen3", "qwen3_json", "granite4", "ernie45"),
        call=("<tool_call>\n", "\n</tool_call>"),
        body=JsonBody(),
        between="\n",
        in_template=(("<tool_call>",),),
    ),
    ToolFormat(
        names=("llama3_json", "llama4_json", "llama3"),
        body=JsonBody(arguments_key="parameters"),
        between="; ",
        separators=";,",
        also_opens=("<|python_tag|>",),
        bare=True,
        in_template=(("<|python_tag|>",), ('"parameters": dictionary of argument name',)),
    ),
    PLAIN_JSON,
)
"""Rows for more special templates come first: the first that a template matches is taken."""
