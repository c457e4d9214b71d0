// Highest logits and drawn tokens.

#include <algorithm>
#include <memory>
#include <new>

#include <omp.h>

#include "argument.h"

namespace quire::bindings {
namespace {

void row_peaks(const Tensor& x, const Tensor& peaks, const Tensor& ids) {
    const Argument input("x", x), index("ids", ids);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), columns = input.size(1);
    if (columns == 0) input.fail("at least one column", "none");
    float* peak = Argument("peaks", peaks).of(kFloat32).shaped({rows}).contiguous().pointer<float>();
    int32_t* id = index.of(kInt32).shaped({rows}).contiguous().pointer<int32_t>();
    nb::gil_scoped_release release;
    kernels->row_peaks(input.rows(), rows, columns, peak, id);
}

void draw_tokens(const Tensor& x, const Tensor& temperatures, const Tensor& min_p, const Tensor& top_k,
                 const Tensor& top_p, const Tensor& uniforms, const Tensor& peaks, const Tensor& ids) {
    const Argument input("x", x);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), columns = input.size(1);
    if (columns == 0) input.fail("at least one column", "none");
    Draws draws{.logits = input.rows(), .rows = rows, .columns = columns};
    const auto row_of = [&](const char* name, const Tensor& tensor, nb::dlpack::dtype dtype) {
        return Argument(name, tensor).of(dtype).shaped({rows}).contiguous();
    };
    draws.temperatures = row_of("temperatures", temperatures, kFloat32).pointer<float>();
    draws.min_p = row_of("min_p", min_p, kFloat32).pointer<float>();
    draws.top_k = row_of("top_k", top_k, kInt32).pointer<int32_t>();
    draws.top_p = row_of("top_p", top_p, kFloat64).pointer<double>();
    draws.uniforms = row_of("uniforms", uniforms, kFloat64).pointer<double>();
    draws.peaks = row_of("peaks", peaks, kFloat32).pointer<float>();
    draws.ids = row_of("ids", ids, kInt32).pointer<int32_t>();
    nb::gil_scoped_release release;
    const int64_t num_threads = std::max<int64_t>(1, std::min<int64_t>(rows, omp_get_max_threads()));
    const std::unique_ptr<char[]> scratch(new char[num_threads * kernels->draw_scratch(columns)]);
    draws.scratch = scratch.get();
    kernels->draw_tokens(draws);
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("row_peaks", &row_peaks, nb::arg("x"), nb::arg("peaks"), nb::arg("ids"));
    m.def("draw_tokens", &draw_tokens, nb::arg("x"), nb::arg("temperatures"), nb::arg("min_p"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("uniforms"), nb::arg("peaks"), nb::arg("ids"));
}

}  // namespace quire::bindings
