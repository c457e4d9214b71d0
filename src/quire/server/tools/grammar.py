"""Grammars of replies: what a model may write when calls are forced, strict, or stand beside a constraint on the text.

They are made from the same rows as the readers, so both agree on where a call starts. Grammars are Lark as llguidance
reads it. `@body` stands for the client's own constraint.
"""

from collections.abc import Iterable, Sequence

from quire.errors import RequestError
from quire.server.tools.call_rules import CallRules, Rules
from quire.server.tools.format_types import Channels, Framed, Messages, Thinking, ToolFormat
from quire.server.tools.reader import Opening, ReplyFormat
from quire.server.tools.request import ToolUse
from quire.structured_outputs import StructuredOutputsParams

MAX_FORCED_CALLS = 16
"""Most calls of a reply that is forced to call: a weak model would go on to the end of its tokens."""


def constrain(
    form: ReplyFormat,
    use: ToolUse | None,
    text: StructuredOutputsParams | None,
    *,
    opening: Opening = Opening.FREE,
    thinking_budget: int | None = None,
) -> StructuredOutputsParams | None:
    """The constraint on a reply as a whole; None leaves it free.

    `text` constrains what is neither reasoning nor a call. Raises `RequestError` for a budget that cannot be held.
    """
    calls = use is not None and (use.forced or text is not None or any(tool.strict for tool in use.tools))
    thinks = form.thinking is not None
    if not calls and thinking_budget is None and (text is None or not thinks):
        return text
    rules = Rules()
    reply = _Reply(form, rules, opening=opening, budget=thinking_budget)
    framed = next((row for row in (form.tools, form.thinking) if isinstance(row, Framed)), None)
    if isinstance(framed, Messages):
        start = reply.messages(framed, use if calls else None, text)
    elif isinstance(framed, Channels):
        start = reply.channels(framed, use if calls else None, text)
    elif use is not None and calls:
        start = reply.with_calls(use, text)
    else:
        start = f"{reply.lead()} {'@body' if text is not None else reply.anything()}"
    grammar = rules.lark(start)
    if text is None or (use is not None and use.forced):
        return StructuredOutputsParams(grammar=grammar, asked_as="tools" if calls else "thinking_token_budget")
    return text.wrapped(grammar)


