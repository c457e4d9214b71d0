"""The table of formats of reasoning. `format_types` says what the fields mean."""

from quire.server.tools.format_types import Thinking

THINKINGS: tuple[Thinking, ...] = (
    Thinking(names=("seed_oss",), open="<seed:think>", close="</seed:think>", in_template=(("</seed:think>",),)),
    Thinking(
        names=("longcat",), open="<longcat_think>\n", close="\n</longcat_think>\n", in_template=(("<longcat_think>",),)
    ),
    Thinking(names=("minimax_m3",), open="<mm:think>", close="</mm:think>", in_template=(("</mm:think>",),)),
    Thinking(
        names=("gemma4",),
        open="<|channel>thought\n",
        close="<channel|>",
        in_template=(("<|channel>", "<channel|>"),),
    ),
    Thinking(names=("mistral", "magistral"), open="[THINK]", close="[/THINK]", in_template=(("[THINK]",),)),
    Thinking(
        names=("cohere_command3", "cohere_command4", "command_r", "cohere"),
        open="<|START_THINKING|>",
        close="<|END_THINKING|>",
        in_template=(("<|START_THINKING|>",),),
    ),
    Thinking(
        names=("k2_horizon",),
        open="<ifm|think>",
        close="</ifm|think>",
        also_open=("<ifm|think_fast>", "<ifm|think_faster>"),
        also_close=("</ifm|think_fast>", "</ifm|think_faster>"),
        in_template=(("<ifm|think>",), ("<ifm|think_fast>",)),
    ),
    Thinking(
        names=("plamo3",),
        open="<|plamo:begin_think:plamo|>",
        close="<|plamo:end_think:plamo|>",
        in_template=(("<|plamo:begin_think:plamo|>",), ("<|plamo:end_think:plamo|>",)),
    ),
    Thinking(
        names=("apertus",),
        open="<|inner_prefix|>",
        close="<|inner_suffix|>",
        in_template=(("<|inner_prefix|>",),),
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
            *("hy_v3", "holo2", "ling3", "minicpmv", "poolside_v1", "minicpm5", "glm47", "granite_thinking_parser"),
            *("deepseek_v4", "deepseek_v41"),
        ),
        open="<think>",
        close="</think>",
        in_template=(("<think>",), ("</think>",)),
    ),
)
"""Formats of reasoning. Formats of framed replies (`framed_formats`) mark reasoning too."""
