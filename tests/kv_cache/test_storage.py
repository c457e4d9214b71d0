"""KVCache: a block's bytes hold all that its keys and values are made of."""

import pytest
import torch

from quire.kernels import reference
from quire.kv_cache.storage import KVCache, StateCache
from quire.kv_groups import KVGroup
from quire.layer_spec import RecurrentSpec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_block_comes_back_as_it_was(dtype: torch.dtype) -> None:
    shapes = reference.kv_cache_shapes(4, 2, 8, 16, scaled=dtype == torch.int8)
    cache = KVCache(groups=[KVGroup("full", 0, (0, 1))], shapes=shapes, block_size=8, dtype=dtype)
    slots = torch.arange(32, dtype=torch.int32)
    for layer in cache.layers:
        reference.write_kv(torch.randn(32, 2, 16), torch.randn(32, 2, 16), layer, slots)
    content = torch.empty(cache.block_bytes, dtype=torch.uint8)
    cache.copy_out(1, content)
    cache.copy_in(3, content)
    for layer in cache.layers:
        for numbers in reference.stored_kv(layer, torch.float32):
            assert torch.equal(numbers[3], numbers[1])
            assert not torch.equal(numbers[3], numbers[2])


def test_a_state_comes_back_as_it_was() -> None:
    layer = RecurrentSpec(linears=(), num_channels=6, conv_width=4, num_heads=2, key_dim=3, value_dim=5)
    states = StateCache([layer, layer], 3)
    shapes = reference.kv_cache_shapes(4, 2, 8, 16)
    cache = KVCache(
        groups=[KVGroup("full", 0, (0, 1))], shapes=shapes, block_size=8, dtype=torch.float32, states=states
    )
    for part in states.layers:
        part.conv.normal_()
        part.recurrent.normal_()
    assert cache.num_bytes(4 + 1) == states.slot_bytes == 2 * 4 * (3 * 6 + 2 * 3 * 5)
    assert cache.num_bytes(3) == cache.block_bytes
    content = torch.empty(states.slot_bytes, dtype=torch.uint8)
    cache.copy_out(4 + 1, content)
    cache.copy_in(4 + 2, content)
    for part in states.layers:
        for numbers in (part.conv, part.recurrent):
            assert torch.equal(numbers[2], numbers[1])
            assert not torch.equal(numbers[2], numbers[0])


def test_few_tensors_enter_a_new_huge_page_at_once() -> None:
    huge_page = 2 << 20
    cache = KVCache(
        groups=[KVGroup("full", 0, tuple(range(12)))],
        shapes=((256, 8192), (256, 8192)),
        block_size=8,
        dtype=torch.float32,
    )
    starts = [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert all(start % 64 == 0 for start in starts)
    entered = [
        sum((start + block * 32768) // huge_page != (start + (block + 1) * 32768) // huge_page for start in starts)
        for block in range(1, 255)
    ]
    assert max(entered) <= 2
    assert sum(entered) >= 24 * 3
