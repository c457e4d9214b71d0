"""The listening socket: systemd's, if it hands one over. Ports and Unix sockets are in test_listen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HAND_OVER = """
import os, socket, sys
from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.server.sockets import bind, url_of

def listening(address):
    made = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    made.bind(address)
    return made if address == ("127.0.0.2", 0) else made.listen() or made

def serve(addresses, keys, pid):
    sockets = [listening(address) for address in addresses]
    names = [each.getsockname() for each in sockets]
    if os.fork():
        os.wait()
        return
    for number, each in enumerate(sockets):
        os.dup2(each.fileno(), 103 + number)
    for number in range(len(sockets)):  # as systemd does: from descriptor 3 on
        os.dup2(103 + number, 3 + number)
    os.environ |= {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(len(sockets))}
    try:
        taken = bind(ServerSettings(port=0, api_key=keys))
        known = taken.getsockname() in names
        print(url_of(taken).partition("//")[0], known, os.get_inheritable(taken.fileno()), "LISTEN_FDS" in os.environ)
    except ConfigError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)

home = ("127.0.0.1", 0)
serve([home], (), 0)
serve([sys.argv[1]], (), 0)
serve([home], (), 1)
serve([], (), 0)
serve([("0.0.0.0", 0)], (), 0)
serve([("0.0.0.0", 0)], ("key",), 0)
serve([home, home], (), 0)
serve([("127.0.0.2", 0)], (), 0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each process says to which systemd hands sockets."""
    path: Path = tmp_path_factory.mktemp("sockets") / "quire.sock"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HAND_OVER, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(str(path), "PATH").splitlines()


def test_a_socket_is_taken_and_kept_from_children(said: list[str]) -> None:
    assert said[0] == "http: True False False"
    assert said[1] == "unix:PATH True False False"


def test_sockets_of_another_process_and_none_are_left_alone(said: list[str]) -> None:
    assert said[2] == "http: False False True"
    assert said[3] == "http: False False False"


def test_one_that_others_reach_needs_a_key(said: list[str]) -> None:
    assert "host is 0.0.0.0, which others can reach, and there is no API key" in said[4]
    assert said[5] == "http: True False False"


def test_what_cannot_serve_is_refused(said: list[str]) -> None:
    assert "hands over 2 sockets" in said[6]
    assert "does not listen" in said[7]
