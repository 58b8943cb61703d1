/* What the compiler's coverage instrumentation calls, so that an instrumented core can be imported without libFuzzer.
 *
 * Nothing but ELF symbol resolution is at work: a preloaded libFuzzer comes first in the global scope, so its functions
 * are called and these are not.
 */

#include <stdint.h>

/* The core's own symbols are hidden; these are looked up from outside, or give way to libFuzzer's. */
#pragma GCC visibility push(default)

extern uint8_t __start___sancov_cntrs[] __attribute__((weak, visibility("hidden")));
extern uint8_t __stop___sancov_cntrs[] __attribute__((weak, visibility("hidden")));

/* The core's edge counters, one byte each: for an engine in the same process, through ctypes. */
void mmufuzz_coverage_region(uint8_t **start, uint8_t **stop) {
    *start = __start___sancov_cntrs;
    *stop = __stop___sancov_cntrs;
}

void __sanitizer_cov_8bit_counters_init(uint8_t *start, uint8_t *stop) {}
void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop) {}

#pragma GCC visibility pop
