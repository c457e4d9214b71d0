// The Python face of the kernels, and the only file that sees nanobind.
//
// Every argument is checked here, once, with a ValueError that names what was expected and found; the kernels below
// trust their pointers.

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include "kernels.h"

namespace nb = nanobind;

namespace {

// DLPack's table of C functions, which a tensor type offers as `__dlpack_c_exchange_api__` (DLPack 1.3).
struct ExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    ExchangeApi* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*dltensor_from_py_object)(void* object, nb::dlpack::dltensor* out);
    void* current_work_stream;
};

const ExchangeApi* exchange_api_of(PyTypeObject* type) {
    static PyTypeObject* known_type = nullptr;  // guarded by the GIL
    static const ExchangeApi* known_api = nullptr;
    if (type == known_type) return known_api;
    auto* const owner = reinterpret_cast<PyObject*>(type);
    nb::object capsule = nb::steal(PyObject_GetAttrString(owner, "__dlpack_c_exchange_api__"));
    const auto* api = capsule.is_valid()
                          ? static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"))
                          : nullptr;
    PyErr_Clear();
    if (!api || api->version.major != 1 || !api->dltensor_from_py_object) return nullptr;
    known_type = type;
    known_api = api;
    return api;
}

// A view of a tensor that the caller holds for the length of a call. nb::ndarray would go through `__dlpack__`, Python
// code of a few microseconds for each of an operation's many arguments; the C table takes some 50 ns and cannot copy,
// which for a cache would lose what is written to it.
struct Tensor : nb::dlpack::dltensor {};

}  // namespace

template <>
struct nb::detail::type_caster<Tensor> {
    NB_TYPE_CASTER(Tensor, const_name("torch.Tensor"))

    bool from_python(handle source, uint32_t, cleanup_list*) noexcept {
        const ExchangeApi* api = exchange_api_of(Py_TYPE(source.ptr()));
        if (!api) return false;
        if (api->dltensor_from_py_object(source.ptr(), &value) == 0) return true;
        PyErr_Clear();
        return false;
    }

    static handle from_cpp(const Tensor&, rv_policy, cleanup_list*) noexcept = delete;
};

namespace {

using namespace quire;

const Kernels* kernels = supported_kernels()[0];

constexpr int64_t kAny = -1;

std::string list_text(const int64_t* numbers, size_t count) {
    std::string text = "[";
    for (size_t i = 0; i < count; ++i) {
        if (i) text += ", ";
        text += numbers[i] == kAny ? "any" : std::to_string(numbers[i]);
    }
    return text + "]";
}

std::string dtype_text(nb::dlpack::dtype dtype) {
    static const char* const names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    return dtype.code < 7 ? names[dtype.code] + std::to_string(dtype.bits) : "an 8-bit float";
}

// An argument on its way to being a pointer; each check returns it, so that they chain.
class Argument {
public:
    Argument(const char* name, const Tensor& tensor) : name_(name), tensor_(tensor) {
        if (tensor.device.device_type != nb::device::cpu::value) fail("a CPU tensor", "one on another device");
    }

    const Argument& of(nb::dlpack::dtype dtype) const {
        if (tensor_.dtype != dtype) fail(dtype_text(dtype), dtype_text(tensor_.dtype));
        return *this;
    }

    // kAny matches every size.
    const Argument& shaped(const std::vector<int64_t>& shape) const {
        bool matches = tensor_.ndim == int(shape.size());
        for (int i = 0; matches && i < tensor_.ndim; ++i) matches = shape[i] == kAny || shape[i] == tensor_.shape[i];
        if (!matches)
            fail("shape " + list_text(shape.data(), shape.size()), list_text(tensor_.shape, tensor_.ndim));
        return *this;
    }

    // All dimensions but the first `free` must lie next to each other; the strides of an empty tensor mean nothing.
    const Argument& contiguous(int free = 0) const {
        int64_t expected = 1;
        bool matches = true, empty = false;
        for (int i = tensor_.ndim; i-- > 0;) {
            matches = matches && (i < free || tensor_.shape[i] == 1 || tensor_.strides[i] == expected);
            empty = empty || tensor_.shape[i] == 0;
            expected *= tensor_.shape[i];
        }
        if (!matches && !empty)
            fail(free ? "contiguous rows" : "a contiguous tensor", "strides " + list_text(tensor_.strides, tensor_.ndim));
        return *this;
    }

    int64_t size(int dimension) const { return tensor_.shape[dimension]; }

    template <class T>
    T* pointer() const {
        return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
    }

    Rows rows() const { return {pointer<float>(), tensor_.strides[0]}; }

    nb::dlpack::dtype dtype() const { return tensor_.dtype; }

