"""Which Ray cluster a command joins, and what it says where there is none. Without Ray."""

import re
import socket

import pytest

from quire.cluster.head_node import check_listens, chosen_address
from quire.errors import ConfigError
from tests.router.processes import free_port


@pytest.mark.parametrize(
    ("given", "variable", "chosen"),
    [
        (None, None, "local"),
        (None, "", "local"),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),  # as KubeRay sets it
        ("local", "10.0.0.1:6379", "local"),
        ("auto", None, "auto"),
        ("auto", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("head:6379", "10.0.0.1:6379", "head:6379"),
        ("[::1]:6379", None, "[::1]:6379"),
    ],
)
def test_an_option_goes_before_the_environment(given: str | None, variable: str | None, chosen: str) -> None:
    assert chosen_address(given, {} if variable is None else {"RAY_ADDRESS": variable}) == chosen


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", ":6379", "head:", "head:ray", "head:0", "head:65536", "http://head:8265", "ray://head:10001"],
)
def test_a_wrong_address_is_named_with_the_right_form(address: str) -> None:
    for given, environment, source in ((address, {}, "address"), (None, {"RAY_ADDRESS": address}, "RAY_ADDRESS")):
        with pytest.raises(ConfigError, match=re.escape(f"{source} is {address!r}; it must be HOST:PORT")):
            chosen_address(given, environment)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "no-such-host.invalid"])
def test_where_nothing_listens_the_head_node_is_said_to_be_missing(host: str) -> None:
    address = f"{host}:{free_port()}"
    with pytest.raises(ConfigError, match=re.escape(f"no Ray cluster answers at {address}: ") + r".+ray start --head"):
        check_listens(address)


def test_where_something_listens_nothing_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_listens(f"127.0.0.1:{listener.getsockname()[1]}")
