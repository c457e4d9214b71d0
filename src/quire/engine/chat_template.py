"""ChatTemplate: turns messages into the text format that the model was trained on.

Templates are Jinja programs in the model's files. They run in Jinja's sandbox, with the functions that Hugging Face
templates expect, and within a budget: of output text, of loop turns, and of the size of every value. The memory that
one filter allocates for a moment is not limited: the template has the same author as the model folder.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from quire.engine.message_contents import ContentForms, plain_message, render_contents
from quire.engine.tokenizer import MAX_PROMPT_CHARS, read_special_tokens
from quire.engine.tokenizer_files.added_tokens import CONFIG_FILE, read_optional
from quire.errors import CheckpointError, RequestError
from quire.model_config.file_kinds import is_file

MAX_LOOP_TURNS = 1_000_000
"""Most turns of all loops in one rendering; some hundred per message are usual."""

CONTINUE_HERE = "\ue000quire:continue\ue000"
"""Marks the end of the last message. It is from the private-use area, so that no message contains it by chance."""


class ChatTemplate:
    """The chat templates of one model: usually one, sometimes a second for tools."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        origin: str = "the chat template",
        max_chars: int = MAX_PROMPT_CHARS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`sources` maps names ("default", "tool_use", …) to Jinja texts; errors call them `origin`."""
        self.source = sources.get("tool_use") or sources.get("default") or ""
        """The template that requests with tools are rendered with; empty if there is none."""
        self.response_template = ""
        """The tokenizer's description of replies, as JSON; empty if it has none."""
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters |= {"tojson": _to_json, "quire_turns": _turns, "quire_grown": _grown}
        del environment.globals["lipsum"]  # generates text without end
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._templates = {name: _compile(environment, name, source) for name, source in sources.items()}
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}, line {error.lineno}: {error.message}") from error
        except Exception as error:  # what Jinja computes while it compiles can raise anything
            raise CheckpointError(f"{origin} cannot be compiled: {_reason(error)}") from error
        self._forms = {name: ContentForms() for name in sources}

    @classmethod
    def from_folder(cls, folder: str | Path, *, max_chars: int = MAX_PROMPT_CHARS) -> "ChatTemplate":
        """From chat_template.jinja, else from tokenizer_config.json. Without both, `render` refuses."""
        sources, origin = read_sources(Path(folder))
        template = cls(sources, read_special_tokens(folder), origin=origin, max_chars=max_chars)
        template.response_template = read_response_template(Path(folder))
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # a client may call a variable self or messages
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages` in OpenAI's format. It contains the special tokens: encode it without adding any.

        `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last turn open instead.
        `variables` are passed to the template unchanged (`enable_thinking` and the like).
        """
        template = self._choose(with_tools=bool(tools))
        if not messages:
            raise RequestError("messages is empty; give at least one", param="messages")
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: a turn is new or continued",
                param="continue_final_message",
            )
        chat = [plain_message(message, index) for index, message in enumerate(messages)]
        # What a client passes for the template hides none of these.
        chosen: dict[str, Any] = {
            "tools": tools or None,
            "documents": documents or None,
            "add_generation_prompt": add_generation_prompt,
        }
        if continue_final_message:
            chat[-1]["content"] = _marked(chat[-1].get("content"))
        text = self._render(template, chat, {**self._special_tokens, **variables, **chosen})
        return _cut_after_final_message(text) if continue_final_message else text

    def _render(self, template: Any, chat: Sequence[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text for messages whose contents are in the form that the template takes. Raises `RequestError`."""
        forms = self._forms[template.name]

        def run(messages: list[dict[str, Any]]) -> str:
            budget = _Budget(self._max_chars)
            pieces = template.generate({**variables, "messages": messages, _BUDGET: budget})
            return "".join(budget.output(pieces))

        try:
            return render_contents(run, chat, forms)
        except Exception as error:  # a template is a program and can raise anything
            raise RequestError(
                f"the model's chat template refuses the messages: {_reason(error)}", param="messages"
            ) from error

    def _choose(self, *, with_tools: bool) -> Any:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        try:
            return self._templates["default"]
        except KeyError:
            raise RequestError(
                "the model has no chat template. Use /v1/completions, or put a chat_template.jinja into its folder",
                param="messages",
                code="no_chat_template",
            ) from None


