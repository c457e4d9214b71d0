// Two members of std::exception_ptr that the headers of GCC 11 and newer call and that older libstdc++ does not export.
// Hidden, so that no other library takes them.
#include <exception>

#if defined(__x86_64__) && defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11

#define QUIRE_EXCEPTION_PTR(member) __asm__("_ZNSt15__exception_ptr13exception_ptr" member)

extern "C" {

// The copy constructor and the destructor of std::exception_ptr, which every libstdc++ exports.
void quire_copy_exception(void* to, const void* from) QUIRE_EXCEPTION_PTR("C1ERKS0_");
void quire_destroy_exception(void* self) QUIRE_EXCEPTION_PTR("D1Ev");

[[gnu::visibility("hidden")]] void quire_add_reference(void* self) QUIRE_EXCEPTION_PTR("9_M_addrefEv");
[[gnu::visibility("hidden")]] void quire_release(void* self) QUIRE_EXCEPTION_PTR("10_M_releaseEv");

// A copy that is never destroyed leaves one reference more.
void quire_add_reference(void* self) {
    void* copy = nullptr;
    quire_copy_exception(&copy, self);
}

void quire_release(void* self) { quire_destroy_exception(self); }
}

#endif
