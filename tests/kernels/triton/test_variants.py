"""Triton compiles a kernel anew for each variant of its arguments, and whoever sent the request waits. So no kernel may
depend on how many sequences or tokens a step has, but attention on the rows that its programs hold."""

from collections import defaultdict

from tests.kernels.triton.compiler_run import run_with_compiler

SEVERAL = {
    "attention_kernel": 3,  # 16, 64 and 128 rows
    "rms_norm_kernel": 2,  # with and without a residual
    "rms_norm_heads_kernel": 2,  # queries and keys
}


def test_no_kernel_is_compiled_anew_for_another_batch() -> None:
    variants = defaultdict(set)
    for name, *variant in run_with_compiler("list_variants"):
        variants[name].add(tuple(variant))
    assert variants.keys() > SEVERAL.keys()
    assert {name: len(found) for name, found in variants.items()} == {name: SEVERAL.get(name, 1) for name in variants}
