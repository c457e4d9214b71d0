"""Trace files: each published format, and what is wrong with a file said with its line."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.simulation.trace import TraceRow, find_trace, read_trace, unbounded_hit_percent

MOONCAKE = [
    {"timestamp": 3000, "input_length": 513, "output_length": 2, "hash_ids": [1, 2]},
    {"timestamp": 0, "input_length": 1024, "output_length": 7, "hash_ids": [1, 9]},
]


def test_csv_without_arrivals_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt_tokens,output_tokens\n5,6\n1,2\n0,3\n4,0\n")
    trace = read_trace(path)
    assert trace.rows == [TraceRow(5, 6), TraceRow(1, 2)]
    assert trace.num_skipped == 2
    assert not trace.has_arrivals


@pytest.mark.parametrize(
    "text",
    [
        "arrival_s,prompt_tokens,output_tokens\n7.5,3,4\n5,1,2\n",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05.4799600,3,4\n2023-11-16 18:17:02.9799600,1,2\n",
    ],
)
def test_arrivals_are_sorted_and_begin_at_zero(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert read_trace(path).rows == [TraceRow(1, 2, 0.0), TraceRow(3, 4, 2.5)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_mooncake_lines(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.anything"
    content = "".join(json.dumps(row) + "\n" for row in MOONCAKE).encode()
    path.write_bytes(compress(content))
    trace = read_trace(path)
    assert trace.rows == [TraceRow(1024, 7, 0.0, (1, 9)), TraceRow(513, 2, 3.0, (1, 2))]
    assert trace.has_prefixes
    assert unbounded_hit_percent(trace.rows) == 25.0
    assert unbounded_hit_percent(trace.rows, of_tokens=True) == 100 * 512 / (1024 + 513)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("prompt_tokens,output_tokens\n", "holds no request"),
        ("prompt,output\n1,2\n", "line 2: no column prompt_tokens"),
        ("prompt_tokens,output_tokens\n1,2\nx,2\n", "line 3: invalid literal"),
        ("prompt_tokens,output_tokens\n-1,2\n", "line 2: prompt_tokens is -1"),
        (
            "prompt_tokens,output_tokens\n1,1000000000\n",
            "line 2: output_tokens is 1000000000; it must be a whole number",
        ),
        ('{"input_length": 1.5, "output_length": 1}', "line 1: input_length is 1.5"),
        ('{"input_length": 1e999, "output_length": 1}', "line 1: cannot convert float infinity"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,2\n", "line 2: arrival is nan"),
        ('{"input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "line 1: 2 hash_ids for 5 prompt tokens"),
        ('{"input_length": 5, "output_length": 1, "hash_ids": [-1]}', "line 1: a hash id is out of range"),
        ('{"input_length": 5', "line 1: "),
        ('{"input_length": 5, "output_length": 1}\n[]', "line 2: expected an object"),
        (
            '{"input_length": 5, "output_length": 1, "timestamp": 1}\n{"input_length": 5, "output_length": 1}',
            "an arrival for some rows only",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_trace(path)


def test_tenants_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("prompt_tokens,output_tokens,max_tokens,tenant\n3,4,64,a\n5,6,,\n")
    assert [(row.max_tokens, row.tenant) for row in read_trace(path).rows] == [(64, "a"), (None, "")]


def test_names_are_looked_up_in_the_folder(tmp_path: Path) -> None:
    for name in ("chat_1.csv", "chat_2.csv", "code.jsonl.gz"):
        (tmp_path / name).write_text("")
    assert find_trace("code", tmp_path) == tmp_path / "code.jsonl.gz"
    assert find_trace("chat_2", tmp_path) == tmp_path / "chat_2.csv"
    assert find_trace("co", tmp_path).name == "code.jsonl.gz"
    assert find_trace(str(tmp_path / "chat_1.csv"), "elsewhere") == tmp_path / "chat_1.csv"
    with pytest.raises(ConfigError, match=r"chat_1.csv, chat_2.csv, code.jsonl.gz"):
        find_trace("chat", tmp_path)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: content[:24] + b"\xff" * 30])
def test_spoilt_archives(tmp_path: Path, compress: Callable[[bytes], bytes], spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a"
    path.write_bytes(spoil(compress(b"prompt_tokens,output_tokens\n1,2\n" * 9)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(path)
