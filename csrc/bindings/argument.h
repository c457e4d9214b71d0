// Tensors as arguments of operations. Every argument is checked once, with a ValueError that names what was expected and
// found; the kernels trust their pointers. Only the files of this folder see nanobind.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../kernels.h"

namespace nb = nanobind;

namespace quire::bindings {

// A view of a tensor that the caller holds for the length of a call. nb::ndarray would go through `__dlpack__`, Python
// code of a few microseconds for each of an operation's many arguments; the C table takes some 50 ns and cannot copy,
// which for a cache would lose what is written to it.
struct Tensor : nb::dlpack::dltensor {};

// Whether `object` is a tensor of torch; then its view.
bool view_tensor(PyObject* object, Tensor& view) noexcept;

}  // namespace quire::bindings

template <>
struct nb::detail::type_caster<quire::bindings::Tensor> {
    NB_TYPE_CASTER(quire::bindings::Tensor, const_name("torch.Tensor"))

    bool from_python(handle source, uint32_t, cleanup_list*) noexcept {
        return quire::bindings::view_tensor(source.ptr(), value);
    }

    static handle from_cpp(const quire::bindings::Tensor&, rv_policy, cleanup_list*) noexcept = delete;
};

namespace quire::bindings {

// The kernels in use.
extern const Kernels* kernels;

constexpr int64_t kAny = -1;

std::string list_text(const int64_t* numbers, size_t count);
std::string dtype_text(nb::dlpack::dtype dtype);

inline const nb::dlpack::dtype kFloat32 = nb::dtype<float>(), kFloat64 = nb::dtype<double>();
inline const nb::dlpack::dtype kInt8 = nb::dtype<int8_t>(), kInt32 = nb::dtype<int32_t>(), kUint8 = nb::dtype<uint8_t>();
inline const nb::dlpack::dtype kBfloat16{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

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

const float* vector_of_floats(const char* name, const Tensor& tensor, int64_t size);
const int32_t* vector_of_indices(const char* name, const Tensor& tensor, int64_t size);
Element element_of(const Argument& argument);

// Memory for the calling thread's next operation, kept from call to call so that no layer pays for fresh pages.
float* scratch_of(size_t floats);
char* bytes_of_scratch(size_t bytes);
// The same for what several operations pass on.
float* activations_of(size_t floats);

// Each adds the operations of its file to the module.
void bind_elementwise(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_lora(nb::module_& m);
void bind_post_norm(nb::module_& m);
void bind_sampling(nb::module_& m);

}  // namespace quire::bindings
