"""Flaws published for other servers, tried on what is read: files, grammars, hashes, tool calls, images in prompts."""

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.image_process import read_picture
from quire.engine.image_prompt import ImageExpander
from quire.errors import CheckpointError, RequestError
from quire.gguf.header import read_header as read_gguf
from quire.grammar.cache import GrammarCache
from quire.grammar.compiler import GrammarCompiler
from quire.image_input import ImagePart, ImagePixels, ReadImage
from quire.kv_cache.block_hash import find_extras, hash_block, root_hash
from quire.models.safetensors_file import read_header as read_safetensors
from quire.request import InputSpan
from quire.server.tools.format_types import Channels, Framed, Messages, ToolFormat
from quire.server.tools.formats import TOOL_FORMATS
from quire.structured_outputs import StructuredOutputsParams
from tests import stand_in_hub
from tests.server.scripted_engine import BUNDLED, bundled_tokenizer
from tests.server.tools.reading import content, read_pieces, reader
from tests.stand_in_hub import MAIN, SECOND, Repository

SLOW_EXPRESSIONS = [
    *("(a+)+$", "(a|a)*$", "(a*)*b", "((a+)+)+x", "(.*)*x", "([a-zA-Z]+)*=", "(a|aa)+$", "(x+x+)+y", ".*.*.*.*=.*"),
    *("(a?){60}a{60}", "^(([a-z])+.)+[A-Z]([a-z])+$", r"(\w+\s?)*:", "((ab?)*c?)*d", "(.?.?.?.?.?.?.?.?)*z"),
]