class _Reply:
    """Rules for the parts of one reply."""

    def __init__(self, form: ReplyFormat, rules: Rules, *, opening: Opening, budget: int | None) -> None:
        self._form = form
        self._rules = rules
        self._opening = opening
        self._budget = budget
        if budget is not None and budget < 0:
            raise RequestError(
                f"thinking_token_budget is {budget}; it must be 0 or more", param="thinking_token_budget"
            )

    def lead(self) -> str:
        """The reasoning in front of the reply: required where the prompt has opened it, else optional."""
        thinking = self._form.thinking
        if not isinstance(thinking, Thinking):
            if self._budget is not None:
                raise _no_budget()
            return ""
        if self._opening is Opening.CLOSED:
            return ""
        body, gap = self._thought(thinking.closes), "/[ \\n]{0,2}/"
        if self._opening is Opening.OPEN:
            return f"{body} {gap}"
        return f"(({' | '.join(map(self._form.marks.lark, thinking.opens))}) {body} {gap})?"

    def _thought(self, closes: Sequence[str]) -> str:
        """The reasoning behind its opening mark, up to one of the marks that close it."""
        marks = self._form.marks
        first_ids = [token_id for mark in closes if (token_id := marks.first_token_id(mark)) is not None]
        if len(first_ids) == len(closes):
            budget = "*" if self._budget is None else f"{{0,{self._budget}}}"
            inside = f"{_tokens_but([*first_ids, *self._form.special_ids])}{budget}" if self._budget != 0 else ""
            return f"{inside} ({' | '.join(map(marks.lark, closes))})"
        if self._budget is not None:
            raise _no_budget()
        names = [
            self._rules.add(f"think_{i}", "/(.|\\n)*/", f"suffix={CallRules.quoted(mark)}")
            for i, mark in enumerate(closes)
        ]
        return f"({' | '.join(names)})"

    def anything(self) -> str:
        """Any tokens. The first one does not open the reasoning, which `lead` has covered."""
        thinking = self._form.thinking
        opens = thinking.opens if isinstance(thinking, Thinking) else ()
        ids = [token_id for mark in opens if (token_id := self._form.marks.token_id(mark)) is not None]
        if not ids or self._opening is not Opening.FREE:
            return "<[*]>*"
        return f"({_tokens_but(ids)} <[*]>*)?"

    def with_calls(self, use: ToolUse, text: StructuredOutputsParams | None) -> str:
        """Calls alone, calls or a constrained text, or calls within any text."""
        tools = self._form.tools
        assert isinstance(tools, ToolFormat)
        calls = CallRules(self._rules, tools, self._form.marks, use)
        if use.forced:
            return f"{self.lead()} {calls.calls(MAX_FORCED_CALLS)}"
        if text is not None:
            return f"{self.lead()} ({calls.calls(MAX_FORCED_CALLS)} | @body)"
        opener = next((mark.strip() for mark in tools.openers), "")
        if not opener or tools.bare:
            return self.anything()  # nothing tells a call from text before it is complete
        token_id = self._form.marks.first_token_id(opener)
        rest = calls.calls(MAX_FORCED_CALLS, without_opener=True)
        if token_id is not None:
            return f"({_tokens_but([token_id])} | {self._form.marks.lark(opener)} {rest})*"
        self._rules.add("TEXT", "/(.|\\n)*/")
        self._rules.add("opened", f"TEXT {CallRules.quoted(opener)}", "lazy")
        return f"(opened {rest})* TEXT"

    def messages(self, row: Messages, use: ToolUse | None, text: StructuredOutputsParams | None) -> str:
        """A message with reasoning, then one with text, one with calls, or a text and then calls."""
        mark, again = self._form.marks.lark, self._form.marks.lark(row.opening)
        in_text = self._opening is Opening.CLOSED
        begin = self._form.marks.first_token_id(row.begin)
        free = "<[*]>*" if use is None or begin is None else f"{_tokens_but([begin])}*"
        said = f"{'' if in_text else mark(row.text[0])} {'@body' if text is not None else free}"
        if use is None:
            reply = said
        else:
            calls = CallRules(self._rules, row.calls, self._form.marks, use).messages(row, MAX_FORCED_CALLS)
            after_text = f"{mark(row.text[1])} {again} {calls}"
            if use.forced:
                reply = after_text if in_text else calls
            elif text is not None or begin is None:
                reply = f"({said} | {after_text if in_text else calls})"
            else:  # the text's own tokens hold the mark that ends it
                reply = f"{said} ({again} {calls})?" if in_text else f"({said} ({again} {calls})? | {calls})"
        if in_text:
            return reply
        thought = f"{self._thought([row.reasoning[1]])} {again}"
        if self._opening is Opening.OPEN:
            return f"{thought} {reply}"
        return f"({mark(row.reasoning[0])} {thought})? {reply}"

    def channels(self, row: Channels, use: ToolUse | None, text: StructuredOutputsParams | None) -> str:
        """gpt-oss: reasoning in its channel, then a call, or the text in the final channel."""
        mark = self._form.marks.lark
        ids = [self._form.marks.token_id(name) for name in (row.end, row.start, row.channel, row.message)]
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) < len(ids):
            raise RequestError("the model's channels are not tokens of its vocabulary", param="tools")
        limit = "*" if self._budget is None else f"{{0,{self._budget}}}"
        inside = f"{_tokens_but([*known, *self._form.special_ids])}{limit}" if self._budget != 0 else ""
        again = f'{mark(row.end)} {mark(row.start)} "assistant"'
        lead = f'({mark(row.channel)} "analysis" {mark(row.message)} {inside} {again})?'
        final = f'{mark(row.channel)} "final" {mark(row.message)} {"@body" if text is not None else "<[*]>*"}'
        if use is None:
            return f"{lead} {final}"
        calls = CallRules(self._rules, None, self._form.marks, use)
        heads = [
            (
                f'{mark(row.channel)} "commentary to=functions.{tool.name} " {mark(row.constrain)} "json" '
                f"{mark(row.message)} {calls.arguments(tool)} {mark(row.call_end)}"
            )
            for tool in use.tools
        ]
        return f"{lead} ({' | '.join(heads if use.forced else [*heads, final])})"


def _no_budget() -> RequestError:
    return RequestError(
        "thinking_token_budget needs a model whose end of reasoning is a token, and --reasoning-parser for it",
        param="thinking_token_budget",
        code="not_available",
    )


def _tokens_but(ids: Iterable[int]) -> str:
    """Any one token except `ids`."""
    ranges: list[list[int]] = []
    for token_id in sorted(set(ids)):
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    listed = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return f"<[^{listed}]>"
