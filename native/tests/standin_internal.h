/* What the parts of the stand-in driver share. */
#ifndef FUSEDOPT_STANDIN_INTERNAL_H
#define FUSEDOPT_STANDIN_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "fusedopt.h"
#include "standin.h"

struct CUmod_st {
    const void *image;
};

struct CUfunc_st {
    const fusedopt_variant *variant;
    struct CUfunc_st *next;
};

/* Not part of an address that a host can read: such have their upper 17 bits equal. */
#define MARK ((CUdeviceptr)1 << 56)

enum { MOST_FUNCTIONS = 64, MOST_CONTEXTS = 8 };

struct allocation {
    struct allocation *next;
    unsigned char *host;
    size_t bytes;
};

struct standin {
    int gpus, capability, cuda;
    int known; /* whether the environment was read */
    char fault[256];
    struct {
        const char *name;
        int calls, fail_at;
        CUresult result;
    } functions[MOST_FUNCTIONS];
    size_t function_count;
    struct allocation *allocations;
    struct CUfunc_st *kernels;
    int live, retained;
    CUcontext stack[MOST_CONTEXTS];
    int depth;
};

extern struct standin state;

enum { MOST_ARGUMENTS = 6 };

/* Arguments of a kernel, widened. */
struct launch {
    const fusedopt_variant *variant;
    uint32_t programs;
    uint64_t argument[MOST_ARGUMENTS];
};

#define EXPORT __attribute__((visibility("default"))) CUresult CUDAAPI

#define ENTER()                                                                                    \
    do {                                                                                           \
        const CUresult entered = note_call(__func__);                                              \
        if (entered != CUDA_SUCCESS)                                                               \
            return entered;                                                                        \
    } while (0)

/* Most calls need a current context. */
#define ENTER_IN_CONTEXT()                                                                         \
    do {                                                                                           \
        ENTER();                                                                                   \
        if (state.depth == 0)                                                                      \
            return CUDA_ERROR_INVALID_CONTEXT;                                                     \
    } while (0)

/* Count a call, and say whether it is to fail. */
CUresult note_call(const char *function);

/* Note a misuse for standin_fault. */
void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The host's address of device memory, of which `bytes` are used; NULL, with a fault, for what is no
 * device memory. */
void *at_device(CUdeviceptr address, size_t bytes);

/* Read a kernel's arguments, and run it. */
CUresult read_arguments(struct launch *launch, void **parameters);
void run_kernel(const struct launch *launch);

/* Run what is queued: all of it, or what an event stands behind. */
void run_everything(void);

#endif
