// Views of tensors, their texts in errors, and the scratch of operations.

#include "argument.h"

#include <memory>
#include <new>

namespace quire::bindings {
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

// Grows where it is too small.
class KeptMemory {
public:
    float* of(size_t floats) {
        if (size_ < floats) {
            area_.reset();
            size_ = 0;
            area_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kCacheLine)));
            size_ = floats;
        }
        return area_.get();
    }

private:
    static constexpr std::align_val_t kCacheLine{64};
    struct Release {
        void operator()(float* p) const { ::operator delete(p, kCacheLine); }
    };
    std::unique_ptr<float, Release> area_;
    size_t size_ = 0;
};

}  // namespace

const Kernels* kernels = supported_kernels()[0];

bool view_tensor(PyObject* object, Tensor& view) noexcept {
    const ExchangeApi* api = exchange_api_of(Py_TYPE(object));
    if (!api) return false;
    if (api->dltensor_from_py_object(object, &view) == 0) return true;
    PyErr_Clear();
    return false;
}

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

float* scratch_of(size_t floats) {
    thread_local KeptMemory memory;
    return memory.of(floats);
}

float* activations_of(size_t floats) {
    thread_local KeptMemory memory;
    return memory.of(floats);
}

char* bytes_of_scratch(size_t bytes) { return reinterpret_cast<char*>(scratch_of((bytes + 3) / sizeof(float))); }

}  // namespace quire::bindings
