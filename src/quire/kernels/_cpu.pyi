from collections.abc import Sequence

from torch import Tensor

lora_tile: int
panel: int
pair_of_steps: int

Coded = tuple[Tensor, str, Sequence[float], Tensor, Tensor | None, bool, int, Tensor | None]
"""Codes, their kind and levels, scales, offsets, whether those are zero points, the size of a group, their order."""
Blocks = tuple[Sequence[Tensor], Sequence[str], bool, bool]
"""Rows and types of parts, and whether all inputs get both digits."""
Tokens = tuple[Tensor, Tensor, Tensor, str, float, float, int]
"""x, chosen experts, weights, gate, alpha and limit of a clamped one, inner size."""

Dense = tuple[Tensor, Tensor | None, tuple[Tensor, int, int, bool] | None]
"""Packed weight and bias; scales, bits, group and rotation where it is quantised."""
Norm = tuple[Tensor, Tensor | None, float]
PostNormLayer = tuple[Dense, Dense, Norm, Dense, Dense, Norm]

def supported_isas() -> list[str]: ...
def use_isa(isa: str) -> None: ...
def fault(isa: str, stand_in: str = ...) -> str | None: ...
def isa() -> str: ...
def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None: ...
def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor
) -> None: ...
def rms_norm_heads(x: Tensor, weight: Tensor, eps: float) -> None: ...
def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None: ...
def silu_and_mul(x: Tensor, out: Tensor) -> None: ...
def gelu_and_mul(x: Tensor, out: Tensor) -> None: ...
def gelu_tanh_and_mul(x: Tensor, out: Tensor) -> None: ...
def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor) -> None: ...
def copy_blocks(k_caches: list[Tensor], v_caches: list[Tensor | None], pairs: Tensor) -> None: ...
def pack_linear(weight: Tensor, packed: Tensor, first_row: int) -> None: ...
def linear(
    x: Tensor,
    op: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    packed: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def quantize_groups(x: Tensor, group_size: int, rotates: bool, bytes: Tensor, scales: Tensor) -> None: ...
def quantize_linear(
    weight: Tensor, packed: Tensor, scales: Tensor, bits: int, group_size: int, rotates: bool, first_row: int
) -> None: ...
def linear_quantized(
    x: Tensor,
    op: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    packed: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    rotates: bool,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def linear_coded(
    x: Tensor,
    op: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Coded,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def experts(
    tokens: Tokens,
    format: str,
    rotates: bool,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    gate_up_group: int,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    down_group: int,
    down_bias: Tensor | None,
    out: Tensor,
) -> None: ...
def experts_coded(
    tokens: Tokens, gate_up: Coded, gate_up_bias: Tensor | None, down: Coded, down_bias: Tensor | None, out: Tensor
) -> None: ...
def experts_blocks(
    tokens: Tokens, gate_up: Blocks, gate_up_bias: Tensor | None, down: Blocks, down_bias: Tensor | None, out: Tensor
) -> None: ...
def gather_rows(packed: Tensor, ids: Tensor, out: Tensor) -> None: ...
def gather_rows_quantized(
    packed: Tensor, scales: Tensor, bits: int, group_size: int, rotates: bool, ids: Tensor, out: Tensor
) -> None: ...
def linear_blocks(
    x: Tensor,
    op: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    rows: Sequence[Tensor],
    types: Sequence[str],
    both_digits: bool,
    interleaved: bool,
    bias: Tensor | None,
    out: Tensor,
) -> None: ...
def gather_rows_blocks(rows: Tensor, type: str, interleaved: bool, ids: Tensor, out: Tensor) -> None: ...
def interleave_blocks(rows: Tensor, type: str, out: Tensor) -> None: ...
def add_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    part_ends: Tensor,
    rows: Tensor,
    tiles: Tensor,
    out: Tensor,
) -> None: ...
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    work: Tensor,
    shared: Tensor,
    merges: Tensor,
    partials: Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    num_threads: int,
    out: Tensor,
) -> None: ...
def row_peaks(x: Tensor, peaks: Tensor, ids: Tensor) -> None: ...
def draw_tokens(
    x: Tensor,
    temperatures: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    uniforms: Tensor,
    peaks: Tensor,
    ids: Tensor,
) -> None: ...
def post_norm_layers(
    x: Tensor,
    layers: Sequence[PostNormLayer],
    num_heads: int,
    inner: int,
    activation: str,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int],
    scale: float,
    window: int,
    softcap: float,
) -> None: ...
