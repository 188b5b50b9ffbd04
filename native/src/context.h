/* A device: its driver, the kernels that were loaded, and the buffers of the latest step. */
#ifndef FUSEDOPT_CONTEXT_H
#define FUSEDOPT_CONTEXT_H

#include "library.h"
#include "plan.h"
#include "staged.h"

/* Device constants and control values, as indices into an array of double; each is aligned on 16
 * bytes, as the kernels' pointers are. A control is two values: the factor on the gradient, and
 * whether to skip the step. */
enum {
    NEUTRAL_CONTROL = 0, /* 1, 0: never written */
    ONE = 2,             /* 1: an inverse scale, never written */
    CLIP_CONTROL = 4,    /* its factor is written by clip_factor, its flag stays 0 */
    SCALER_CONTROL = 6,  /* written by load_scaler, then its factor by clip_factor */
    UNUSED_CONTROL = 8,  /* where clip_factor writes if a norm is wanted and no clipping */
    INVERSE_SCALE = 10,  /* written by load_scaler */
    NORM = 12,           /* one float */
    N_CONSTANTS = 14
};

struct fusedopt_context {
    struct driver driver;
    CUdevice device;
    CUcontext primary;
    const struct target *target;
    CUmodule *modules;    /* by image, NULL until loaded */
    CUfunction *functions; /* by kernel of the whole manifest, NULL until loaded */
    struct memory memory;
    CUdeviceptr constants;
    struct staged rows;        /* coefficients of all groups, then max_norm */
    struct staged tables;      /* the tables of all cohorts */
    struct staged chunks;      /* the chunk maps of all cohorts */
    struct staged norm_chunks; /* the same in the blocks of the norm kernels */
    CUdeviceptr partials;
    size_t partials_capacity;
    CUevent latest; /* behind the latest step's work */
    struct plan plan;
};

/* Make the device's context current, and give back what was current before. */
fusedopt_status enter(fusedopt_context *context);
fusedopt_status leave(fusedopt_context *context);

/* Load a kernel, an element of library_kernels, on its first use. */
fusedopt_status load_kernel(fusedopt_context *context, const struct kernel *kernel,
                            CUfunction *function);

#endif
