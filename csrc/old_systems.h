// Lets one build run on systems with glibc 2.28 and GCC 8's libstdc++, although newer ones build it. Newer glibc gives
// the functions below a second version that does the same, and a linker takes the newest unless it is named.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__)
#define QUIRE_OLDEST_VERSION(function) __asm__(".symver " #function "," #function "@GLIBC_2.2.5")
#else
#define QUIRE_OLDEST_VERSION(function) static_assert(true)
#endif
