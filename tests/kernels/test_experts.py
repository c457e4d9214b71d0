"""Experts: the reference equals float64 written out, the C++ kernels equal the reference in every format, and a token's
result is the same bits in every batch."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quire.kernels import Kernels, cpu, kernels_for, reference
from quire.kernels.block_matrix import BlockMatrix, BlockWeight
from quire.kernels.coded import CodedMatrix
from quire.kernels.expert_forms import alike, form_of, in_floats, to_floats
from quire.kernels.interface import ExpertMatrices, ExpertMatrix, Mxfp4Matrix, PackedExperts
from quire.kernels.mxfp4 import dequantize
from quire.models.packed_weights import tensors_of
from quire.quantization import METHODS, WeightFormat
from quire.quantization.levels import integers
from tests.kernels.test_blocks import random_matrix

REFERENCE: Kernels = reference
CPU, SDPA = kernels_for("cpu"), kernels_for("sdpa")
FLOATS = ["float32", "float16", "bfloat16"]
FORMATS = [*FLOATS, "int8", "int4", "mxfp4", "mxfp4 of int8", "codes", "ordered codes", "blocks"]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""What e2m1 stands for, without its sign."""
ROUTES = {
    "one expert": (1, 1, 5, None),
    "all tokens to one": (4, 1, 40, 2),
    "experts without tokens": (9, 2, 3, None),
    "one token": (6, 3, 1, None),
    "17 tokens": (5, 2, 17, None),
    "no tokens": (3, 2, 0, None),
    "all experts": (3, 3, 9, None),
}
"""Experts, active ones, tokens, and the expert of all tokens if there is one."""


