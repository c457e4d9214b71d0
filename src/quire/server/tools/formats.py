"""The table of formats: how each model family writes tool calls and reasoning. A format is data.

Marks are written as the model's template writes them, white space included. A reader takes that white space as
optional; a grammar writes it. A mark that is a token of the vocabulary is matched by its id (see `marks`). A further
family is one row.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonBody:
    """One JSON object with name and arguments, or one list of such objects for all calls."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = ""
    listed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderBody:
    """The name, `middle`, then the arguments as JSON."""

    middle: str
    header: str = "{name}"
    """How the name is written: text, {name}, and {index} for the number of the call."""
    id_mark: str = ""
    """Stands before the call's id, if the model writes one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagBody:
    """The name, then each argument between tags of its own: texts as they are, other values as JSON."""

    name_open: str
    name_close: str
    key_open: str
    key_close: str
    """A key that ends with a quote may be followed by attributes, up to the end of the tag."""
    value_close: str
    """May hold {key}, the argument's name."""
    end: str
    prefix: str = ""
    """Stands before every tag, and nowhere else. Objects and lists are then tags within tags: the name of a member or
    of an item is the tag's."""

    @property
    def strips_newlines(self) -> bool:
        """A newline on each side of a value belongs to the tags."""
        return self.value_close.startswith("\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonBody:
    """Calls as Python writes them: `[f(a=1), g(b="x")]`, or one a line."""

    bracketed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BracedBody:
    """`head`, the name, and an object in braces: names of members as they are, texts between quotes of their own.

    A text knows no escapes. JSON is read too, and a grammar writes objects and lists within the arguments as JSON.
    """

    head: str
    quote: str


Body = JsonBody | HeaderBody | TagBody | PythonBody | BracedBody


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family writes tool calls."""

    names: tuple[str, ...]
    """Names for --tool-call-parser, vLLM's among them."""
    body: Body
    section: tuple[str, str] = ("", "")
    """Marks around all calls of a reply."""
    call: tuple[str, str] = ("", "")
    """Marks around each call."""
    between: str = ""
    """What a grammar writes between two calls."""
    separators: str = ""
    """Characters that may stand between two calls."""
    also_opens: tuple[str, ...] = ()
    """Marks that begin the calls where the model leaves out the first mark."""
    bare: bool = False
    """A reply may begin with a call without any mark. Its name must be that of a tool."""
    id_style: str = "call"
    """call: call_ and 24 hexadecimal digits; nine: 9 letters or digits, as Mistral's templates demand; header: what
    the model wrote as the header."""
    in_template: tuple[tuple[str, ...], ...] = ()
    """The row belongs to a chat template that holds all texts of one of these groups."""

    @property
    def openers(self) -> tuple[str, ...]:
        """Marks that begin a call or all calls."""
        return tuple(dict.fromkeys(mark for mark in (self.section[0], self.call[0], *self.also_opens) if mark))


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """gpt-oss (harmony): every part of a reply is a message with a channel, and a call is a message to a function."""

    names: tuple[str, ...]
    start: str = "<|start|>"
    channel: str = "<|channel|>"
    constrain: str = "<|constrain|>"
    message: str = "<|message|>"
    end: str = "<|end|>"
    final_end: str = "<|return|>"
    call_end: str = "<|call|>"
    in_template: tuple[tuple[str, ...], ...] = (("<|channel|>", "<|message|>"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How one family marks its reasoning."""

    names: tuple[str, ...]
    """Names for --reasoning-parser, vLLM's among them."""
    open: str
    close: str
    in_template: tuple[tuple[str, ...], ...] = ()


_DSML = "｜DSML｜"
_MINIMAX = "]<]minimax[>["

PLAIN_JSON = ToolFormat(
    names=("json",),
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

TOOL_FORMATS: tuple[ToolFormat | Channels, ...] = (
    Channels(names=("openai", "harmony", "gpt_oss")),
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
        body=TagBody(
            name_open='<invoke name="',
            name_close='">\n',
            key_open='<parameter name="',
            key_close='">',
            value_close="</parameter>\n",
            end="</invoke>",
        ),
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
        names=("glm45", "glm47", "glm4_moe"),
        call=("<tool_call>", "</tool_call>"),
        body=TagBody(
            name_open="",
            name_close="\n",
            key_open="<arg_key>",
            key_close="</arg_key>\n<arg_value>",
            value_close="</arg_value>\n",
            end="",
        ),
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
        names=("cohere_command3", "command_r", "cohere"),
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
        names=("hermes", "qwen", "qwen2_5", "qwen3", "granite4"),
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

THINKINGS: tuple[Thinking, ...] = (
    Thinking(names=("seed_oss",), open="<seed:think>", close="</seed:think>", in_template=(("</seed:think>",),)),
    Thinking(names=("minimax_m3",), open="<mm:think>", close="</mm:think>", in_template=(("</mm:think>",),)),
    Thinking(
        names=("gemma4",),
        open="<|channel>thought\n",
        close="<channel|>",
        in_template=(("<|channel>", "<channel|>"),),
    ),
    Thinking(names=("mistral", "magistral"), open="[THINK]", close="[/THINK]", in_template=(("[THINK]",),)),
    Thinking(
        names=("cohere_command3", "command_r", "cohere"),
        open="<|START_THINKING|>",
        close="<|END_THINKING|>",
        in_template=(("<|START_THINKING|>",),),
    ),
    Thinking(
        names=("granite",),
        open="Here is my thought process:",
        close="Here is my response:",
        in_template=(("Here is my thought process:",),),
    ),
    Thinking(
        names=(
            *("deepseek_r1", "deepseek_v3", "qwen3", "qwen3_5", "glm45", "kimi_k2", "minimax_m2", "minimax", "step3"),
            *("step3p5", "olmo3", "ernie45", "hunyuan_a13b", "nemotron_v3", "mimo", "think"),
        ),
        open="<think>",
        close="</think>",
        in_template=(("<think>",), ("</think>",)),
    ),
)
"""Formats of reasoning. gpt-oss needs no row: its channels mark reasoning too."""
