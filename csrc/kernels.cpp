// Every kernel for one instruction set. CMake compiles this file once per set, with QUIRE_ISA naming the set and the
// namespace; all code below lives in that namespace, so no two versions of a function can be mistaken by the linker.

#include "attention.h"
#include "coded_linear.h"
#include "draw.h"
#include "elementwise.h"
#include "embedding.h"
#include "experts.h"
#include "gguf_linear.h"
#include "kv_cache.h"
#include "linear.h"
#include "linear_low_bit.h"
#include "lora.h"
#include "quantize_weight.h"
#include "row_peaks.h"

#define QUIRE_NAME_OF(isa) #isa
#define QUIRE_NAME(isa) QUIRE_NAME_OF(isa)

namespace quire::QUIRE_ISA {

extern const Kernels kernels = {
    .isa = QUIRE_NAME(QUIRE_ISA),
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rms_norm_heads = rms_norm_heads,
    .rotary = rotary,
    .silu_and_mul = activate_and_mul<Silu>,
    .gelu_and_mul = activate_and_mul<Gelu>,
    .gelu_tanh_and_mul = activate_and_mul<GeluTanh>,
    .write_kv = write_kv,
    .pack_linear = pack_linear,
    .linear = linear,
    .quantize_groups = quantize_groups,
    .quantize_linear = quantize_linear,
    .linear_quantized = linear_quantized,
    .linear_coded = linear_coded,
    .experts_scratch = experts_scratch,
    .experts = experts,
    .gather_rows = gather_rows,
    .gather_rows_quantized = gather_rows_quantized,
    .blocks_scratch = blocks_scratch,
    .linear_blocks = linear_blocks,
    .gather_scratch = gather_scratch,
    .gather_rows_blocks = gather_rows_blocks,
    .add_lora = add_lora,
    .attention_scratch = attention_scratch,
    .attention = attention,
    .row_peaks = row_peaks,
    .draw_scratch = draw_scratch,
    .draw_tokens = draw_tokens,
};

}  // namespace quire::QUIRE_ISA
