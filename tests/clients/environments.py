"""`python -m tests.clients.environments FOLDER [NAME...]`: makes the environments of the clients in clients.toml.

Each client has a folder of its own, FOLDER/NAME. A stamp in it remembers what is installed.
"""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("clients.toml")
ROOT = Path(__file__).parents[2]
_STAMP = "installed.txt"


@dataclass(frozen=True)
class RealClient:
    """A row of clients.toml."""

    name: str
    title: str
    shows: list[str]
    packages: list[str] = field(default_factory=list)
    npm: list[str] = field(default_factory=list)
    server: str = "stand-in"
    """What it talks to: a stand-in, or `quire serve` with the bundled model; short: with few tokens of context."""
    light: bool = False
    behind: bool = False
    """Quire's own environment lies behind this one: torch is large."""
    without: dict[str, str] = field(default_factory=dict)

    @property
    def pins(self) -> list[str]:
        """What is installed: names with versions."""
        return [*self.packages, *self.npm]

    @property
    def suffix(self) -> str:
        return ".mjs" if self.npm else ".py"

    def command(self, folder: Path) -> list[str]:
        """What runs the client's program, in the environment in `folder`."""
        return ["node"] if self.npm else [str(folder / "bin" / "python")]


def read_clients() -> dict[str, RealClient]:
    """The table of clients."""
    return {name: RealClient(name, **row) for name, row in tomllib.loads(TABLE.read_text()).items()}


def make_environment(client: RealClient, folder: Path) -> None:
    """Install `client` in `folder`, unless it is there. Raises `OSError` or `CalledProcessError`."""
    stamp = folder / _STAMP
    if stamp.exists() and stamp.read_text().splitlines() == client.pins:
        if client.behind:
            put_behind(folder)  # it may have been made for another checkout, which is gone
        return
    print(f"installing {', '.join(client.pins)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if client.npm:
        if shutil.which("npm") is None:
            raise FileNotFoundError(f"{client.title} needs node and npm, which are not installed")
        folder.mkdir(parents=True)
        quick = ("--no-audit", "--no-fund", "--fetch-retries", "1", "--fetch-timeout", "60000")
        _run("npm", "install", "--silent", *quick, "--prefix", str(folder), *client.npm)
    else:
        install_python(client, folder)
    stamp.write_text("\n".join(client.pins) + "\n")


def install_python(client: RealClient, folder: Path) -> None:
    """A virtual environment with the client's packages; by uv where it is installed, which takes seconds."""
    python = str(folder / "bin" / "python")
    pinned = ("-c", str(ROOT / "constraints.txt"), *client.packages)
    if shutil.which("uv") and not client.behind:
        _run("uv", "venv", "--quiet", "--python", sys.executable, str(folder))
        _run("uv", "pip", "install", "--quiet", "--python", python, *pinned)
        return
    venv.create(folder, with_pip=True)
    if client.behind:
        put_behind(folder)
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned)


def put_behind(folder: Path) -> None:
    """Let the environment in `folder` find Quire and its dependencies in this one."""
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_path("purelib")), ROOT / "src"
    (site / "behind.pth").write_text("\n".join(map(str, here)) + "\n")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main(folder: str, *names: str) -> int:
    """Make the environments of the clients `names`, by default of all. Returns 1 if one could not be made."""
    failed = 0
    for name, client in read_clients().items():
        if names and name not in names:
            continue
        try:
            make_environment(client, Path(folder) / name)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = 1
            print(f"{client.title}: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