def seconds_of(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def assert_linear(make: Callable[[int], Callable[[], object]], size: int) -> None:
    """Four times the input takes about four times the time, not sixteen times; the best of three pairs counts."""
    factors = []
    for _ in range(3):
        small, large = (seconds_of(make(each)) for each in (size, 4 * size))
        factors.append(large / max(small, 1e-3))
        if factors[-1] < 8:
            return
    raise AssertionError(f"four times the input takes {factors} times as long")


# -- files ------------------------------------------------------------------------------------------------------------


def test_11_all_files_come_from_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-47155: the default branch moves while its files are fetched."""
    names = ("config.json", "tokenizer.json", "model.safetensors")
    moving = {commit: {name: f"{commit} {name}".encode() for name in names} for commit in (MAIN, SECOND)}
    monkeypatch.setattr(stand_in_hub, "BRANCHES", {"main": MAIN})
    with stand_in_hub.serve({"org/moving": Repository(moving)}) as hub:
        respond = hub.respond

        def moves_on(path: str) -> tuple[int, dict[str, str], bytes]:
            answer = respond(path)
            if path.startswith("/api/"):
                stand_in_hub.BRANCHES["main"] = SECOND
            return answer

        monkeypatch.setattr(hub, "respond", moves_on)
        with stand_in_hub.settings_of_the_hub(tmp_path, hub.endpoint):
            folder = Path(stand_in_hub.find("org/moving"))
    assert {path.read_text().split()[0] for path in folder.iterdir()} == {folder.name}
    assert folder.name in (MAIN, SECOND)


HUGE = (2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)


@pytest.mark.parametrize("number", HUGE)
def test_37_sizes_that_overflow_are_refused(number: int, tmp_path: Path) -> None:
    """CVE-2024-21802, CVE-2024-23605, CVE-2026-33298: products and sums of sizes wrap around in 64 bits."""
    text = b'{"t":{"dtype":"F32","shape":[%d,4],"data_offsets":[%d,%d]}}'
    safetensors, gguf = tmp_path / "m.safetensors", tmp_path / "m.gguf"
    for shape, begin, end in ((number, 0, 16), (1, number, number + 16), (number, 0, number * 16 % 2**64)):
        header = text % (shape, begin, end)
        safetensors.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with pytest.raises(CheckpointError, match=r"m\.safetensors"):
            read_safetensors(safetensors)
    safetensors.write_bytes(struct.pack("<Q", number) + bytes(64))
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read_safetensors(safetensors)
    one = struct.pack("<Q", 1) + b"t"
    tensors = [
        (num_dims, dims, offset)
        for num_dims, dims, offset in (
            (2, (number, 4), 0),
            (2, (number, 2**64 // number), 0),
            (1, (4,), number // 32 * 32),
            (number % 2**32, (4,), 0),
        )
        if num_dims > 4 or max(dims) > 4 or offset
    ]
    for num_dims, dims, offset in tensors:
        tensor = one + struct.pack(f"<I{len(dims)}QIQ", num_dims, *dims, 0, offset)
        gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(256))
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            read_gguf(gguf)
    for counts in ((number, 0), (0, number)):
        gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(256))
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            read_gguf(gguf)


# -- grammars and hashes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler((BUNDLED / "tokenizer.json").read_text(), vocab_size=1024, eos_token_ids=(1,))


@pytest.mark.parametrize("expression", SLOW_EXPRESSIONS)
def test_17_expressions_do_not_backtrack(expression: str, compiler: GrammarCompiler) -> None:
    """CVE-2026-55574, PYSEC-2026-3933: compiled and followed along a text that matches late or never."""
    tokens = bundled_tokenizer().encode("a" * 400, add_special_tokens=False)

    def follow() -> None:
        try:
            matcher: Any = compiler.compile(StructuredOutputsParams(regex=expression)).matcher()
        except RequestError:
            return
        for token in tokens:
            matcher.compute_bitmask()
            if not matcher.consume_token(token):
                return

    assert min(seconds_of(follow) for _ in range(2)) < 0.5


def test_19_kept_grammars_are_limited(compiler: GrammarCompiler) -> None:
    """CVE-2025-29770, CVE-2025-32381: thousands of schemas, each used once."""
    cache = GrammarCache(lambda: compiler, max_grammars=16, max_bytes=3_000)
    for number in range(300):
        constraint = StructuredOutputsParams(json={"const": f"schema {number}"})
        cache.compile(constraint, num_bytes=250).result()
        assert len(cache) <= 12
        assert cache.num_bytes <= 3_000
    kept = [n for n in range(300) if cache.find(StructuredOutputsParams(json={"const": f"schema {n}"}))]
    assert kept[0] >= 300 - 14, "what is not kept is not in memory either"


images = st.tuples(st.binary(min_size=32, max_size=32), st.integers(0, 5), st.integers(1, 4))
blocks = st.tuples(
    st.text(max_size=3), st.text(max_size=3), st.lists(st.integers(0, 9), min_size=8, max_size=8), images
)


@settings(max_examples=150, deadline=None)
@given(blocks, blocks)
def test_25_equal_hashes_mean_equal_content(one: Any, other: Any) -> None:
    """CVE-2025-25183, PYSEC-2025-43: fields that run into each other; an image without its shape."""

    def name(block: Any) -> bytes:
        salt, adapter, tokens, image = block
        return hash_block(root_hash(salt, 8, adapter), tokens, find_extras([InputSpan(*image)], 0, 8))

    assert (name(one) == name(other)) == (one == other)
    salt, adapter, tokens, image = one
    if adapter:
        assert name((salt + adapter, "", tokens, image)) != name(one)


def test_25_an_image_is_hashed_with_its_shape() -> None:
    np = pytest.importorskip("numpy")
    flat = np.arange(2 * 6 * 3, dtype=np.uint8)
    family = SimpleNamespace(
        layout=lambda size: SimpleNamespace(part_lengths=[1], pieces=(1,)), parts=lambda picture: [[picture]]
    )
    hashes = {
        read_picture(family, flat.reshape(shape)).parts[0].content_hash  # type: ignore[arg-type]  # stand-in
        for shape in ((2, 6, 3), (6, 2, 3), (3, 4, 3), (12, 1, 3))
    }
    assert len(hashes) == 4


# -- tool calls and prompts -------------------------------------------------------------------------------------------


def first_mark(row: ToolFormat | Framed) -> str:
    """What opens a call; empty if calls have no mark."""
    match row:
        case Channels():
            return row.start
        case Messages():
            return row.opening + row.calls_head.replace("{name}", "weather")
    return (row.openers or ("",))[0]


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.names[0])
def test_31_replies_are_read_in_linear_time(row: ToolFormat | Framed) -> None:
    """CVE-2025-71379, CVE-2025-48887: marks that open no call, calls that never end, nested values."""
    mark = first_mark(row) or "["
    for unit in (mark, mark + '{"id":[', mark + '{"name":"weather","parameters":{"a":['):
        text = unit * (2_000 // len(unit))

        def read(size: int, text: str = text) -> Callable[[], object]:
            return lambda: read_pieces(reader(row.names[0]), [text * (size // 2_000)])

        assert_linear(read, 2_000)


CODE = "__import__('os').system('touch {marker}')"


@pytest.mark.parametrize("row", TOOL_FORMATS, ids=lambda row: row.names[0])
def test_32_calls_are_never_evaluated(row: ToolFormat | Framed, tmp_path: Path) -> None:
    """CVE-2025-9141, CVE-2026-61539: code where a name, a key or a value stands."""
    marker = tmp_path / "marker"
    code = CODE.format(marker=marker)
    mark = first_mark(row)
    for body in (
        f"[weather(city={code})]",
        f"weather(city={code})",
        f"[{code}]",
        f'{{"name": "weather", "arguments": {code}}}',
        f'{{"name": "weather", "arguments": {{"city": {code}}}}}',
        f"weather\n<arg_key>days</arg_key>\n<arg_value>{code}</arg_value>",
        f"<function=weather>\n<parameter=days>\n{code}\n</parameter>\n</function>",
    ):
        content(read_pieces(reader(row.names[0]), [mark + body]))
        content(read_pieces(reader(row.names[0]), [body]))
    assert not marker.exists()
    assert not os.path.lexists(marker)


def test_36_images_are_placed_in_linear_time() -> None:
    """CVE-2025-46560: one placeholder after the other was searched from the beginning of the prompt."""
    marker, placeholder = 6, 7
    vision: Any = SimpleNamespace(image_token_id=placeholder, marker_token_id=marker)
    expander = ImageExpander(vision, bundled_tokenizer())
    pixels = ImagePixels(b"", 0, 0, 0)
    image = ReadImage((2,), (ImagePart(b"h", 2, pixels),))

    def place(size: int) -> Callable[[], object]:
        ids, images = [5, placeholder, placeholder] * size, [image] * size
        text = f"x{expander.marker}" * size
        return lambda: (expander.locate(None, ids, images), expander.expand_text(text, images))

    assert_linear(place, 1_000)
