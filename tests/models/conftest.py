from collections.abc import Iterator

import pytest

from quire.kernels import cpu


@pytest.fixture
def float_products() -> Iterator[None]:
    """Multiply bfloat16 weights by float32 inputs, so that results are exact to float32."""
    before = cpu.isa()
    if before == "avx512bf16":
        cpu.use_isa("avx512vnni")
    yield
    cpu.use_isa(before)
