"""Flaws published for other servers that lie in processes and files behind the door. Each test names the flaw."""

import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from quire import AsyncLLM
from quire.engine import engine_child
from quire.engine.grammar_checker import GrammarChecker
from quire.errors import RequestError
from quire.images.decoding import decode
from quire.structured_outputs import StructuredOutputsParams
from tests.engine import scripted_process, serving
from tests.engine.serving import until
from tests.security.test_published_flaws import Bomb
from tests.server.scripted_engine import BUNDLED


def test_01_messages_between_processes_are_never_unpickled(tmp_path: Path) -> None:
    """CVE-2024-9053, CVE-2024-11041, CVE-2025-30165: every decoder is tried, and the interpreter says what it loads."""
    marker = tmp_path / "marker"
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(marker)))
    program = (
        "import sys\nfrom pathlib import Path\nfrom quire.engine import messages\n"
        "bomb, seen = Path(sys.argv[1]).read_bytes(), []\n"
        "sys.addaudithook(lambda event, args: seen.append(event))\n"
        "decoders = [value for name, value in vars(messages).items() if name.startswith('decode_')]\n"
        "for decode in decoders:\n"
        "    for body in (bomb, b'\\xc4' + bytes([len(bomb)]) + bomb):\n"
        "        try:\n            decode(body)\n        except Exception:\n            continue\n"
        "        raise SystemExit(f'{decode} took it')\n"
        "print(len(decoders), *sorted({e for e in seen if e.startswith(('pickle', 'os.', 'exec', 'marshal'))}))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "bomb")]
    num_decoders, *loaded = subprocess.run(command, check=True, timeout=60, capture_output=True).stdout.split()
    assert int(num_decoders) >= 6
    assert loaded == []
    assert not marker.exists()


def test_02_only_the_http_port_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-29783, CVE-2025-32444, CVE-2025-47277: the processes behind the server have sockets and listen on none.
    A server in this process would be seen: the look finds it."""
    monkeypatch.setattr(engine_child, "PROGRAM", scripted_process.PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def look(engine: AsyncLLM) -> None:
        await until(lambda: len(children(os.getpid())) >= 2)  # the engine, and one that reads chats or grammars
        found = children(os.getpid())
        assert engine.engine_pid in found
        assert sum(len(sockets(pid)) for pid in found) >= 2
        assert {pid: listening(pid) for pid in found} == {pid: set[str]() for pid in found}

    with socket.create_server(("127.0.0.1", 0)) as own, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0quire-test-of-row-2")
        named.listen()
        assert {f"socket:[{os.fstat(each.fileno()).st_ino}]" for each in (own, named)} <= listening(os.getpid())
        serving.run(look)


def children(pid: int) -> set[int]:
    """The processes below a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found = {child for child, parent in parents.items() if parent == pid}
    return found | {other for child in found for other in children(child)}


def sockets(pid: int) -> set[str]:
    links = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.add(os.readlink(path))
    return {link for link in links if link.startswith("socket:")}


def listening(pid: int) -> set[str]:
    """The sockets of a process on which others can reach it: TCP and UDP ports, and Unix sockets with a name."""
    open_to_others = set()
    for table, states in (("tcp", {"0A"}), ("tcp6", {"0A"}), ("udp", {"07"}), ("udp6", {"07"})):
        lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        open_to_others |= {f"socket:[{fields[9]}]" for fields in map(str.split, lines) if fields[3] in states}
    for fields in map(str.split, Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]):
        if int(fields[3], 16) & 0x10000:
            open_to_others.add(f"socket:[{fields[6]}]")
    return sockets(pid) & open_to_others


def test_18_and_20_grammars_that_break_the_compiler_are_refused() -> None:
    """The same flaws, behind the door: with the compiler that a server uses, in its own process."""
    checker = GrammarChecker(BUNDLED, vocab_size=512, eos_token_ids=(0,))
    properties = "{}"
    for _ in range(400):
        properties = f'{{"type":"object","properties":{{"a":{properties}}}}}'
    hostile: list[dict[str, Any]] = [
        *({"json": schema} for schema in ('{"$ref":"#"}', '{"$ref":"#/$defs/none"}', '{"type":5}', properties)),
        {"json": '{"allOf":' + json.dumps([{"$ref": "#"}] * 50) + "}"},
        *({"regex": regex} for regex in ("((((.?){20}){20}){20}){20}", "(" * 3000, "(?P<a>x)(?P=a)", "[a-")),
        *({"grammar": lark} for lark in ("start: start", 'start: "a"~1000000000', "start: nothing", "")),
    ]
    try:
        refused, statuses = 0, set[int]()
        for spec in hostile:
            try:
                checker.check(StructuredOutputsParams(**spec))
            except RequestError as error:
                statuses.add(error.status)
                refused += 1
            follower = StructuredOutputsParams(regex=f"[0-9]{{{1 + refused}}}")
            assert checker.check(follower) > 0, "the next one is checked"
        assert (refused >= 8, statuses) == (True, {400})
        assert statuses == {400}
    finally:
        checker.close()


def picture(kind: str, width: int, height: int) -> bytes:
    """A small file that claims so many pixels."""
    if kind == "bmp":
        header = struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + header + bytes(99)
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(999)))):
        file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return file


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_22_an_image_is_measured_before_it_is_read(kind: str) -> None:
    """CVE-2026-100650, CVE-2026-34755, CVE-2026-105760: a file of some hundred bytes that claims 3.6 billion pixels."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError, match=r"the image has 60000 × 60000 pixels, more than the limit of 1,000,000"):
        decode(picture(kind, 60_000, 60_000), 1_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
