"""The steps of deploy/Dockerfile, run in a chroot: no Docker is needed, but root, a Debian machine and a network.

`make test-deploy` sets QUIRE_TEST_IMAGE. The chroot is this machine's own root below an overlay, so nothing of it
changes. Unless QUIRE_TEST_IMAGE is `full`, the stage that compiles is left out, and a venv that borrows this one's
packages stands in for its result.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WANTED = os.environ.get("QUIRE_TEST_IMAGE", "")
PASSED = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT", "REQUESTS_CA")
"""Beginnings of the variables of this machine without which nothing can be fetched."""

pytestmark = pytest.mark.skipif(not WANTED or os.geteuid() != 0, reason="make test-deploy, as root")

MOUNTS = """
mkdir -p {0}/up {0}/work {0}/root
mount -t overlay overlay -o lowerdir=/,upperdir={0}/up,workdir={0}/work {0}/root
mount --rbind /dev {0}/root/dev
mount -t proc proc {0}/root/proc
cp -L /etc/resolv.conf {0}/root/etc/resolv.conf 2>/dev/null || true
mkdir -p {0}/root/usr/local/bin && ln -sf {1} {0}/root/usr/local/bin/python
for folder in {2}; do chmod a+x {0}/root$folder; done
"""
SERVED = """
mkdir -p {0}/data && cp -a {0}/root/data/. {0}/data && chown 10001:10001 {0}/data
mount --bind {0}/data {0}/root/data
mount -t tmpfs tmpfs {0}/root/tmp
mount -o remount,ro {0}/root
cd {0}/root
QUIRE_API_KEY=k QUIRE_THREADS=1 QUIRE_NUM_BLOCKS=64 chroot --userspec={1} . {2} &
server=$!
for second in $(seq 200); do
    sleep 1
    kill -0 $server || exit 3
    if chroot --userspec={1} . {3}; then healthy=yes; break; fi 2>/dev/null
done
echo "healthy: ${{healthy:-no}}"
chroot --userspec={1} . sh -c 'id -u; touch /x 2>&1; touch /data/x && echo written'
for second in $(seq 200); do
    chroot --userspec={1} . python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready')" \\
        2>/dev/null && break
    sleep 1
done
kill -TERM $server
wait $server
echo "status: $?"
"""
STAND_IN = """
mkdir -p {0}/root/opt
{1} -m venv --without-pip {0}/root/opt/quire
printf '/lent/packages\\n/lent/src\\n' > {0}/root/opt/quire/lib/python{2}/site-packages/borrowed.pth
printf '#!/opt/quire/bin/python\\nfrom quire.__main__ import main\\nmain()\\n' > {0}/root/opt/quire/bin/quire
chmod +x {0}/root/opt/quire/bin/quire
"""
LENT = """
mkdir -p {0}/root/lent/packages {0}/root/lent/src
mount --bind {1} {0}/root/lent/packages
mount --bind {2} {0}/root/lent/src
"""


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "deploy/Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = []
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest.strip()))
    return found


def script(instructions: list[tuple[str, str]], folder: str, built: str) -> tuple[str, dict[str, str], str]:
    """A stage as a shell script, with the variables and the work folder that it ends with."""
    lines, variables, at = list[str](), {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, "/"
    for name, rest in instructions:
        if name == "RUN":
            given = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
            lines.append(f"env {given} chroot {folder}/root sh -ec {shlex.quote(f'cd {at}; {rest}')}")
        elif name == "WORKDIR":
            at = rest
            lines.append(f"mkdir -p {folder}/root{at}")
        elif name == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            begin = f"{built}/root" if "--from=" in rest else f"{ROOT}/"
            target = target if target.startswith("/") else f"{at}/{target}"
            lines += [f"cp -a {begin}{source} {folder}/root{target}" for source in sources]
        elif name == "ENV":
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                variables[key] = value.replace("$PATH", variables["PATH"])
        elif name == "ARG":
            key, _, value = rest.partition("=")
            variables[key] = os.environ.get(key, value)
    return "\n".join(lines), variables, at


def test_the_steps_of_the_image(tmp_path: Path) -> None:
    build, final = stages()
    first, second = f"{tmp_path}/build", f"{tmp_path}/final"
    python = os.path.realpath(sys.executable)
    above = " ".join(str(folder) for folder in Path(python).parents)
    parts = ["set -e", MOUNTS.format(first, python, above)]
    if WANTED == "full":
        parts.append(script(build, first, "")[0])
    else:
        parts.append(STAND_IN.format(first, python, f"{sys.version_info[0]}.{sys.version_info[1]}"))
    steps, variables, at = script(final, second, first)
    last = dict(final)
    command = " ".join(json.loads(last["ENTRYPOINT"]))
    health = shlex.join(json.loads(last["HEALTHCHECK"].partition("CMD ")[2]))
    parts += [MOUNTS.format(second, python, above), steps]
    if WANTED != "full":
        parts.append(LENT.format(second, sysconfig.get_path("purelib"), ROOT / "src"))
    parts += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    parts.append(SERVED.format(second, last["USER"], command, health))
    kept = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(parts)],
        env={**kept, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert at == "/data"
    said = done.stdout.splitlines()
    assert "healthy: yes" in said
    assert "10001" in said
    assert any("Read-only file system" in line for line in said)
    assert "written" in said
    assert said[-1] == "status: 0"