    [[noreturn]] void fail(const std::string& expected, const std::string& found) const {
        throw std::invalid_argument(std::string(name_) + ": expected " + expected + ", found " + found);
    }

private:
    const char* name_;
    const Tensor& tensor_;
};

const nb::dlpack::dtype kFloat32 = nb::dtype<float>(), kFloat64 = nb::dtype<double>(), kInt32 = nb::dtype<int32_t>();

const float* vector_of_floats(const char* name, const Tensor& tensor, int64_t size) {
    return Argument(name, tensor).of(kFloat32).shaped({size}).contiguous().pointer<float>();
}

const int32_t* vector_of_indices(const char* name, const Tensor& tensor, int64_t size) {
    return Argument(name, tensor).of(kInt32).shaped({size}).contiguous().pointer<int32_t>();
}

Element element_of(const Argument& argument) {
    const nb::dlpack::dtype dtype = argument.dtype();
    if (dtype == kFloat32) return Element::float32;
    if (dtype.code == uint8_t(nb::dlpack::dtype_code::Float) && dtype.bits == 16) return Element::float16;
    if (dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16) return Element::bfloat16;
    argument.fail("float32, float16 or bfloat16", dtype_text(dtype));
}

const nb::dlpack::dtype kInt8 = nb::dtype<int8_t>();

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

void rms_norm(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, float eps, const Tensor& out) {
    const Argument input("x", x), output("out", out);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), columns = input.size(1);
    output.of(kFloat32).shaped({rows, columns}).contiguous();
    const float* scale = vector_of_floats("weight", weight, columns);
    float* total = nullptr;
    if (residual) {
        const Argument sum("residual", *residual);
        total = sum.of(kFloat32).shaped({rows, columns}).contiguous().pointer<float>();
    }
    nb::gil_scoped_release release;
    kernels->rms_norm(input.rows(), total, scale, eps, output.pointer<float>(), rows, columns);
}

void rms_norm_heads(const Tensor& x, const Tensor& weight, float eps) {
    const Argument input("x", x);
    input.of(kFloat32).shaped({kAny, kAny, kAny}).contiguous(1);
    const float* scale = vector_of_floats("weight", weight, input.size(2));
    nb::gil_scoped_release release;
    kernels->rms_norm_heads(input.rows(), scale, eps, input.size(0), input.size(1), input.size(2));
}

void rotary(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin) {
    const Argument query("q", q), key("k", k), table("cos_sin", cos_sin);
    query.of(kFloat32).shaped({kAny, kAny, kAny}).contiguous(1);
    const int64_t tokens = query.size(0), head_dim = query.size(2);
    key.of(kFloat32).shaped({tokens, kAny, head_dim}).contiguous(1);
    table.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const int64_t rotary_dim = table.size(1);
    if (rotary_dim > head_dim || rotary_dim % 2)
        table.fail("an even number of columns, at most " + std::to_string(head_dim), std::to_string(rotary_dim));
    const int32_t* position = vector_of_indices("positions", positions, tokens);
    nb::gil_scoped_release release;
    for (const Argument& x : {query, key})
        kernels->rotary(x.rows(), position, table.pointer<float>(), rotary_dim, tokens, x.size(1), head_dim);
}

using Activation = void (*Kernels::*)(Rows, float*, int64_t, int64_t);

template <Activation activation>
void activate_and_mul(const Tensor& x, const Tensor& out) {
    const Argument output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const Argument input("x", x);
    input.of(kFloat32).shaped({output.size(0), 2 * output.size(1)}).contiguous(1);
    nb::gil_scoped_release release;
    (kernels->*activation)(input.rows(), output.pointer<float>(), output.size(0), output.size(1));
}

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

// Memory for the calling thread's next attention, kept from call to call so that no layer pays for fresh pages.
float* scratch_of(size_t floats) {
    constexpr std::align_val_t cache_line{64};
    struct Release {
        void operator()(float* p) const { ::operator delete(p, cache_line); }
    };
    thread_local std::unique_ptr<float, Release> area;
    thread_local size_t size = 0;
    if (size < floats) {
        area.reset();
        size = 0;
        area.reset(static_cast<float*>(::operator new(floats * sizeof(float), cache_line)));
        size = floats;
    }
    return area.get();
}

char* bytes_of_scratch(size_t bytes) { return reinterpret_cast<char*>(scratch_of((bytes + 3) / sizeof(float))); }

// Steps along k that a panel has room for.
int64_t packed_depth(Element element, int64_t k) { return element == Element::bfloat16 ? (k + 1) / 2 * 2 : k; }

void pack_linear(const Tensor& weight, const Tensor& packed, int64_t first_row) {
    const Argument source("weight", weight), target("packed", packed);
    source.shaped({kAny, kAny}).contiguous();
    target.shaped({kAny, packed_depth(element_of(target), source.size(1)), kPanel}).contiguous();
    if (first_row < 0 || first_row + source.size(0) > target.size(0) * kPanel)
        source.fail("rows " + std::to_string(first_row) + " to at most " + std::to_string(target.size(0) * kPanel),
                    std::to_string(source.size(0)) + " rows");
    const Element from = element_of(source), to = element_of(target);
    nb::gil_scoped_release release;
    kernels->pack_linear(source.pointer<void>(), from, source.size(0), source.size(1), target.pointer<void>(), to, first_row);
}

const char* const kInputOps[] = {"none", "rms_norm", "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"};  // as InputOp

InputOp input_op(const std::string& name) {
    const auto known = std::find(std::begin(kInputOps), std::end(kInputOps), name);
    if (known == std::end(kInputOps)) throw std::invalid_argument("op: no input is made by '" + name + "'");
    return InputOp(known - std::begin(kInputOps));
}

// The input [m, k] of a dense layer, made of x as `op` says; m and k are what x has.
LinearInput linear_input(const Tensor& x, const std::string& op, const std::optional<Tensor>& residual,
                         const std::optional<Tensor>& norm_weight, float eps, int64_t& m, int64_t& k) {
    LinearInput made{{}, input_op(op), nullptr, nullptr, eps};
    if (made.op == InputOp::clamped_swiglu) throw std::invalid_argument("op: clamped_swiglu gates experts only");
    const Argument input("x", x);
    made.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    m = input.size(0);
    k = input.size(1);
    if (made.op == InputOp::rms_norm) {
        if (!norm_weight) throw std::invalid_argument("norm_weight: expected one for rms_norm, found none");
        made.norm_weight = vector_of_floats("norm_weight", *norm_weight, k);
        if (residual)
            made.residual = Argument("residual", *residual).of(kFloat32).shaped({m, k}).contiguous().pointer<float>();
    } else if (made.op != InputOp::none) {
        if (k % 2) input.fail("two halves of columns", std::to_string(k));
        k /= 2;
    }
    return made;
}

