"""Every test of a kernel begins with scratch memory full of NaN, so that a read before a write shows."""

import pytest
import torch

from quire.kernels import cpu

WEIGHT = cpu.pack_linear([torch.ones(1, 8192)], "float32")
# All ones: NaN as float32, and each half as bfloat16.
NAN = torch.full((64, 8192), -1, dtype=torch.int32).view(torch.float32)


@pytest.fixture(autouse=True)
def used_scratch() -> None:
    cpu.linear(NAN, WEIGHT, None, 1)
