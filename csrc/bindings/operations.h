// Operations that `post_norm.cpp` joins. Each checks its arguments and lets other threads of Python run meanwhile.
#pragma once

#include "argument.h"

namespace quire::bindings {

void linear(const Tensor& x, const std::string& op, std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
            float eps, const Tensor& packed, std::optional<Tensor> bias, const Tensor& out);
void linear_quantized(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                      std::optional<Tensor> norm_weight, float eps, const Tensor& packed, const Tensor& scales,
                      int bits, int64_t group, bool rotates, std::optional<Tensor> bias, const Tensor& out);
void layer_norm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, std::optional<Tensor> bias, float eps,
                const Tensor& out);
void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, std::optional<Tensor> v_cache,
              const Tensor& slots);
void paged_attention(const Tensor& q, const Tensor& k_cache, std::optional<Tensor> v_cache, const Tensor& query_start_loc,
                     const Tensor& seq_lens, const Tensor& block_tables, const Tensor& work, const Tensor& shared,
                     const Tensor& merges, const Tensor& partials, float scale, int64_t window, float softcap,
                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, int num_threads, const Tensor& out);

}  // namespace quire::bindings