void linear(const Tensor& x, const std::string& op, std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
            float eps, const Tensor& packed, std::optional<Tensor> bias, const Tensor& out) {
    Linear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    a.element = element_of(weight);
    weight.shaped({(a.n + kPanel - 1) / kPanel, packed_depth(a.element, a.k), kPanel}).contiguous();
    a.weight = weight.pointer<void>();
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    a.scratch = scratch_of(2 * a.m * a.k);
    nb::gil_scoped_release release;
    kernels->linear(a);
}

int64_t groups_of(int64_t k, int64_t group) { return (k + group - 1) / group; }

const nb::dlpack::dtype kUint8 = nb::dtype<uint8_t>();
const nb::dlpack::dtype kBfloat16{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

void check_group(int64_t group, int64_t k, bool rotates) {
    if (rotates && group != kRotated)
        throw std::invalid_argument("group_size: expected " + std::to_string(kRotated) +
                                    ", what a rotation mixes, found " + std::to_string(group));
    if (group < 1 || (group < k && group % 32))
        throw std::invalid_argument("group_size: expected a multiple of 32, or at least the " + std::to_string(k) +
                                    " inputs, found " + std::to_string(group));
}

// Checks the scales of groups [..., panels, groups, kPanel]: bfloat16, or with 4 bits pairs of bytes, with two more
// groups before each panel's that hold the units.
void check_scales(const Argument& scales, int bits, std::vector<int64_t> shape) {
    if (bits == 4) {
        shape[shape.size() - 2] += 2;
        shape.push_back(2);
    }
    scales.of(bits == 4 ? kUint8 : kBfloat16).shaped(shape).contiguous();
}

// Checks a packed low-bit weight of k inputs against its scales, and returns it.
LowBitWeight low_bit_weight(const Tensor& packed, const Tensor& scales, int bits, int64_t group, bool rotates, int64_t k) {
    const Argument weight("packed", packed), scale("scales", scales);
    if (bits != 8 && bits != 4) throw std::invalid_argument("bits: expected 8 or 4, found " + std::to_string(bits));
    if (k > kMostInputs)
        throw std::invalid_argument("weight: expected at most " + std::to_string(kMostInputs) + " inputs, found " +
                                    std::to_string(k));
    check_group(group, k, rotates);
    const int64_t pairs = (k + kPairOfSteps - 1) / kPairOfSteps;
    weight.of(kUint8).shaped({kAny, pairs, bits / 4, kPanel, 4}).contiguous();
    check_scales(scale, bits, {weight.size(0), groups_of(k, group), kPanel});
    const int64_t depth = pairs * kPairOfSteps;
    return {weight.pointer<uint8_t>(), scale.pointer<void>(), bits, std::min(group, depth), rotates, nullptr, 17 * depth + 256};
}

void quantize_groups(const Tensor& x, int64_t group, bool rotates, const Tensor& bytes, const Tensor& scales) {
    const Argument input("x", x), output("bytes", bytes), scale("scales", scales);
    input.of(kFloat32).shaped({kAny, kAny}).contiguous(1);
    const int64_t rows = input.size(0), k = input.size(1);
    output.of(kInt8).shaped({rows, (k + kPairOfSteps - 1) / kPairOfSteps * kPairOfSteps}).contiguous();
    check_group(group, k, rotates);
    scale.of(kFloat32).shaped({rows, groups_of(k, group)}).contiguous();
    nb::gil_scoped_release release;
    kernels->quantize_groups(input.rows(), rows, k, std::min(group, k), rotates, output.pointer<void>(), scale.pointer<float>());
}

void quantize_linear(const Tensor& weight, const Tensor& packed, const Tensor& scales, int bits, int64_t group,
                     bool rotates, int64_t first_row) {
    const Argument source("weight", weight), target("packed", packed);
    source.shaped({kAny, kAny}).contiguous();
    LowBitWeight to = low_bit_weight(packed, scales, bits, group, rotates, source.size(1));
    if (first_row < 0 || first_row + source.size(0) > target.size(0) * kPanel)
        source.fail("rows " + std::to_string(first_row) + " to at most " + std::to_string(target.size(0) * kPanel),
                    std::to_string(source.size(0)) + " rows");
    const Element from = element_of(source);
    to.scratch = reinterpret_cast<uint8_t*>(scratch_of(omp_get_max_threads() * to.scratch_bytes / sizeof(float)));
    nb::gil_scoped_release release;
    kernels->quantize_linear(source.pointer<void>(), from, source.size(0), source.size(1), to, first_row);
}

void linear_quantized(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                      std::optional<Tensor> norm_weight, float eps, const Tensor& packed, const Tensor& scales,
                      int bits, int64_t group, bool rotates, std::optional<Tensor> bias, const Tensor& out) {
    LowBitLinear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    const LowBitWeight checked = low_bit_weight(packed, scales, bits, group, rotates, a.k);
    Argument("packed", packed).shaped({(a.n + kPanel - 1) / kPanel, kAny, kAny, kAny, kAny});
    a.weight = checked.weight;
    a.scales = checked.scales;
    a.bits = bits;
    a.group = checked.group;
    a.rotates = rotates;
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    const int64_t row = (a.k + kPairOfSteps - 1) / kPairOfSteps * kPairOfSteps / 4;
    a.scratch = scratch_of(a.m * (row + 2 * groups_of(a.k, a.group)) + omp_get_max_threads() * (row + a.k));
    nb::gil_scoped_release release;
    kernels->linear_quantized(a);
}

const char* const kCodeKinds[] = {"table", "integers4", "integers8", "float8"};  // as CodeKind

// Codes, their kind and levels, scales, offsets, whether those are zero points, the size of a group, and the order of inputs.
using Coded = std::tuple<Tensor, std::string, std::vector<float>, Tensor, std::optional<Tensor>, bool, int64_t, std::optional<Tensor>>;

// Checks a coded weight of k inputs for n outputs; of experts, whose number is the first dimension, if `num_experts` is set.
CodedWeight coded_weight(const Coded& parts, int64_t n, int64_t k, std::optional<int64_t> num_experts = {}) {
    const auto& [codes, kind, levels, scales, offsets, zero_points, group, order] = parts;
    const auto shape = [&](std::vector<int64_t> of_one) {
        if (num_experts) of_one.insert(of_one.begin(), *num_experts);
        return of_one;
    };
    CodedWeight w{};
    const auto known = std::find(std::begin(kCodeKinds), std::end(kCodeKinds), kind);
    if (known == std::end(kCodeKinds)) throw std::invalid_argument("kind: no codes are called '" + kind + "'");
    w.kind = CodeKind(known - std::begin(kCodeKinds));
    const size_t num_levels = w.kind == CodeKind::table ? 16 : w.kind == CodeKind::float8 ? 0 : 1;
    if (levels.size() != num_levels)
        throw std::invalid_argument("levels: expected " + std::to_string(num_levels) + ", found " + std::to_string(levels.size()));
    if (w.kind == CodeKind::table) std::copy(levels.begin(), levels.end(), w.levels);
    else if (num_levels) w.zero = levels[0];
    if (group < 1 || (group < k && group % 8))
        throw std::invalid_argument("group_size: expected a multiple of 8, or at least the " + std::to_string(k) +
                                    " inputs, found " + std::to_string(group));
    const int64_t panels = (n + kPanel - 1) / kPanel;
    const int64_t words = w.kind == CodeKind::integers8 || w.kind == CodeKind::float8 ? 2 : 1;
    const Argument code("codes", codes), scale("scales", scales);
    w.codes = code.of(kUint8).shaped(shape({panels, (k + 7) / 8, words, kPanel, 4})).contiguous().pointer<uint8_t>();
    w.scale_element = element_of(scale);
    w.scales = scale.shaped(shape({panels, groups_of(k, group), kPanel})).contiguous().pointer<void>();
    if (offsets)
        w.offsets = Argument("offsets", *offsets).of(scale.dtype()).shaped(shape({panels, groups_of(k, group), kPanel})).contiguous().pointer<void>();
    w.zero_points = zero_points;
    w.group = std::min<int64_t>(group, (k + 7) / 8 * 8);
    return w;
}

void check_order(const int32_t* order, int64_t count, int64_t k) {
    for (int64_t i = 0; i < count; ++i)
        if (order[i] < 0 || order[i] >= k)
            throw std::invalid_argument("order: expected inputs below " + std::to_string(k) + ", found " + std::to_string(order[i]));
}

void linear_coded(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                  std::optional<Tensor> norm_weight, float eps, const Coded& weight, std::optional<Tensor> bias,
                  const Tensor& out) {
    CodedLinear a{};
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    const Argument output("out", out);
    output.of(kFloat32).shaped({a.m, kAny}).contiguous();
    a.n = output.size(1);
    a.weight = coded_weight(weight, a.n, a.k);
    if (const auto& order = std::get<7>(weight)) {
        a.order = vector_of_indices("order", *order, a.k);
        check_order(a.order, a.k, a.k);
    }
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    a.out = output.pointer<float>();
    if (a.m == 0) return;
    a.scratch = scratch_of(2 * a.m * a.k);
    nb::gil_scoped_release release;
    kernels->linear_coded(a);
}

// Indices of rows of a packed weight; checks that all of them exist.
const int32_t* row_ids(const Tensor& ids, const Argument& packed, int64_t count) {
    const int32_t* id = vector_of_indices("ids", ids, count);
    for (int64_t i = 0; i < count; ++i)
        if (id[i] < 0 || id[i] >= packed.size(0) * kPanel)
            throw std::invalid_argument("ids: expected rows 0 to " + std::to_string(packed.size(0) * kPanel - 1) +
                                        ", found " + std::to_string(id[i]));
    return id;
}

void gather_rows(const Tensor& packed, const Tensor& ids, const Tensor& out) {
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const Element element = element_of(weight);
    weight.shaped({kAny, packed_depth(element, output.size(1)), kPanel}).contiguous();
    const int32_t* id = row_ids(ids, weight, output.size(0));
    nb::gil_scoped_release release;
    kernels->gather_rows(weight.pointer<void>(), element, output.size(1), id, output.size(0), output.pointer<float>());
}

void gather_rows_quantized(const Tensor& packed, const Tensor& scales, int bits, int64_t group, bool rotates, const Tensor& ids,
                           const Tensor& out) {
    const Argument weight("packed", packed), output("out", out);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const LowBitWeight from = low_bit_weight(packed, scales, bits, group, rotates, output.size(1));
    const int32_t* id = row_ids(ids, weight, output.size(0));
    nb::gil_scoped_release release;
    kernels->gather_rows_quantized(from, output.size(1), id, output.size(0), output.pointer<float>());
}

const std::pair<const char*, BlockType> kBlockTypes[] = {
    {"Q4_0", BlockType::q4_0}, {"Q4_1", BlockType::q4_1}, {"Q5_0", BlockType::q5_0},     {"Q5_1", BlockType::q5_1},
    {"Q8_0", BlockType::q8_0}, {"Q2_K", BlockType::q2_k}, {"Q3_K", BlockType::q3_k},     {"Q4_K", BlockType::q4_k},
    {"Q5_K", BlockType::q5_k}, {"Q6_K", BlockType::q6_k}, {"IQ4_NL", BlockType::iq4_nl}, {"IQ4_XS", BlockType::iq4_xs},
    {"MXFP4", BlockType::mxfp4}};

// Numbers and bytes of a block of a type.
std::pair<int64_t, int64_t> sizes_of_block(BlockType type) {
    switch (type) {
        case BlockType::q4_0: case BlockType::iq4_nl: return {32, 18};
        case BlockType::q4_1: return {32, 20};
        case BlockType::q5_0: return {32, 22};
        case BlockType::q5_1: return {32, 24};
        case BlockType::q8_0: return {32, 34};
        case BlockType::q2_k: return {256, 84};
        case BlockType::q3_k: return {256, 110};
        case BlockType::q4_k: return {256, 144};
        case BlockType::q5_k: return {256, 176};
        case BlockType::q6_k: return {256, 210};
        case BlockType::iq4_xs: return {256, 136};
        case BlockType::mxfp4: break;
    }
    return {32, 17};
}

// Checks rows of blocks of k numbers, and returns them; of experts, whose number is the first dimension, if `num_experts`
// is set, those of the first one.
BlockPart block_part(const Tensor& rows, const std::string& type_name, int64_t k, std::optional<int64_t> num_experts = {}) {
    const Argument blocks("rows", rows);
    const auto* known = std::find_if(std::begin(kBlockTypes), std::end(kBlockTypes),
                                     [&](const auto& each) { return each.first == type_name; });
    if (known == std::end(kBlockTypes)) throw std::invalid_argument("type: expected one of GGUF's, found " + type_name);
    const auto [numbers, bytes] = sizes_of_block(known->second);
    if (k % numbers) throw std::invalid_argument("x: expected a multiple of " + std::to_string(numbers) +
                                                 " columns for " + type_name + ", found " + std::to_string(k));
    const int64_t row_bytes = k / numbers * bytes;
    blocks.of(kUint8);
    if (num_experts) blocks.shaped({*num_experts, kAny, row_bytes}).contiguous();
    else blocks.shaped({kAny, row_bytes}).contiguous();
    return {blocks.pointer<uint8_t>(), row_bytes, blocks.size(num_experts ? 1 : 0), known->second};
}

void linear_blocks(const Tensor& x, const std::string& op, std::optional<Tensor> residual,
                   std::optional<Tensor> norm_weight, float eps, const std::vector<Tensor>& rows,
                   const std::vector<std::string>& types, bool both_digits, std::optional<Tensor> bias, const Tensor& out) {
    BlockLinear a{};
    a.both_digits = both_digits;
    a.x = linear_input(x, op, residual, norm_weight, eps, a.m, a.k);
    if (rows.empty() || rows.size() != types.size()) throw std::invalid_argument("rows: expected one for each type");
    std::vector<BlockPart> parts;
    for (size_t i = 0; i < rows.size(); ++i) {
        parts.push_back(block_part(rows[i], types[i], a.k));
        a.n += parts.back().num_rows;
    }
    a.parts = parts.data();
    a.num_parts = int64_t(parts.size());
    a.out = Argument("out", out).of(kFloat32).shaped({a.m, a.n}).contiguous().pointer<float>();
    a.bias = bias ? vector_of_floats("bias", *bias, a.n) : nullptr;
    if (a.m == 0) return;
    a.scratch = bytes_of_scratch(kernels->blocks_scratch(a.m, a.k));
    nb::gil_scoped_release release;
    kernels->linear_blocks(a);
}

void gather_rows_blocks(const Tensor& rows, const std::string& type_name, const Tensor& ids, const Tensor& out) {
    const Argument output("out", out), blocks("rows", rows), wanted("ids", ids);
    output.of(kFloat32).shaped({kAny, kAny}).contiguous();
    const int64_t k = output.size(1), count = output.size(0);
    const BlockPart from = block_part(rows, type_name, k);
    const int32_t* id = wanted.of(kInt32).shaped({count}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < count; ++i)
        if (id[i] < 0 || id[i] >= from.num_rows)
            wanted.fail("ids of 0 to " + std::to_string(from.num_rows - 1), std::to_string(id[i]));
    char* const scratch = bytes_of_scratch(kernels->gather_scratch(k));
    nb::gil_scoped_release release;
    kernels->gather_rows_blocks(from, k, id, count, output.pointer<float>(), scratch);
}

const char* const kExpertFormats[] = {"float32", "float16", "bfloat16", "int8", "int4"};  // as ExpertFormat

const float* bias_of_experts(const std::optional<Tensor>& bias, int64_t num_experts, int64_t n) {
    return bias ? Argument("bias", *bias).of(kFloat32).shaped({num_experts, n}).contiguous().pointer<float>() : nullptr;
}

// The dense layer [n, k] of every expert, packed as `format` says.
ExpertLinear expert_linear(const char* name, ExpertFormat format, int64_t num_experts, int64_t n, int64_t k,
                           const Tensor& packed, const std::optional<Tensor>& scales, int64_t group, bool rotates,
                           const std::optional<Tensor>& bias) {
    const Argument weight(name, packed);
    const int64_t panels = (n + kPanel - 1) / kPanel, pairs = (k + kPairOfSteps - 1) / kPairOfSteps;
    ExpertLinear layer{};
    layer.weight = weight.pointer<char>();
    layer.group = std::min(group, pairs * kPairOfSteps);
    layer.rotates = rotates;
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    if (format <= ExpertFormat::bfloat16) {
        const Element element = element_of(weight);
        if (int(element) != int(format)) weight.fail(kExpertFormats[int(format)], dtype_text(weight.dtype()));
        weight.shaped({num_experts, panels, packed_depth(element, k), kPanel}).contiguous();
        layer.weight_bytes = panels * packed_depth(element, k) * kPanel * weight.dtype().bits / 8;
        return layer;
    }
    const int bits = format == ExpertFormat::bits8 ? 8 : 4;
    if (k > kMostInputs) weight.fail("at most " + std::to_string(kMostInputs) + " inputs", std::to_string(k));
    if (group < 1 || (group < k && group % 32))
        weight.fail("groups of a multiple of 32 inputs, or one of all",
                    std::to_string(k) + " inputs in groups of " + std::to_string(group));
    weight.of(kUint8).shaped({num_experts, panels, pairs, bits / 4, kPanel, 4}).contiguous();
    if (!scales) weight.fail("scales", "none");
    const Argument scale("scales", *scales);
    check_scales(scale, bits, {num_experts, panels, groups_of(k, group), kPanel});
    layer.weight_bytes = panels * pairs * bits / 4 * kPanel * 4;
    layer.scales = scale.pointer<char>();
    layer.scale_bytes = panels * kPanel * (2 * groups_of(k, group) + (bits == 4 ? 4 : 0));
    return layer;
}

// The same of codes.
ExpertLinear coded_experts(const Coded& weight, int64_t num_experts, int64_t n, int64_t k, const std::optional<Tensor>& bias) {
    ExpertLinear layer{};
    layer.coded = coded_weight(weight, n, k, num_experts);
    const int64_t panels = (n + kPanel - 1) / kPanel;
    const bool bytes = layer.coded.kind == CodeKind::integers8 || layer.coded.kind == CodeKind::float8;
    layer.weight_bytes = panels * ((k + 7) / 8) * (bytes ? 8 : 4) * kPanel;
    layer.scale_bytes = panels * groups_of(k, std::get<6>(weight)) * kPanel * Argument("scales", std::get<3>(weight)).dtype().bits / 8;
    if (const auto& order = std::get<7>(weight)) {
        layer.order = Argument("order", *order).of(kInt32).shaped({num_experts, k}).contiguous().pointer<int32_t>();
        check_order(layer.order, num_experts * k, k);
    }
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    return layer;
}

// Rows of blocks [experts, rows, bytes] of every part, the types of the parts, and whether all inputs get both digits.
using Blocks = std::tuple<std::vector<Tensor>, std::vector<std::string>, bool>;

// The same of blocks. `parts` keeps what the layer points to.
ExpertLinear block_experts(const Blocks& weight, int64_t num_experts, int64_t n, int64_t k, const std::optional<Tensor>& bias,
                           std::vector<BlockPart>& parts) {
    const auto& [rows, types, both_digits] = weight;
    if (rows.empty() || rows.size() != types.size()) throw std::invalid_argument("rows: expected one for each type");
    int64_t num_rows = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        parts.push_back(block_part(rows[i], types[i], k, num_experts));
        num_rows += parts.back().num_rows;
    }
    if (num_rows != n) Argument("rows", rows[0]).fail(std::to_string(n) + " rows in all", std::to_string(num_rows));
    ExpertLinear layer{};
    layer.parts = parts.data();
    layer.num_parts = int64_t(parts.size());
    layer.both_digits = both_digits;
    layer.n = n;
    layer.k = k;
    layer.bias = bias_of_experts(bias, num_experts, n);
    return layer;
}

