"""schemathesis: requests made from /openapi.json, good ones and bad ones, to every route, and one after another.

Left out is the check that every body of the schema is answered: a prompt may be too long, a model unknown.
"""

import re
import subprocess
import sys
from pathlib import Path

from show import SERVER, show

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "negative_data_rejection",
    "ignored_auth",
)
LENIENT = "negative_data_rejection"
"""Left out of the phase that gives every field each wrong type: scalars are read as pydantic's lax mode reads them."""
ENDLESS = "/kv/stream"
EXAMPLES = 6
"""Requests made for each route, and sequences of requests. The phase of coverage makes a case for each field and kind
of wrong value. Both end after a known number of requests; a limit of time would cut them on a busy machine."""


def run(phases: str, checks: tuple[str, ...]) -> None:
    command = [
        *(str(Path(sys.executable).with_name("st")), "run", f"{SERVER}/openapi.json"),
        *("--checks", ",".join(checks), "--phases", phases, "--seed", "1"),
        *("--max-examples", str(EXAMPLES), "--exclude-path", ENDLESS),
        *("--continue-on-failure", "--no-shrink", "--warnings", "off"),
        *("--request-timeout", "600"),  # its own ten seconds are an error on a busy machine
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    selected, tested = re.findall(r"Selected: (\d+)/\d+\s+Tested: (\d+)", done.stdout)[0]
    assert selected == tested, f"{phases}: of {selected} operations {tested} were tested"


def no_findings() -> None:
    run("fuzzing,stateful", CHECKS)
    run("coverage", tuple(check for check in CHECKS if check != LENIENT))


show(no_findings=no_findings)
