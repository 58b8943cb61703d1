/* mypyc's runtime, ahead of each C file of a module.
 *
 * Included here so that its inline functions get no coverage counters: they would say nothing of the model. And mypyc
 * leaves the declarations of the two last out when each module is a C file of its own.
 */

#if defined(__clang__) && defined(MMUFUZZ_COVERAGE)
#pragma clang attribute push(__attribute__((no_sanitize("coverage"))), apply_to = function)
#endif
#include <CPy.h>
#include <bytes_extra_ops.h>
#include <str_extra_ops.h>
#if defined(__clang__) && defined(MMUFUZZ_COVERAGE)
#pragma clang attribute pop
#endif