// x, chosen, weights, gate, alpha, limit and the inner size.
using ExpertArguments = std::tuple<Tensor, Tensor, Tensor, std::string, float, float, int64_t>;

// Everything but the weights.
Experts experts_of(const ExpertArguments& arguments, int64_t num_experts, const Tensor& out) {
    const auto& [x, chosen, weights, gate, alpha, limit, inner] = arguments;
    Experts a{};
    const Argument input("x", x), ids("chosen", chosen), weight("weights", weights), output("out", out);
    a.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    a.tokens = input.size(0);
    a.num_active = ids.of(kInt32).shaped({a.tokens, kAny}).contiguous().size(1);
    a.chosen = ids.pointer<int32_t>();
    a.weights = weight.of(kFloat32).shaped({a.tokens, a.num_active}).contiguous().pointer<float>();
    a.out = output.of(kFloat32).shaped({a.tokens, input.size(1)}).contiguous(1).rows();
    a.gate = input_op(gate);
    if (a.gate <= InputOp::rms_norm) throw std::invalid_argument("gate: '" + gate + "' is none");
    a.alpha = alpha;
    a.limit = limit;
    if (inner < 1) throw std::invalid_argument("inner: expected at least 1, found " + std::to_string(inner));
    a.num_experts = num_experts;
    for (int64_t i = 0; i < a.tokens * a.num_active; ++i)
        if (a.chosen[i] < 0 || a.chosen[i] >= a.num_experts)
            ids.fail("experts 0 to " + std::to_string(a.num_experts - 1), std::to_string(a.chosen[i]));
    return a;
}

