// The module `quire.kernels._cpu`: its operations, and the choice of the kernels' build.

#include "argument.h"

namespace quire::bindings {
namespace {

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* const* k = supported_kernels(); *k; ++k) names.emplace_back((*k)->isa);
    return names;
}

const Kernels& kernels_of(const std::string& isa) {
    for (const Kernels* const* k = supported_kernels(); *k; ++k)
        if (isa == (*k)->isa) return **k;
    throw std::invalid_argument("isa: '" + isa + "' is not one this CPU supports");
}

void use_isa(const std::string& isa) { kernels = &kernels_of(isa); }

// What the build gets wrong on this machine. `stand_in` puts something that does not work in the place of an operation,
// so that the test can be tested.
std::optional<std::string> fault(const std::string& isa, const std::string& stand_in) {
    Kernels tried = kernels_of(isa);
    if (stand_in == "linear") tried.linear = [](const Linear&) {};
    if (stand_in == "linear_quantized") tried.linear_quantized = [](const LowBitLinear&) {};
    if (stand_in == "experts") tried.experts = [](const Experts&) {};
    if (stand_in == "attention") tried.attention = [](const Attention&) {};
    if (stand_in == "illegal instruction") tried.linear = [](const Linear&) { __builtin_trap(); };
    nb::gil_scoped_release release;
    const char* found = fault_of(tried);
    return found ? std::optional<std::string>(found) : std::nullopt;
}

}  // namespace
}  // namespace quire::bindings

NB_MODULE(_cpu, m) {
    using namespace quire::bindings;
    m.doc() = "Quire's CPU kernels; quire.kernels.cpu is their typed face.";
    m.def("supported_isas", &supported_isas);
    m.def("use_isa", &use_isa, nb::arg("isa"));
    m.def("fault", &fault, nb::arg("isa"), nb::arg("stand_in") = "");
    m.def("isa", [] { return kernels->isa; });
    bind_elementwise(m);
    bind_attention(m);
    bind_linear(m);
    bind_experts(m);
    bind_lora(m);
    bind_post_norm(m);
    bind_sampling(m);
}