@pytest.fixture(params=cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa(before)


class Case:
    """Experts of one shape and tokens that are sent to them."""

    def __init__(self, num_experts: int, hidden: int, inner: int, stored: str, *, bias: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(num_experts + 1000 * hidden + inner)
        self.shape = num_experts, hidden, inner
        self.stored: str | WeightFormat = "float32"
        if stored in FLOATS:
            self.stored = stored
        elif stored in METHODS:
            self.stored = METHODS[stored].layers
        elif stored == "mxfp4 of int8":
            self.stored = METHODS["int8"].layers
        self.form = stored
        self.gate_up: ExpertMatrices
        self.down: ExpertMatrices
        if stored == "blocks":  # every part of a type of its own
            types = ("Q4_0", inner, hidden), ("Q8_0", inner, hidden), ("Q5_1", hidden, inner)
            gate, up, down = ([self.blocks(*each, seed) for seed in range(num_experts)] for each in types)
            self.gate_up, self.down = list(zip(gate, up, strict=True)), [[each] for each in down]
        else:
            matrix = self.mxfp4 if stored.startswith("mxfp4") else self.codes if "codes" in stored else self.floats
            self.gate_up = [self.joined(matrix(inner, hidden), matrix(inner, hidden)) for _ in range(num_experts)]
            self.down = [[matrix(hidden, inner)] for _ in range(num_experts)]
        self.biases = [self.floats(num_experts, width) if bias else None for width in (2 * inner, hidden)]

    def floats(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator) * 0.3

    def mxfp4(self, rows: int, columns: int) -> Mxfp4Matrix:
        def random(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=self.generator, dtype=torch.uint8)

        return Mxfp4Matrix(random(0, 256, rows, columns // 32, 16), random(120, 127, rows, columns // 32))

    def codes(self, rows: int, columns: int) -> CodedMatrix:
        codes = torch.randint(0, 16, (rows, columns), generator=self.generator, dtype=torch.uint8)
        scales, zeros = (torch.rand(rows, columns // 32, generator=self.generator) + 0.5 for _ in range(2))
        order = torch.randperm(columns, generator=self.generator) if self.form == "ordered codes" else None
        return CodedMatrix(codes, scales / 20, 32, integers(4, 8), zeros=zeros, order=order)

    @staticmethod
    def joined(gate: ExpertMatrix, up: ExpertMatrix) -> list[ExpertMatrix]:
        """Both of one order of inputs."""
        return [gate, replace(up, order=gate.order) if isinstance(up, CodedMatrix) else up]  # type: ignore[union-attr]

    @staticmethod
    def blocks(name: str, rows: int, columns: int, seed: int) -> BlockMatrix:
        return random_matrix(name, rows, columns // 32, seed)

    def packed(self, kernels: Kernels, gate: str = "silu") -> PackedExperts:
        gate_up, down = (kernels.pack_experts(matrices, self.stored) for matrices in (self.gate_up, self.down))
        num_experts, _, inner = self.shape
        return PackedExperts(gate_up, down, *self.biases, num_experts, inner, gate)

    def tokens(self, count: int, num_active: int, only: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x, chosen experts and their weights."""
        num_experts, hidden, _ = self.shape
        order = torch.rand(count, num_experts, generator=self.generator).argsort(1)[:, :num_active]
        chosen = order if only is None else torch.full((count, num_active), only)
        return self.floats(count, hidden), chosen.int(), torch.rand(count, num_active, generator=self.generator)


def run(kernels: Kernels, packed: PackedExperts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    out = torch.ones_like(x)  # what is there is added to
    kernels.experts(x, chosen, weights, packed, out)
    return out


def activate(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name in ("relu", "relu2"):
        return torch.where(gate > 0, gate, 0.0) ** (2 if name == "relu2" else 1) * up
    if name == "gelu":
        return gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def written_out(case: Case, name: str, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """In float64, token by token."""

    def matrices(stored: ExpertMatrices) -> list[Tensor]:
        return [torch.cat([to_floats(part).double() for part in parts]) for parts in stored]

    gate_up, down = matrices(case.gate_up), matrices(case.down)
    rows = []
    for row, ids, shares in zip(x.double(), chosen.tolist(), weights.double(), strict=True):
        out = torch.ones_like(row)
        for index, share in zip(ids, shares, strict=True):
            gate, up = (gate_up[index] @ row + (0 if case.biases[0] is None else case.biases[0][index])).chunk(2)
            inner = activate(name, gate, up)
            out = out + share * (down[index] @ inner + (0 if case.biases[1] is None else case.biases[1][index]))
        rows.append(out)
    return torch.stack(rows) if rows else x.double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / max(float(expected.double().norm()), 1.0))


@pytest.mark.parametrize("kernels", [REFERENCE, SDPA], ids=["reference", "sdpa"])
@pytest.mark.parametrize(
    ("stored", "tolerance"), [("float32", 1e-12), ("codes", 1e-12), ("mxfp4", 1e-4), ("blocks", 2e-2)]
)
@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_plain_pytorch_equals_float64(kernels: Kernels, stored: str, tolerance: float, gate: str) -> None:
    """But for the digits of rows that meet MXFP4 and blocks."""
    case = Case(5, 64, 96, stored)
    tokens = case.tokens(11, 3)
    x = tokens[0].mul_(20)  # some gates reach their clamps
    if kernels is REFERENCE:
        x = x.double()
    found = run(kernels, case.packed(kernels, gate), x, *tokens[1:])
    assert error(found, written_out(case, gate, *tokens)) < (tolerance if kernels is REFERENCE else 1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (37, 20)])
def test_sorted_pairs_equal_the_loop(route: str, hidden: int, inner: int) -> None:
    num_experts, num_active, count, only = ROUTES[route]
    case = Case(num_experts, hidden, inner, "float32")
    tokens = case.tokens(count, num_active, only)
    found, expected = (run(kernels, case.packed(kernels), *tokens) for kernels in (SDPA, REFERENCE))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stored", FORMATS)
def test_cpu_equals_the_reference(stored: str, route: str, isa: str) -> None:
    num_experts, num_active, count, only = ROUTES[route]
    case = Case(num_experts, 96, 64, stored)
    x, chosen, weights = case.tokens(count, num_active, only)
    found = run(CPU, case.packed(CPU), x, chosen, weights)
    if stored == "bfloat16" and isa == "avx512bf16":
        assert error(found, run(REFERENCE, case.packed(REFERENCE), x, chosen, weights)) < 1e-2  # rows are rounded
    else:
        # The last bit of an activation may round to another of 8 bits.
        rounded = not isinstance(case.stored, str) or stored == "blocks"
        # Sums of codes are made before their zero points are taken from them.
        tolerance = 2e-3 if rounded else 2e-5 if stored == "mxfp4" else 4e-6 if "codes" in stored else 1e-6
        assert error(found, run(REFERENCE, case.packed(REFERENCE), x, chosen, weights)) < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (33, 40), (40, 257), (100, 31), (300, 7)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8", "int4"])
def test_widths_that_fill_no_tile(stored: str, hidden: int, inner: int, bias: bool) -> None:
    case = Case(4, hidden, inner, stored, bias=bias)
    tokens = case.tokens(14, 2)
    ours, theirs = case.packed(CPU), case.packed(REFERENCE)
    rounded = stored == "bfloat16" and cpu.isa() == "avx512bf16"
    tolerance = 1e-2 if rounded else 3e-3 if stored in METHODS else 2e-6
    for gate in ACTIVATIONS:
        found = run(CPU, replace(ours, activation=gate), *tokens)
        assert error(found, run(REFERENCE, replace(theirs, activation=gate), *tokens)) < tolerance


@pytest.mark.parametrize("stored", FORMATS)
def test_a_token_is_the_same_in_every_batch(stored: str, isa: str) -> None:
    """Alone, in a batch, in another order, and with any number of threads."""
    case = Case(5, 96, 160, stored)
    x, chosen, weights = case.tokens(60, 3)
    packed = case.packed(CPU)
    together = run(CPU, packed, x, chosen, weights)
    for size in (1, 2, 7, 31):
        parts = [
            run(CPU, packed, *part) for part in zip(*(each.split(size) for each in (x, chosen, weights)), strict=True)
        ]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(60)
    assert torch.equal(run(CPU, packed, x[order], chosen[order], weights[order]), together[order])
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(run(CPU, packed, x, chosen, weights), together)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
def test_mxfp4_keeps_its_numbers(kernels: Kernels, isa: str) -> None:
    """The result of the floats that it stands for, every code included, but for rows of 15 bits."""
    case = Case(2, 64, 96, "mxfp4")
    blocks = torch.arange(256, dtype=torch.uint8).view(8, 2, 16).repeat(24, 1, 1)
    case.gate_up = [
        [Mxfp4Matrix(blocks[:96], torch.arange(192, dtype=torch.uint8).view(96, 2) // 4 + 90)] * 2,
        case.gate_up[1],
    ]
    plain = Case(2, 64, 96, "float32")
    plain.gate_up, plain.down = in_floats(case.gate_up), in_floats(case.down)
    plain.biases = case.biases
    tokens = case.tokens(9, 2)
    assert error(run(kernels, case.packed(kernels), *tokens), run(kernels, plain.packed(kernels), *tokens)) < 1e-4


def test_blocks_of_a_file_are_not_copied() -> None:
    """Experts that lie one after another in memory stay there; others are put together."""
    whole = random_matrix("Q8_0", 3 * 40, 2).rows.view(3, 40, -1)
    found = cpu.pack_experts([[BlockMatrix(rows, "Q8_0")] for rows in whole], "float32")
    assert isinstance(found, BlockWeight)
    assert found.parts[0].rows.data_ptr() == whole.data_ptr()
    assert torch.equal(found.parts[0].rows, whole)
    apart = cpu.pack_experts([[BlockMatrix(whole[index], "Q8_0")] for index in (2, 0, 1)], "float32")
    assert isinstance(apart, BlockWeight)
    assert torch.equal(apart.parts[0].rows, whole[[2, 0, 1]])


@pytest.mark.parametrize("count", [1, 17])
def test_interleaved_blocks_give_the_same_bits(count: int, isa: str) -> None:
    case = Case(5, 64, 96, "blocks")
    packed, tokens = case.packed(CPU), case.tokens(count, 2)
    assert isinstance(packed.gate_up, BlockWeight)
    assert isinstance(packed.down, BlockWeight)
    gate_up, down = cpu.interleave_blocks(packed.gate_up), cpu.interleave_blocks(packed.down)
    assert gate_up.interleaved
    interleaved = replace(packed, gate_up=gate_up, down=down)
    assert torch.equal(run(CPU, interleaved, *tokens), run(CPU, packed, *tokens))


def test_experts_that_no_one_form_holds_become_floats() -> None:
    """Other types in other experts, codes in one layer and floats in the other, codes in other orders."""
    case = Case(2, 64, 96, "ordered codes")
    mixed = [[case.blocks("Q8_0", 40, 64, 0)], [case.blocks("Q4_0", 40, 64, 1)]]
    assert form_of(mixed, "float32") == "floats"
    other_order = [[parts[0], case.codes(96, 64)] for parts in case.gate_up]
    assert form_of(other_order, "float32") == "floats"
    assert form_of(case.gate_up, "float32") == form_of(case.gate_up, METHODS["int8"].layers) == "codes"
    gate_up, down = alike(case.gate_up, Case(2, 64, 96, "float32").down, "float32")
    assert form_of(gate_up, "float32") == form_of(down, "float32") == "floats"
    assert form_of([[case.blocks("Q8_0", 40, 64, 0)]], METHODS["int8"].layers) == "floats"


def test_mxfp4_numbers() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes | (15 - codes) << 4).view(1, 1, 16)
    signed = NUMBERS + [-number for number in NUMBERS]
    for exponent in (0, 1, 126, 127, 130, 252):
        numbers = dequantize(Mxfp4Matrix(blocks, torch.full((1, 1), exponent, dtype=torch.uint8)))
        expected = [number for code in range(16) for number in (signed[code], signed[15 - code])]
        assert torch.equal(numbers.double(), torch.tensor([expected]).double() * 2.0 ** (exponent - 127))


def test_mxfp4_keeps_four_bits_and_a_quarter() -> None:
    weight = Case(3, 64, 96, "mxfp4").packed(CPU).gate_up
    assert isinstance(weight, BlockWeight)
    assert weight.nbytes == 3 * 192 * 64 * (4 + 8 / 32) / 8


def test_the_largest_sums_do_not_overflow(isa: str) -> None:
    """Words of 16 bits hold the sums of a block where every code and every input is the largest."""
    case = Case(1, 64, 64, "mxfp4 of int8", bias=False)
    for code in (0x77, 0xFF):
        largest = Mxfp4Matrix(
            torch.full((64, 2, 16), code, dtype=torch.uint8), torch.full((64, 2), 127, dtype=torch.uint8)
        )
        case.gate_up, case.down = [[largest, largest]], [[largest]]
        tokens = torch.ones(3, 64), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
        sign = 1 if code == 0x77 else 0  # relu
        expected = 1 + sign * 384.0 * 384.0 * 384.0
        torch.testing.assert_close(run(CPU, case.packed(CPU, "relu"), *tokens), torch.full((3, 64), expected))


def test_a_row_that_is_not_finite_leaves_others_alone(isa: str) -> None:
    for stored in ("float32", "int8", "mxfp4 of int8", "codes", "blocks"):
        case = Case(3, 64, 32, stored)
        x, chosen, weights = case.tokens(9, 2)
        clean = run(CPU, case.packed(CPU), x, chosen, weights)
        x[4, 3] = float("nan")
        found = run(CPU, case.packed(CPU), x, chosen, weights)
        assert found[4].isnan().all()
        assert torch.equal(found[torch.arange(9) != 4], clean[torch.arange(9) != 4])


def test_experts_are_packed_into_memory_of_the_caller() -> None:
    """One piece for all experts and each part of a weight, and no copy of them beside it."""
    for stored, num_parts in (("float32", 1), ("int8", 2), ("mxfp4", 1), ("codes", 3)):
        allocated: list[Tensor] = []

        def allocate(shape: object, *, dtype: torch.dtype, allocated: list[Tensor] = allocated) -> Tensor:
            allocated.append(torch.zeros(shape, dtype=dtype))  # type: ignore[call-overload]
            return allocated[-1]

        case = Case(4, 64, 32, stored)
        packed = cpu.pack_experts(case.gate_up, case.stored, allocate)
        parts = tensors_of(packed)
        assert [part.data_ptr() for part in parts] == [part.data_ptr() for part in allocated]
        assert len(parts) == num_parts
        assert all(len(part) == 4 for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 65)}, r"out: expected shape \[3, 65\], found \[3, 64\]"),
        ({"num_inner": 49}, r"bias: expected shape \[4, 98\], found \[4, 100\]"),
        ({"x": torch.zeros(3, 64).double()}, "x: expected float32, found float64"),
        ({"chosen": torch.full((3, 2), 4, dtype=torch.int32)}, "chosen: expected experts 0 to 3, found 4"),
        ({"chosen": torch.full((3, 2), -1, dtype=torch.int32)}, "chosen: expected experts 0 to 3, found -1"),
        ({"chosen": torch.zeros(3, 2, dtype=torch.int64)}, "chosen: expected int32, found int64"),
        ({"weights": torch.zeros(3, 1)}, r"weights: expected shape \[3, 2\], found \[3, 1\]"),
        ({"activation": "tanh"}, "op: no input is made by 'tanh'"),
        ({"activation": "rms_norm"}, "gate: 'rms_norm' is none"),
        ({"down_bias": torch.zeros(4, 63)}, r"bias: expected shape \[4, 64\], found \[4, 63\]"),
    ],
    ids=["width", "inner", "float64", "high", "low", "int64", "weights", "tanh", "norm", "bias"],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    case = Case(4, 64, 50, "float32")
    names = ("x", "chosen", "weights")
    tokens = dict(zip(names, case.tokens(3, 2), strict=True)) | {k: v for k, v in change.items() if k in names}
    packed = replace(case.packed(CPU), **{k: v for k, v in change.items() if k not in names})
    with pytest.raises(ValueError, match=message):
        cpu.experts(**tokens, experts=packed, out=torch.zeros(3, 64))
