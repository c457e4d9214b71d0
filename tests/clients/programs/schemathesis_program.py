"""schemathesis: requests made from /openapi.json, good ones and bad ones, to every route, and one after another.

Left out is the check that every body of the schema is answered: a prompt may be too long, a model unknown.
"""

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
ENDLESS = "/kv/stream"


def no_findings() -> None:
    command = [
        *(str(Path(sys.executable).with_name("st")), "run", f"{SERVER}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing,stateful", "--max-examples", "6", "--seed", "1"),
        *("--exclude-path", ENDLESS, "--continue-on-failure", "--no-shrink", "--warnings", "off"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


show(no_findings=no_findings)
