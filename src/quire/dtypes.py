"""Bytes of an element in each type that weights and KV caches are stored in."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "int8": 1, "fp8_e4m3": 1}
FLOAT32_BYTES = 4
