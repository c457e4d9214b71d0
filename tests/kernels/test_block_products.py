"""Dense layers of GGUF's blocks: the C++ kernels against the specification in float64, on every instruction set."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quire.kernels import cpu, reference
from quire.kernels.block_matrix import BlockMatrix, BlockWeight, interleaved_rows
from quire.kernels.blocks import dequantize
from tests.kernels.test_blocks import TYPES, random_matrix

NUM_INPUTS = 512


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


def rows(num_rows: int, num_inputs: int = NUM_INPUTS, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A few inputs are far larger than the others, as in real models.
    return torch.randn(num_rows, num_inputs, generator=generator) * torch.logspace(-1, 1, num_inputs)


def matrix_of(name: str, num_outputs: int, num_inputs: int = NUM_INPUTS, seed: int = 0) -> BlockMatrix:
    per_block = random_matrix(name, 1, 1).shape[1]
    return random_matrix(name, num_outputs, num_inputs // per_block, seed)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_multiplied(name: str, isa: str) -> None:
    weight, bias = cpu.pack_blocks([matrix_of(name, 7)]), torch.randn(7)
    x = rows(5)
    expected = reference.linear_quantized(x.double(), weight, bias.double(), 7)
    assert_alike(cpu.linear_quantized(x, weight, bias, 7), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K"])
def test_both_digits_of_all_inputs(name: str, isa: str) -> None:
    """Nearer to the floats by two orders than 8 bits; numbers that stand out have both digits anyway."""
    matrix, x = matrix_of(name, 9), rows(5)
    exact = x.double() @ dequantize(matrix).double().t()
    weights = BlockWeight((matrix,)), BlockWeight((matrix,), both_digits=True)
    for weight in weights:
        assert_alike(cpu.linear_quantized(x, weight, None, 9), reference.linear_quantized(x.double(), weight, None, 9))
    one, both = (
        (cpu.linear_quantized(x, weight, None, 9).double() - exact).norm() / exact.norm() for weight in weights
    )
    assert both < 1e-4 < one < 1e-2


def test_a_group_that_stands_out_has_a_second_digit(isa: str) -> None:
    """One large input among small ones costs the others of its group no bits, in that row alone."""
    matrix, x = matrix_of("Q8_0", 9), torch.randn(4, NUM_INPUTS)
    x[2, 70] = 1000.0
    exact = x.double() @ dequantize(matrix).double().t()
    weight = BlockWeight((matrix,))
    found = cpu.linear_quantized(x, weight, None, 9)
    without = exact[2] - 1000.0 * dequantize(matrix)[:, 70].double()
    error = (found[2].double() - 1000.0 * dequantize(matrix)[:, 70].double() - without).norm() / without.norm()
    assert error < 0.05  # 8 bits alone would leave 32 inputs in the noise of 1000 / 127
    assert torch.equal(found[[0, 1, 3]], cpu.linear_quantized(x[[0, 1, 3]], weight, None, 9))


@pytest.mark.parametrize("both_digits", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_a_rows_result_does_not_depend_on_its_batch(name: str, both_digits: bool, isa: str) -> None:
    weight, bias = BlockWeight((matrix_of(name, 21),), both_digits), torch.randn(21)
    x = rows(14)
    together = cpu.linear_quantized(x, weight, bias, 21)
    for count in (1, 2, 3, 5):
        assert torch.equal(cpu.linear_quantized(x[:count], weight, bias, 21), together[:count])
    assert torch.equal(cpu.linear_quantized(x[13:], weight, bias, 21), together[13:])


def test_codes_of_more_bits_or_with_a_sign_meet_exact_inputs() -> None:
    exact = {name for name in TYPES if cpu.pack_blocks([matrix_of(name, 1)]).both_digits}
    assert exact == {"Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS"}


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_gathered_as_they_are_dequantised(name: str, isa: str) -> None:
    matrix = matrix_of(name, 8)
    ids = torch.tensor([7, 0, 3, 3], dtype=torch.int32)
    found = cpu.gather_rows_quantized(cpu.pack_blocks([matrix]), ids, NUM_INPUTS)
    # A compiler may join the product and the sum of an offset.
    assert torch.allclose(found, dequantize(matrix.select_rows(ids)), rtol=1e-6, atol=1e-6)


def test_parts_of_several_types_lie_side_by_side(isa: str) -> None:
    matrices = [matrix_of("Q4_K", 6), matrix_of("Q6_K", 3, seed=1), matrix_of("Q8_0", 5, seed=2)]
    x, bias = rows(3), torch.randn(14)
    weight = cpu.pack_blocks(matrices)
    assert weight.both_digits, "a part that needs exact inputs decides for all"
    whole = cpu.linear_quantized(x, weight, bias, 14)
    each = [BlockWeight((matrix,), both_digits=True) for matrix in matrices]
    parts = [cpu.linear_quantized(x, one, None, one.parts[0].shape[0]) for one in each]
    assert torch.equal(whole, torch.cat(parts, dim=1) + bias)


def test_a_norm_and_a_gate_may_come_before(isa: str) -> None:
    weight = cpu.pack_blocks([matrix_of("Q4_0", 6), matrix_of("Q5_1", 6)])
    x, residual, norm = rows(3), rows(3, seed=4), torch.rand(NUM_INPUTS)
    expected_residual = residual.double()
    expected = reference.rms_norm_linear(expected_residual, x.double(), norm.double(), 1e-6, weight, None, 12)
    assert_alike(cpu.rms_norm_linear(residual, x, norm, 1e-6, weight, None, 12), expected)
    assert torch.allclose(residual.double(), expected_residual)
    gated = rows(3, 2 * NUM_INPUTS)
    expected = reference.glu_linear(gated.double(), "silu", weight, None, 12)
    assert_alike(cpu.glu_linear(gated, "silu", weight, None, 12), expected)


def test_no_rows_and_one_output() -> None:
    weight = cpu.pack_blocks([matrix_of("Q4_1", 1)])
    assert cpu.linear_quantized(rows(0), weight, None, 1).shape == (0, 1)
    assert cpu.linear_quantized(rows(1), weight, None, 1).shape == (1, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_input_spoils_its_own_row_only(bad: float, isa: str) -> None:
    weight = cpu.pack_blocks([matrix_of("Q4_1", 5)])
    x = rows(3)
    expected = cpu.linear_quantized(x, weight, None, 5)
    x[1, 40] = bad
    found = cpu.linear_quantized(x, weight, None, 5)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_wrong_arguments_are_named() -> None:
    weight = cpu.pack_blocks([matrix_of("Q4_K", 4)])
    with pytest.raises(ValueError, match=r"x: expected a multiple of 256 columns for Q4_K, found 320"):
        cpu.linear_quantized(rows(1, 320), weight, None, 4)
    with pytest.raises(ValueError, match="rows"):
        cpu.linear_quantized(rows(1, 256), weight, None, 4)
    with pytest.raises(ValueError, match="ids"):
        cpu.gather_rows_quantized(weight, torch.tensor([4], dtype=torch.int32), NUM_INPUTS)
    with pytest.raises(ValueError, match="one of GGUF's, found Q9"):
        cpu.linear_quantized(rows(1), BlockWeight((BlockMatrix(torch.zeros(1, 1, dtype=torch.uint8), "Q9"),)), None, 1)


@pytest.mark.parametrize("both_digits", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_interleaved_rows_give_the_same_bits(name: str, both_digits: bool, isa: str) -> None:
    weight = BlockWeight((matrix_of(name, 40), matrix_of(name, 8, seed=1)), both_digits)
    interleaved = cpu.interleave_blocks(weight)
    x = rows(8)
    for count in (1, 2, 8):
        expected = cpu.linear_quantized(x[:count], weight, None, 48)
        assert torch.equal(cpu.linear_quantized(x[:count], interleaved, None, 48), expected)


@pytest.mark.parametrize("name", TYPES)
def test_interleaved_rows_are_the_files_bytes(name: str) -> None:
    matrix = matrix_of(name, 24)
    interleaved = cpu.interleave_blocks(BlockWeight((matrix,)))
    assert interleaved.interleaved
    assert torch.equal(interleaved.parts[0].rows, interleaved_rows(matrix))
    (again,) = interleaved.matrices()
    assert torch.equal(again.rows, matrix.rows)
    assert cpu.interleave_blocks(interleaved) is interleaved
    ids = torch.tensor([23, 15, 0, 8, 8, 16, 7], dtype=torch.int32)
    found = cpu.gather_rows_quantized(interleaved, ids, NUM_INPUTS)
    assert torch.equal(found, cpu.gather_rows_quantized(cpu.pack_blocks([matrix]), ids, NUM_INPUTS))


def test_rows_that_are_no_multiple_of_eight_stay_as_they_are() -> None:
    weight = cpu.pack_blocks([matrix_of("Q4_0", 16), matrix_of("Q4_0", 7)])
    assert cpu.interleave_blocks(weight) is weight
    with pytest.raises(ValueError, match=r"rows: expected a multiple of 8 interleaved rows, found 7"):
        cpu.linear_quantized(rows(1), replace(weight, interleaved=True), None, 23)


def test_interleaving_tells_what_it_has_copied() -> None:
    matrices, copied = [matrix_of("Q4_K", 16), matrix_of("Q6_K", 8)], list[int]()
    cpu.interleave_blocks(cpu.pack_blocks(matrices), done=lambda piece: copied.append(len(piece)))
    assert sum(copied) == 24
