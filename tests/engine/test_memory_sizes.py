"""Bytes available to this process, and bytes as text."""

import pytest

from quire.engine.memory_sizes import available_memory, show_bytes

GIB = 2**30


def test_available_memory_is_positive_and_below_the_machines() -> None:
    assert 0 < available_memory() < 2**46


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (24576, "24 KiB"), (3 * GIB // 2, "1.5 GiB"), (2**42, "4096 GiB")]
)
def test_show_bytes(size: int, text: str) -> None:
    assert show_bytes(size) == text