void run_experts(Experts& a) {
    nb::gil_scoped_release release;
    constexpr std::align_val_t cache_line{64};
    struct Release {
        void operator()(void* p) const { ::operator delete(p, cache_line); }
    };
    const std::unique_ptr<void, Release> scratch(::operator new(kernels->experts_scratch(a), cache_line));
    a.scratch = static_cast<char*>(scratch.get());
    kernels->experts(a);
}

void experts(const ExpertArguments& arguments, const std::string& format, bool rotates, const Tensor& gate_up,
             std::optional<Tensor> gate_up_scales, int64_t gate_up_group, std::optional<Tensor> gate_up_bias,
             const Tensor& down, std::optional<Tensor> down_scales, int64_t down_group, std::optional<Tensor> down_bias,
             const Tensor& out) {
    const auto known = std::find(std::begin(kExpertFormats), std::end(kExpertFormats), format);
    if (known == std::end(kExpertFormats)) throw std::invalid_argument("format: no experts are stored as '" + format + "'");
    Experts a = experts_of(arguments, Argument("gate_up", gate_up).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    a.format = ExpertFormat(known - std::begin(kExpertFormats));
    a.gate_up = expert_linear("gate_up", a.format, a.num_experts, 2 * inner, hidden, gate_up, gate_up_scales, gate_up_group,
                              rotates, gate_up_bias);
    a.down = expert_linear("down", a.format, a.num_experts, hidden, inner, down, down_scales, down_group, rotates, down_bias);
    run_experts(a);
}

void experts_coded(const ExpertArguments& arguments, const Coded& gate_up, std::optional<Tensor> gate_up_bias,
                   const Coded& down, std::optional<Tensor> down_bias, const Tensor& out) {
    Experts a = experts_of(arguments, Argument("gate_up", std::get<0>(gate_up)).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    a.format = ExpertFormat::coded;
    a.gate_up = coded_experts(gate_up, a.num_experts, 2 * inner, hidden, gate_up_bias);
    a.down = coded_experts(down, a.num_experts, hidden, inner, down_bias);
    run_experts(a);
}

void experts_blocks(const ExpertArguments& arguments, const Blocks& gate_up, std::optional<Tensor> gate_up_bias,
                    const Blocks& down, std::optional<Tensor> down_bias, const Tensor& out) {
    const std::vector<Tensor>& rows = std::get<0>(gate_up);
    if (rows.empty()) throw std::invalid_argument("rows: expected one for each type");
    Experts a = experts_of(arguments, Argument("rows", rows[0]).size(0), out);
    const int64_t inner = std::get<6>(arguments), hidden = Argument("out", out).size(1);
    std::vector<BlockPart> gate_up_parts, down_parts;
    a.format = ExpertFormat::blocks;
    a.gate_up = block_experts(gate_up, a.num_experts, 2 * inner, hidden, gate_up_bias, gate_up_parts);
    a.down = block_experts(down, a.num_experts, hidden, inner, down_bias, down_parts);
    run_experts(a);
}

void add_lora(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& ranks, const Tensor& part_ends,
              const Tensor& rows, const Tensor& tiles, const Tensor& out) {
    const Argument input("x", x), output("out", out), down("a", a), up("b", b), rank("ranks", ranks);
    const Argument ends("part_ends", part_ends), row("rows", rows), tile("tiles", tiles);
    Lora lora{};
    lora.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    lora.k = input.size(1);
    lora.out = output.of(kFloat32).shaped({kAny, kAny}).contiguous().pointer<float>();
    lora.n = output.size(1);
    lora.part_ends = ends.of(kInt32).shaped({kAny}).contiguous().pointer<int32_t>();
    lora.num_parts = ends.size(0);
    lora.a = down.of(kFloat32).shaped({kAny, lora.num_parts, kAny, lora.k}).contiguous().pointer<float>();
    const int64_t num_slots = down.size(0);
    lora.max_rank = down.size(2);
    lora.b = up.of(kFloat32).shaped({num_slots, lora.max_rank, lora.n}).contiguous().pointer<float>();
    lora.ranks = rank.of(kInt32).shaped({num_slots, lora.num_parts}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < num_slots * lora.num_parts; ++i)
        if (lora.ranks[i] < 0 || lora.ranks[i] > lora.max_rank)
            rank.fail("0 to " + std::to_string(lora.max_rank), std::to_string(lora.ranks[i]));
    for (int64_t part = 0, begin = 0; part < lora.num_parts; begin = lora.part_ends[part++])
        if (lora.part_ends[part] < begin || lora.part_ends[part] > lora.n)
            ends.fail("ascending columns up to " + std::to_string(lora.n), std::to_string(lora.part_ends[part]));
    lora.num_rows = input.size(0);
    lora.rows = row.of(kInt32).shaped({lora.num_rows}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < lora.num_rows; ++i)
        if (lora.rows[i] < 0 || lora.rows[i] >= output.size(0))
            row.fail("rows below " + std::to_string(output.size(0)), std::to_string(lora.rows[i]));
    lora.tiles = tile.of(kInt32).shaped({kAny, 3}).contiguous().pointer<LoraTile>();
    lora.num_tiles = tile.size(0);
    for (int64_t i = 0; i < lora.num_tiles; ++i) {
        const auto [slot, begin, end] = lora.tiles[i];
        if (slot < 0 || slot >= num_slots || begin < 0 || begin > end || end - begin > kLoraTile || end > lora.num_rows)
            tile.fail("slots below " + std::to_string(num_slots) + " and at most " + std::to_string(kLoraTile) +
                          " of " + std::to_string(lora.num_rows) + " rows",
                      "(" + std::to_string(slot) + ", " + std::to_string(begin) + ", " + std::to_string(end) + ")");
    }
    if (lora.num_rows == 0) return;
    lora.scratch = scratch_of(lora.num_rows * lora.num_parts * lora.max_rank);
    nb::gil_scoped_release release;
    kernels->add_lora(lora);
}

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

NB_MODULE(_cpu, m) {
    m.doc() = "Quire's CPU kernels; quire.kernels.cpu is their typed face.";
    m.def("supported_isas", &supported_isas);
    m.def("use_isa", &use_isa, nb::arg("isa"));
    m.def("fault", &fault, nb::arg("isa"), nb::arg("stand_in") = "");
    m.def("isa", [] { return kernels->isa; });
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"),
          nb::arg("out"));
    m.def("rms_norm_heads", &rms_norm_heads, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
    m.def("rotary", &rotary, nb::arg("q"), nb::arg("k"), nb::arg("positions"), nb::arg("cos_sin"));
    m.def("silu_and_mul", &activate_and_mul<&Kernels::silu_and_mul>, nb::arg("x"), nb::arg("out"));
    m.def("gelu_and_mul", &activate_and_mul<&Kernels::gelu_and_mul>, nb::arg("x"), nb::arg("out"));
    m.def("gelu_tanh_and_mul", &activate_and_mul<&Kernels::gelu_tanh_and_mul>, nb::arg("x"), nb::arg("out"));
    m.def("write_kv", &write_kv, nb::arg("k"), nb::arg("v"), nb::arg("k_cache"), nb::arg("v_cache").none(),
          nb::arg("slots"));
    m.def("copy_blocks", &copy_blocks, nb::arg("k_caches"), nb::arg("v_caches"), nb::arg("pairs"));
    m.def("pack_linear", &pack_linear, nb::arg("weight"), nb::arg("packed"), nb::arg("first_row"));
    m.def("linear", &linear, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(), nb::arg("norm_weight").none(),
          nb::arg("eps"), nb::arg("packed"), nb::arg("bias").none(), nb::arg("out"));
    m.def("quantize_groups", &quantize_groups, nb::arg("x"), nb::arg("group_size"), nb::arg("rotates"), nb::arg("bytes"),
          nb::arg("scales"));
    m.def("quantize_linear", &quantize_linear, nb::arg("weight"), nb::arg("packed"), nb::arg("scales"),
          nb::arg("bits"), nb::arg("group_size"), nb::arg("rotates"), nb::arg("first_row"));
    m.def("linear_coded", &linear_coded, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"));
    m.def("linear_quantized", &linear_quantized, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("packed"), nb::arg("scales"), nb::arg("bits"),
          nb::arg("group_size"), nb::arg("rotates"), nb::arg("bias").none(), nb::arg("out"));
    m.def("experts", &experts, nb::arg("tokens"), nb::arg("format"), nb::arg("rotates"), nb::arg("gate_up"),
          nb::arg("gate_up_scales").none(), nb::arg("gate_up_group"), nb::arg("gate_up_bias").none(), nb::arg("down"),
          nb::arg("down_scales").none(), nb::arg("down_group"), nb::arg("down_bias").none(), nb::arg("out"));
    m.def("experts_coded", &experts_coded, nb::arg("tokens"), nb::arg("gate_up"), nb::arg("gate_up_bias").none(),
          nb::arg("down"), nb::arg("down_bias").none(), nb::arg("out"));
    m.def("experts_blocks", &experts_blocks, nb::arg("tokens"), nb::arg("gate_up"), nb::arg("gate_up_bias").none(),
          nb::arg("down"), nb::arg("down_bias").none(), nb::arg("out"));
    m.def("gather_rows", &gather_rows, nb::arg("packed"), nb::arg("ids"), nb::arg("out"));
    m.def("gather_rows_quantized", &gather_rows_quantized, nb::arg("packed"), nb::arg("scales"), nb::arg("bits"),
          nb::arg("group_size"), nb::arg("rotates"), nb::arg("ids"), nb::arg("out"));
    m.def("linear_blocks", &linear_blocks, nb::arg("x"), nb::arg("op"), nb::arg("residual").none(),
          nb::arg("norm_weight").none(), nb::arg("eps"), nb::arg("rows"), nb::arg("types"),
          nb::arg("both_digits"), nb::arg("bias").none(), nb::arg("out"));
    m.def("gather_rows_blocks", &gather_rows_blocks, nb::arg("rows"), nb::arg("type"), nb::arg("ids"), nb::arg("out"));
    m.def("add_lora", &add_lora, nb::arg("x"), nb::arg("a"), nb::arg("b"), nb::arg("ranks"), nb::arg("part_ends"),
          nb::arg("rows"), nb::arg("tiles"), nb::arg("out"));
    m.attr("lora_tile") = kLoraTile;
    m.attr("panel") = kPanel;
    m.attr("pair_of_steps") = kPairOfSteps;
    m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache").none(),
          nb::arg("query_start_loc"), nb::arg("seq_lens"), nb::arg("block_tables"), nb::arg("work"),
          nb::arg("shared"), nb::arg("merges"), nb::arg("partials"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"),
          nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("num_threads"), nb::arg("out"));
    m.def("row_peaks", &row_peaks, nb::arg("x"), nb::arg("peaks"), nb::arg("ids"));
    m.def("draw_tokens", &draw_tokens, nb::arg("x"), nb::arg("temperatures"), nb::arg("min_p"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("uniforms"), nb::arg("peaks"), nb::arg("ids"));
}
