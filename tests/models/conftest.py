from collections.abc import Iterator

import pytest

from quire.kernels import cpu


@pytest.fixture
def float_products() -> Iterator[None]:
    """Inputs of bfloat16 weights are not rounded, so that what is computed is exact to float32."""
    before = cpu.isa()
    if before == "avx512bf16":
        cpu.use_isa("avx512vnni")
    yield
    cpu.use_isa(before)
