"""Users without a home folder, users without rights, files that cannot be written: one line and a status."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from quire.cli.commands import run

SETPRIV = shutil.which("setpriv")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user whom the system does not know, without HOME, in an empty folder."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        *(
            (command, 3, "there is no home folder to keep models in; set HOME, or HF_HOME to a folder")
            for command in (
                ["list"],
                ["show", "smollm2"],
                ["rm", "org/name"],
                ["pull", "smollm2"],
                ["plan", "org/name"],
            )
        ),
        (["plan", "~/model"], 3, "~/model is neither a folder nor a GGUF file"),
        (["convert", "", "--to", "int8", "--output", "~/x"], 2, "~/x is in a home folder, and this user has none"),
        *(
            ([command, *more, flag, "~/x"], 2, "~/x is in a home folder, and this user has none; set HOME")
            for command, more in (("serve", ()), ("generate", ("x",)), ("chat", ()))
            for flag in ("--disk-cache", "--weights-cache")
        ),
    ],
)
@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(arguments) == status
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()], "no folder named ~"


@pytest.fixture(scope="module")
def stranger() -> list[str]:
    """The command as a user without rights and without a home. Skips where nobody can become one, or where this Python
    lies in a folder that others cannot read."""
    if os.geteuid() != 0 or SETPRIV is None:
        pytest.skip("needs root and setpriv, to become another user")
    command = [SETPRIV, "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable]
    if subprocess.run([*command, "-c", ""], capture_output=True).returncode:
        pytest.skip("others cannot run this Python")
    return [*command, "-m", "quire"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("simulate --json /etc/x.json", "for --json. It cannot be written here; give another place"),
        ("simulate --plot /etc/x.svg", "plot is /etc/x.svg, which cannot be written"),
        ("serve --port 80", "port 80 needs privileges; choose one above 1023 with --port"),
        ("serve --uds /etc/x.sock", "cannot listen on /etc/x.sock: permission denied"),
    ],
)
def test_another_user_is_told_what_may_not_be_written(arguments: str, said: str, stranger: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HOME", None)
    done = subprocess.run([*stranger, *arguments.split()], env=environment, cwd="/", capture_output=True, text=True)
    assert said in done.stderr
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
