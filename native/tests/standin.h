/* A driver without a GPU, for tests: libfusedopt loads it when FUSEDOPT_DRIVER names it.
 *
 * Device memory is host memory whose addresses are marked, so that reading them on the host faults.
 * Work is queued by stream and runs when something waits for it, in the order that events ask for
 * and no other: a missing wait, or a staging area that is overwritten too early, changes results.
 * Kernels are what kernels/multi_tensor.py and kernels/norms.py say, on the same tables.
 *
 * Before the first call it reads from the environment STANDIN_GPUS (how many), STANDIN_CAPABILITY
 * (75 is 7.5) and STANDIN_CUDA (13000, what cuDriverGetVersion says).
 */
#ifndef FUSEDOPT_STANDIN_H
#define FUSEDOPT_STANDIN_H

#include <cuda.h>

#define STANDIN_API __attribute__((visibility("default")))

/* Forget failures, counts and faults, and take the GPU from the environment again. */
STANDIN_API void standin_reset(void);
STANDIN_API void standin_set_gpu(int count, int capability, int cuda);

/* Fail a call: the next one of the function is number 1. Names are those of cuda.h after its macros
 * ("cuMemAlloc_v2"). */
STANDIN_API void standin_fail(const char *function, int call, CUresult result);

/* How often a function was called since the reset. */
STANDIN_API int standin_calls(const char *function);

/* Allocations, modules, events and retained or pushed contexts that were not given back. */
STANDIN_API int standin_live(void);

/* What was done that a GPU would not have forgiven; "" for nothing. */
STANDIN_API const char *standin_fault(void);

#endif
