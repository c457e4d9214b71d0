"""Replies as models of each family write them, and what they mean: (format, reasoning, text, message)."""

PARIS = '{"city": "Paris", "days": 3}'
ODD = '{"city": "a } \\" <tool_call> é😀", "tags": ["]", "\\\\"]}'
TWO = [("weather", PARIS), ("now", "{}")]
THINK = "think"
NS = "]<]minimax[>["

REPLIES: list[tuple[str, str | None, str, tuple[str, str, list[tuple[str, str]]]]] = [
    (
        "hermes",
        None,
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>{"name":"now"}</tool_call>',
        ("Let me see.", "", TWO),
    ),
    (
        "hermes",
        None,
        f'<tool_call>\n{{"arguments": {ODD}, "name": "weather"}}\n</tool_call> Done.',
        ("Done.", "", [("weather", ODD)]),
    ),
    (
        "hermes",
        None,
        '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 3}"}</tool_call>',
        ("", "", [("weather", '{"days": 3}')]),
    ),
    (
        "hermes",
        None,
        f'<tool_call>{{"name": "weather", "arguments": {PARIS}</tool_call> ok',
        ("ok", "", [("weather", PARIS)]),
    ),
    (
        "hermes",
        THINK,
        "<think>\nHm, é.\n\n</think>\n\nYes.\n",
        ("Yes.\n", "Hm, é.", []),
    ),
    (
        "hermes",
        THINK,
        f'<think>I call\n<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call>\n</think>\n\nYes.',
        ("Yes.", "I call", [("weather", PARIS)]),
    ),
    (
        "hermes",
        THINK,
        "<think>A <tool_call> is a mark.</think></think>Yes </think>.",
        ("Yes .", "A <tool_call> is a mark.", []),
    ),
    (
        "qwen3_coder",
        THINK,
        '<think>x</think>Hi\n\n<tool_call>\n<function=weather>\n<parameter=city>\n\nNew "York"\n\n</parameter>\n'
        '<parameter=days>\n3\n</parameter>\n<parameter=tags>\n["a"]\n</parameter>\n<parameter=share>\nNone\n</parameter>\n'
        "<parameter=unit>\nf\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (
            "Hi",
            "x",
            [
                (
                    "weather",
                    '{"city": "\\nNew \\"York\\"\\n", "days": 3, "tags": ["a"], "share": null, "unit": "f"}',
                ),
                ("now", "{}"),
            ],
        ),
    ),
    (
        "qwen3_coder",
        None,
        "<function=weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        ("", "", [("weather", PARIS)]),
    ),
    (
        "seed_oss",
        "seed_oss",
        "<seed:think>x</seed:think><seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
        ("", "x", [("weather", PARIS)]),
    ),
    (
        "glm45",
        THINK,
        "<think>x</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key><arg_value>3</arg_value>\n</tool_call>\n<tool_call>now</tool_call>",
        ("", "x", TWO),
    ),
    (
        "minimax_m2",
        THINK,
        'So:\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        ("So:", "", TWO),
    ),
    (
        "minimax_m3",
        "minimax_m3",
        f'<mm:think>x</mm:think>So:{NS}<tool_call>\n{NS}<invoke name="weather">{NS}<city>a < "b" {NS}</city>'
        f'{NS}<days>3{NS}</days>{NS}</invoke>\n{NS}<invoke name="now">{NS}</invoke>\n{NS}</tool_call>',
        ("So:", "x", [("weather", '{"city": "a < \\"b\\" ", "days": 3}'), ("now", "{}")]),
    ),
    (
        "minimax_m3",
        None,
        f'{NS}<tool_call>\n{NS}<invoke name="weather">\n'
        f"{NS}<tags>{NS}<item>]{NS}</item>\n{NS}<item>5{NS}</item>{NS}</tags>"
        f"{NS}<share>{NS}</share>\n{NS}<-other>\n{NS}<a>{NS}<item>1{NS}</item>{NS}</a>{NS}<b>true{NS}</b>{NS}</-other>"
        f'{NS}<note>["x"]{NS}</note>{NS}</invoke>\n{NS}</tool_call> ok',
        (
            "ok",
            "",
            [("weather", '{"tags": ["]", "5"], "share": "", "-other": {"a": [1], "b": true}, "note": ["x"]}')],
        ),
    ),
    (
        "gemma4",
        "gemma4",
        '<|channel>thought\nx<channel|>ok<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        ("ok", "x", TWO),
    ),
    (
        "gemma4",
        None,
        '<|tool_call>call:weather{city:<|"|>a } "b" \\ é<|"|>, tags:[<|"|>]<|"|>,<|"|>,<|"|>], share:null, '
        '"unit":"c",other:{a:[1,{b:true}],<|"|>c d<|"|>:[]},days:4<tool_call|>',
        (
            "",
            "",
            [
                (
                    "weather",
                    '{"city": "a } \\"b\\" \\\\ é", "tags": ["]", ","], "share": null, "unit": "c", '
                    '"other": {"a": [1, {"b": true}], "c d": []}, "days": 4}',
                )
            ],
        ),
    ),
    (
        "functiongemma",
        None,
        "<start_function_call>call:weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
        ("", "", [("weather", PARIS)]),
    ),
    (
        "deepseek_v32",
        THINK,
        '<think>x</think>ok<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        ("ok", "x", TWO),
    ),
    (
        "deepseek_v4",
        None,
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        ("", "", [("weather", PARIS)]),
    ),
    (
        "deepseek_v3",
        THINK,
        "ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{PARIS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("ok", "", TWO),
    ),
    (
        "deepseek_v31",
        THINK,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", TWO),
    ),
    (
        "kimi_k2",
        THINK,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{PARIS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        ("", "", TWO),
    ),
    (
        "mistral",
        "mistral",
        "[THINK]x[/THINK]"
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        ("", "x", TWO),
    ),
    (
        "mistral_v11",
        "mistral",
        f"ok[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{PARIS}[TOOL_CALLS]now[ARGS]{{}}",
        ("ok", "", TWO),
    ),
    ("mistral_v11", None, f"[TOOL_CALLS]weather{PARIS}", ("", "", [("weather", PARIS)])),
    (
        "granite",
        "granite",
        f'<|tool_call|>[{{"name": "weather", "arguments": {PARIS}}}]',
        ("", "", [("weather", PARIS)]),
    ),
    ("granite", None, f'<tool_call>[{{"name": "weather", "arguments": {PARIS}}}]', ("", "", [("weather", PARIS)])),
    (
        "granite",
        "granite",
        "Here is my thought process: Hm.\n\nHere is my response: Yes.",
        ("Yes.", "Hm.", []),
    ),
    ("phi4", None, f'functools[{{"name": "weather", "arguments": {PARIS}}}]', ("", "", [("weather", PARIS)])),
    (
        "command_r",
        "command_r",
        "<|START_THINKING|>x<|END_THINKING|><|START_ACTION|>[\n"
        f'  {{"tool_call_id": "0", "tool_name": "weather", "parameters": {PARIS}}},\n'
        '  {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
        ("", "x", TWO),
    ),
    (
        "llama3_json",
        None,
        f'{{"name": "weather", "parameters": {PARIS}}}; {{"type": "function", "name": "now", "parameters": {{}}}}',
        ("", "", TWO),
    ),
    (
        "llama3_json",
        None,
        f'<|python_tag|>{{"type": "function", "function": {{"name": "weather", "arguments": {PARIS}}}}}',
        ("", "", [("weather", PARIS)]),
    ),
    (
        "llama3_json",
        None,
        '{"name": "other", "parameters": {}} is JSON',
        ('{"name": "other", "parameters": {}} is JSON', "", []),
    ),
    ("llama3_json", None, '{"answer": [1, 2]}\n', ('{"answer": [1, 2]}\n', "", [])),
    ("pythonic", None, "[weather(city='Paris', days=3), now()]", ("", "", TWO)),
    (
        "pythonic",
        None,
        '[weather(city="a, (b) \\"c\\"", tags=["x", \'y\'], share=None, days=-1)]',
        ("", "", [("weather", '{"city": "a, (b) \\"c\\"", "tags": ["x", "y"], "share": null, "days": -1}')]),
    ),
    ("pythonic", None, "[1, 2] are [weather]", ("[1, 2] are [weather]", "", [])),
    ("llama4_pythonic", None, '<|python_start|>[weather(city="Paris", days=3), now()]<|python_end|>', ("", "", TWO)),
    ("olmo3", THINK, '<function_calls>\nweather(city="Paris", days=3)\nnow()\n</function_calls>', ("", "", TWO)),
    (
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{PARIS}<|call|>",
        ("", "x", [("weather", PARIS)]),
    ),
    (
        "harmony",
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.weather<|channel|>commentary json"
        f"<|message|>{PARIS}<|call|>",
        ("I look.", "", [("weather", PARIS)]),
    ),
    (
        "harmony",
        "harmony",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>commentary<|message|>One.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Two.<|return|>",
        ("One.\n\nTwo.", "x", []),
    ),
    (
        "json",
        None,
        f'[{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        ("", "", TWO),
    ),
    (
        "dots",
        None,
        'Ok.\n<dots_function_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</dots_function_call>',
        ("Ok.", "", TWO),
    ),
    (
        "deepseek_v41",
        THINK,
        '<think>x</think><｜DSML｜ calls>\n<｜DSML｜ invoke name="weather">\n'
        '<｜DSML｜ parameter name="city" string="true">Paris</｜DSML｜ parameter>\n'
        '<｜DSML｜ parameter name="days" string="false">3</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n'
        '<｜DSML｜ invoke name="now">\n</｜DSML｜ invoke>\n</｜DSML｜ calls>',
        ("", "x", TWO),
    ),
    (
        "step3",
        THINK,
        "Hm</think>Ok<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="weather"><steptml:parameter name="city">Paris</steptml:parameter>'
        '<steptml:parameter name="days">3</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n'
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="now"></steptml:invoke><｜tool_call_end｜>\n'
        "<｜tool_calls_end｜>",
        ("Hm</think>Ok", "", TWO),
    ),
    (
        "hy_v3",
        None,
        "<tool_calls>\n<tool_call>weather<tool_sep>\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now<tool_sep>\n</tool_call>\n"
        "</tool_calls>",
        ("", "", TWO),
    ),
    (
        "hy_v4",
        None,
        "<tool_calls>\n<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>3</arg_value></tool_call><tool_call>now</tool_call></tool_calls>",
        ("", "", TWO),
    ),
    (
        "jamba",
        None,
        f'<tool_calls>[\n    {{"name": "weather", "arguments": {PARIS}}},\n    {{"name": "now", "arguments": {{}}}}\n]'
        "</tool_calls>",
        ("", "", TWO),
    ),
    ("lfm2", None, 'Ok. <|tool_call_start|>[weather(city="Paris", days=3), now()]<|tool_call_end|>', ("Ok.", "", TWO)),
    (
        "longcat",
        "longcat",
        f'<longcat_think>\nx\n</longcat_think>\n<longcat_tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n'
        '</longcat_tool_call>\n<longcat_tool_call>\n{"name": "now", "arguments": {}}\n</longcat_tool_call>',
        ("", "x", TWO),
    ),
    (
        "internlm",
        None,
        f'Ok.<|action_start|><|plugin|>\n{{"name": "weather", "parameters": {PARIS}}}<|action_end|>\n',
        ("Ok.", "", [("weather", PARIS)]),
    ),
    (
        "gigachat3",
        None,
        f'Ok.<|function_call|>{{"name": "weather", "arguments": {PARIS}}}',
        ("Ok.", "", [("weather", PARIS)]),
    ),
    (
        "gigachat3",
        None,
        f'function call<|role_sep|>\n{{"name": "weather", "arguments": {PARIS}}}',
        ("", "", [("weather", PARIS)]),
    ),
    (
        "k2_horizon",
        "k2_horizon",
        "<ifm|think_fast>x</ifm|think_fast>ok<ifm|tool_calls>\n<ifm|tool_call>weather\n"
        "<ifm|arg_key>city</ifm|arg_key>\n<ifm|arg_value>Paris</ifm|arg_value>\n"
        "<ifm|arg_key>days</ifm|arg_key>\n<ifm|arg_type>integer</ifm|arg_type>\n"
        "<ifm|arg_value>3</ifm|arg_value>\n</ifm|tool_call>\n<ifm|tool_call>now</ifm|tool_call>\n</ifm|tool_calls>",
        ("ok", "x", TWO),
    ),
    (
        "k2_horizon",
        None,
        f'<ifm|tool_calls><ifm|tool_call>{{"name": "weather", "arguments": {PARIS}}}</ifm|tool_call>'
        "</ifm|tool_calls> ok",
        ("ok", "", [("weather", PARIS)]),
    ),
    (
        "plamo3",
        "plamo3",
        "<|plamo:begin_think:plamo|>x<|plamo:end_think:plamo|>ok<|plamo:begin_tool_requests:plamo|>"
        "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>weather<|plamo:end_tool_name:plamo|>"
        f"<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>{PARIS}"
        "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>"
        "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>now<|plamo:end_tool_name:plamo|>"
        "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>{}"
        "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|><|plamo:end_tool_requests:plamo|>",
        ("ok", "x", TWO),
    ),
    (
        "apertus",
        "apertus",
        f'<|inner_prefix|>x<|inner_suffix|>ok<|tools_prefix|>[{{"weather": {PARIS}}}, {{"now": {{}}}}]'
        "<|tools_suffix|> so",
        ("ok so", "x", TWO),
    ),
    (
        "minicpm5",
        THINK,
        '<think>x</think>\n\n<function name="weather"><param name="city">Paris</param><param name="days">3</param>'
        '</function><function name="now"></function>',
        ("", "x", TWO),
    ),
    (
        "minicpm5",
        None,
        'ok <function name="weather"><param name="city"><![CDATA[a </param> & b]]></param></function> '
        '<function name="f">',
        ('ok <function name="f">', "", [("weather", '{"city": "a </param> & b"}')]),
    ),
    (
        "muse_glimmer",
        "muse_glimmer",
        " to=self<|message|>x<|eom|><|start|>assistant to=weather<|message|><atem:function_calls>\n"
        '<atem:invoke name="weather.weather">\n<atem:parameter name="city">Paris</atem:parameter>\n'
        '<atem:parameter name="days">3</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eom|>'
        "<|start|>assistant to=now.*<|message|><atem:function_calls>\n"
        '<atem:invoke name="now">\n</atem:invoke>\n</atem:function_calls><|eot|>',
        ("", "x", TWO),
    ),
    (
        "muse_glimmer",
        "muse_glimmer",
        ' to=self<|message|>An <atem:invoke name="now"> is a mark.<|eom|><|start|>assistant to=user<|message|>One.'
        "<|eom|><|start|>assistant<|message|>Two.<|eot|>",
        ("One.\n\nTwo.", 'An <atem:invoke name="now"> is a mark.', []),
    ),
    (
        "inkling",
        "inkling",
        "<|content_thinking|>x<|end_message|><|message_model|><|content_text|>ok<|end_message|>"
        f'<|message_model|>weather<|content_invoke_tool_json|>{{"name":"weather","args":{PARIS}}}<|end_message|>'
        '<|message_model|>now<|content_invoke_tool_json|>{"name":"now","args":{}}<|end_message|>'
        "<|content_model_end_sampling|>",
        ("ok", "x", TWO),
    ),
    (
        "inkling",
        "inkling",
        'now<|content_invoke_tool_json|>{"answer": 1}<|end_message|><|message_model|><|content_tool_error|>no',
        ('{"answer": 1}\n\nno', "", []),
    ),
    (
        "kimi_k3",
        "kimi_k3",
        "<|open|>think<|sep|>x<|close|>think<|sep|><|open|>response<|sep|>ok<|close|>response<|sep|>"
        '<|open|>tools<|sep|><|open|>call tool="weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|>'
        '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|><|close|>call<|sep|>'
        '<|open|>call tool="now" index="2"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>'
        "<|close|>message<|sep|><|end_of_msg|>",
        ("ok", "x", TWO),
    ),
    (
        "kimi_k3",
        "kimi_k3",
        '<|open|>response<|sep|>a <b> & c<|close|>response<|sep|><|open|>tools<|sep|><|open|>call tool="weather"<|sep|>'
        f'<|open|>json type="object"<|sep|>{PARIS}<|close|>json<|sep|><|close|>call<|sep|>'
        '<|open|>call tool="weather" index="2"<|sep|><|open|>argument key="a &amp; &quot;b&quot;" type="object"<|sep|>'
        '{"x": [1]}<|close|>argument<|sep|><|open|>argument key="n" type="string"<|sep|>1<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        ("a <b> & c", "", [("weather", PARIS), ("weather", '{"a & \\"b\\"": {"x": [1]}, "n": "1"}')]),
    ),
]
