// Parts of a scratch.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

// Hands out parts of a scratch, each on a cache line if the scratch begins on one. Without a scratch it only counts.
struct Area {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* const part = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
        used += round_up(count * int64_t(sizeof(T)), 64);
        return part;
    }
};

}  // namespace quire::QUIRE_ISA
