// Which builds of the kernels this CPU can run.

#include "kernels.h"

namespace quire {

const Kernels* const* supported_kernels() {
    // Filled once, on first use; the checks below also ask the operating system whether it saves the wide registers.
    static const struct Supported {
        const Kernels* list[6] = {};
        Supported() {
            int count = 0;
#ifdef QUIRE_X86
            __builtin_cpu_init();
            const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                  __builtin_cpu_supports("f16c");
            const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                    __builtin_cpu_supports("avx512vl");
            const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
            if (has_vnni && __builtin_cpu_supports("avx512bf16")) list[count++] = &avx512bf16::kernels;
            if (has_vnni) list[count++] = &avx512vnni::kernels;
            if (has_avx512) list[count++] = &avx512::kernels;
            if (has_avx2) list[count++] = &avx2::kernels;
#endif
            list[count++] = &portable::kernels;
        }
    } supported;
    return supported.list;
}

}  // namespace quire