def read_response_template(folder: Path) -> str:
    """How the tokenizer describes replies, as JSON; "" if it does not."""
    described = read_optional(folder / CONFIG_FILE).get("response_template")
    return json.dumps(described, ensure_ascii=False) if isinstance(described, dict) else ""


def _compile(environment: "_Environment", name: str, source: str) -> Template:
    template = environment.from_string(source)
    template.name = name
    return template


def read_sources(folder: Path) -> tuple[dict[str, str], str]:
    """Name → template, and the file that they come from."""
    path = folder / "chat_template.jinja"
    if is_file(path):
        try:
            return {"default": path.read_text(encoding="utf-8")}, str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    path = folder / CONFIG_FILE
    match read_optional(path).get("chat_template"):
        case None:
            return {}, str(path)
        case str(source):
            return {"default": source}, str(path)
        case [*entries] if all(isinstance(entry, dict) for entry in entries):
            pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
            if all(isinstance(text, str) for pair in pairs for text in pair):
                return dict(pairs), str(path)
    raise CheckpointError(f"{path}: chat_template is neither a text nor a list of objects with name and template")


def _marked(content: object) -> Any:
    """The content of the last message with a mark at its end. The space shows whether the template trims messages; if
    it does, the text is trimmed as well."""
    match content:
        case str(text):
            return f"{text}{CONTINUE_HERE} "
        case [*parts, {"type": "text", "text": str(text)}]:
            return [*parts, {"type": "text", "text": f"{text}{CONTINUE_HERE} "}]
    raise RequestError("the final message has no text to continue", param="messages")


def _cut_after_final_message(text: str) -> str:
    """The text up to the mark, without trailing white space if the template trims messages."""
    end = text.rfind(CONTINUE_HERE)
    if end < 0:
        raise RequestError(
            "the model's chat template does not show the final message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    kept = text[end + len(CONTINUE_HERE) :].startswith(" ")
    return text[:end] if kept else text[:end].rstrip()


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateError):
        return error.message or type(error).__name__
    return f"{type(error).__name__}: {error}"


# --- functions that templates expect ----------------------------------------------------------------------------


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it; Jinja's own filter sorts keys and escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` marks the text of a training target; in a prompt it has no effect."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# --- the budget: compiling a template adds a check wherever text, loops or values can grow -----------------------

_BUDGET = "quire_budget"


class _Budget:
    """The rest of the budget of one rendering."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._chars_left = max_chars
        self._turns_left = MAX_LOOP_TURNS

    def output(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass the text on; raises if it grows too long."""
        for piece in pieces:
            self._chars_left -= len(piece)
            if self._chars_left < 0:
                raise SecurityError(f"the text grew beyond {self._max_chars:,} characters")
            yield piece

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass the items of a loop on; raises if there are too many."""
        for item in items:
            self._turns_left -= 1
            if self._turns_left < 0:
                raise SecurityError(f"the loops turned more than {MAX_LOOP_TURNS:,} times")
            yield item


@pass_context
def _turns(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget: _Budget = context.parent[_BUDGET]
    return budget.turns(items)


def _grown(value: Any) -> Any:
    """Check the size of a value: a short template can double a text thirty times."""
    if isinstance(value, str | list | tuple):
        _check_size(len(value))
    return value


def _check_size(size: int) -> None:
    if size > MAX_PROMPT_CHARS:
        raise SecurityError(f"a value grew beyond {MAX_PROMPT_CHARS:,} characters or items")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox; every loop goes through `_turns`, and every new value through `_grown`."""

    intercepted_binops = frozenset({"*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check products and powers before they are computed: a single one can take any amount of memory."""
        for value, factor in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(factor, int):
                _check_size(len(value) * factor)
        if operator == "**" and max(abs(left), abs(right)) > 1000:
            raise SecurityError("a power of numbers beyond 1,000")
        return super().call_binop(context, operator, left, right)


class _Metering(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "quire_turns")
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self.generic_visit(node)
        if isinstance(node.call, nodes.Filter):  # `{% call %}` needs the call itself; the budget counts what it writes
            node.call = node.call.node
        return node

    def visit_Expr(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "quire_grown")

    visit_Concat = visit_Add = visit_Mod = visit_Filter = visit_Call = visit_Expr


def _filtered(value: nodes.Node, name: str) -> nodes.Expr:
    """The value with a filter applied. Not a call, which the sandbox would check twice."""
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
