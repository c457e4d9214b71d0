"""Triton compiles a kernel anew for each variant of its arguments, and whoever sent the request waits. So no kernel may
depend on how many sequences or tokens a step has, but attention on the rows that its programs hold."""

import json
import os
import subprocess
import sys
from collections import defaultdict

EXPECTED = {
    "attention_kernel": 3,  # 16, 64 and 128 rows
    "merge_kernel": 1,
    "rms_norm_kernel": 2,  # with and without a residual
    "rms_norm_heads_kernel": 2,  # queries and keys
    "rotary_kv_kernel": 1,
    "gated_kernel": 1,
    "peaks_kernel": 1,
    "weights_kernel": 1,
    "sample_kernel": 1,
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
    assert {name: len(found) for name, found in variants.items()} == EXPECTED
