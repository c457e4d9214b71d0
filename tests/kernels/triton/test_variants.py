"""Triton compiles a kernel anew for each variant of its arguments, and whoever sent the request waits. So no kernel may
depend on how many sequences or tokens a step has, but attention on the rows that its programs hold."""

import json
import os
import subprocess
import sys
from collections import defaultdict

SEVERAL = {
    "attention_kernel": 3,  # 16, 64 and 128 rows
    "rms_norm_kernel": 2,  # with and without a residual
    "rms_norm_heads_kernel": 2,  # queries and keys
}


def test_no_kernel_is_compiled_anew_for_another_batch() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.list_variants"],
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    variants = defaultdict(set)
    for line in run.stdout.splitlines():
        name, *variant = json.loads(line)
        variants[name].add(tuple(variant))
    assert variants.keys() > SEVERAL.keys()
    assert {name: len(found) for name, found in variants.items()} == {name: SEVERAL.get(name, 1) for name in variants}
