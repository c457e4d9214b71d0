// Attention and the cache of keys and values.

#include <algorithm>

#include <omp.h>

#include "operations.h"

namespace quire::bindings {
namespace {

KVElement kv_element_of(const Argument& argument) {
    if (argument.dtype() == kInt8) return KVElement::int8;
    switch (element_of(argument)) {
        case Element::float32: return KVElement::float32;
        case Element::float16: return KVElement::float16;
        default: return KVElement::bfloat16;
    }
}

// Without `v_cache` the cache is latent, and the caller sets the width of its values.
KVCache kv_cache(const Tensor& k_cache, const std::optional<Tensor>& v_cache) {
    const Argument keys("k_cache", k_cache);
    keys.shaped({kAny, kAny, kAny, kAny}).contiguous();
    KVCache cache{keys.pointer<void>(), nullptr, kv_element_of(keys), keys.size(1), keys.size(2), 0, keys.size(3)};
    cache.head_dim -= cache.scale_rows();
    if (v_cache) {
        const Argument values("v_cache", *v_cache);
        values.of(keys.dtype()).shaped({keys.size(0), cache.num_kv_heads, cache.block_size, kAny}).contiguous();
        cache.values = values.pointer<void>();
        cache.value_dim = values.size(3);
    }
    for (const int64_t dim : {cache.head_dim, cache.value_dim})
        if (cache.element == KVElement::int8 && (dim % 4 || dim > kMostHeadDim))
            keys.fail("a head size that is a multiple of 4, at most " + std::to_string(kMostHeadDim) + ", for int8",
                      std::to_string(dim));
    return cache;
}

}  // namespace

void write_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, std::optional<Tensor> v_cache,
              const Tensor& slots) {
    const KVCache cache = kv_cache(k_cache, v_cache);
    const Argument key("k", k), value("v", v);
    key.of(kFloat32).shaped({kAny, cache.num_kv_heads, cache.head_dim}).contiguous(1);
    const int64_t tokens = key.size(0);
    if (!cache.latent()) value.of(kFloat32).shaped({tokens, cache.num_kv_heads, cache.value_dim}).contiguous(1);
    const int32_t* slot = vector_of_indices("slots", slots, tokens);
    nb::gil_scoped_release release;
    kernels->write_kv(key.rows(), value.rows(), cache, slot, tokens);
}

namespace {

void copy_blocks(const std::vector<Tensor>& k_caches, const std::vector<std::optional<Tensor>>& v_caches,
                 const Tensor& pairs) {
    if (k_caches.size() != v_caches.size()) throw std::invalid_argument("k_caches and v_caches: one of each per layer");
    std::vector<KVCache> caches;
    for (size_t layer = 0; layer < k_caches.size(); ++layer)
        caches.push_back(kv_cache(k_caches[layer], v_caches[layer]));
    for (const Tensor& cache : k_caches) {
        const Argument first("k_caches", k_caches[0]);
        Argument("k_caches", cache).of(first.dtype()).shaped({first.size(0), first.size(1), first.size(2), first.size(3)});
    }
    const Argument pair("pairs", pairs);
    pair.of(kInt32).shaped({kAny, 2}).contiguous();
    nb::gil_scoped_release release;
    copy_cache_blocks(caches.data(), caches.size(), pair.pointer<int32_t>(), pair.size(0));
}

}  // namespace

void paged_attention(const Tensor& q, const Tensor& k_cache, std::optional<Tensor> v_cache, const Tensor& query_start_loc,
                     const Tensor& seq_lens, const Tensor& block_tables, const Tensor& work, const Tensor& shared,
                     const Tensor& merges, const Tensor& partials, float scale, int64_t window, float softcap,
                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, int num_threads, const Tensor& out) {
    Attention a{};
    a.cache = kv_cache(k_cache, v_cache);
    const Argument query("q", q), output("out", out), items("plan.work", work), joins("plan.merges", merges);
    const Argument sharers("plan.shared", shared);
    const Argument tables("plan.block_tables", block_tables), scratch("plan.partials", partials);
    query.of(kFloat32).shaped({kAny, kAny, a.cache.head_dim}).contiguous(1);
    a.num_heads = query.size(1);
    if (a.num_heads % a.cache.num_kv_heads)
        query.fail("a multiple of " + std::to_string(a.cache.num_kv_heads) + " heads", std::to_string(a.num_heads));
    a.q = query.rows();
    if (a.cache.latent()) a.cache.value_dim = output.of(kFloat32).shaped({kAny, kAny, kAny}).size(2);
    if (a.cache.value_dim < 1 || (a.cache.latent() && a.cache.value_dim > a.cache.head_dim))
        output.fail("values of 1 to " + std::to_string(a.cache.head_dim) + " elements", std::to_string(a.cache.value_dim));
    output.of(kFloat32).shaped({query.size(0), a.num_heads, a.cache.value_dim}).contiguous();
    a.out = output.pointer<float>();

    tables.of(kInt32).shaped({kAny, kAny}).contiguous();
    a.block_tables = tables.pointer<int32_t>();
    a.block_table_stride = tables.size(1);
    a.query_start_loc = vector_of_indices("plan.query_start_loc", query_start_loc, tables.size(0) + 1);
    a.seq_lens = vector_of_indices("plan.seq_lens", seq_lens, tables.size(0));
    query.shaped({a.query_start_loc[tables.size(0)], a.num_heads, a.cache.head_dim});

    a.work = items.of(kInt32).shaped({kAny, 9}).contiguous().pointer<WorkItem>();
    a.num_work = items.size(0);
    a.shared = sharers.of(kInt32).shaped({kAny, 3}).contiguous().pointer<SharedToken>();
    a.merges = joins.of(kInt32).shaped({kAny, 4}).contiguous().pointer<Merge>();
    a.num_merges = joins.size(0);
    a.partials = scratch.of(kFloat32).shaped({kAny, a.cache.value_dim + 2}).contiguous().pointer<float>();

    a.scale = scale;
    a.softcap = softcap;
    a.window = window;
    a.alibi_slopes = alibi_slopes ? vector_of_floats("alibi_slopes", *alibi_slopes, a.num_heads) : nullptr;
    a.sinks = sinks ? vector_of_floats("sinks", *sinks, a.num_heads) : nullptr;
    a.num_threads = num_threads > 1 ? omp_get_max_threads() : 1;
    a.scratch = scratch_of(a.num_threads * kernels->attention_scratch(a));

    nb::gil_scoped_release release;
    kernels->attention(a);
}

void bind_attention(nb::module_& m) {
    m.def("write_kv", &write_kv, nb::arg("k"), nb::arg("v"), nb::arg("k_cache"), nb::arg("v_cache").none(),
          nb::arg("slots"));
    m.def("copy_blocks", &copy_blocks, nb::arg("k_caches"), nb::arg("v_caches"), nb::arg("pairs"));
    m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache").none(),
          nb::arg("query_start_loc"), nb::arg("seq_lens"), nb::arg("block_tables"), nb::arg("work"),
          nb::arg("shared"), nb::arg("merges"), nb::arg("partials"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"),
          nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("num_threads"), nb::arg("out"));
}

}  // namespace quire::bindings
