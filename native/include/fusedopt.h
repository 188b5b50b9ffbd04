/* fusedopt: fused optimizer steps on NVIDIA GPUs, for programs in C and C++.
 *
 * Every step function updates any number of tensors in place, with one launch for each combination
 * of set, alignment and selected code. The update is that of the torch.optim class of the same name;
 * arithmetic is in float32 (float64 where the tensors are), rounded on store and not before, to
 * nearest: 8-bit states, masters beside parameters, and stochastic rounding are the Python library's.
 *
 * Addresses of tensors are device addresses of the context's device, as numbers from cuMemAlloc,
 * cudaMalloc or a framework. The arrays that hold them are on the host; the library reads them
 * during the call and keeps none of the caller's pointers. Tensors are dense, any shape, and the
 * operands of one tensor have their elements in the same order; no two tensors that are written may
 * overlap.
 *
 * A call returns when its work is queued on the stream; the caller keeps the tensors alive until
 * that has run. What can be checked is checked first: a call that returns an error other than
 * FUSEDOPT_ERROR_DRIVER, _MEMORY or _LAUNCH has queued nothing, and those three say in their message
 * whether tensors may have changed.
 *
 * A context may be used by one thread at a time; different contexts by different threads at once.
 */
#ifndef FUSEDOPT_H
#define FUSEDOPT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FUSEDOPT_API __attribute__((visibility("default")))
#else
#define FUSEDOPT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fusedopt_status {
    FUSEDOPT_OK = 0,
    FUSEDOPT_ERROR_NULL,         /* a pointer is null that must not be */
    FUSEDOPT_ERROR_SIZE,         /* a count or a number of elements is negative or too large */
    FUSEDOPT_ERROR_VALUE,        /* a hyper-parameter, group index, address or control value */
    FUSEDOPT_ERROR_TYPE,         /* an unknown type, or types that no kernel was compiled for */
    FUSEDOPT_ERROR_DRIVER,       /* no driver, one that is too old, or a call of it that failed */
    FUSEDOPT_ERROR_DEVICE,       /* no such GPU */
    FUSEDOPT_ERROR_ARCHITECTURE, /* the library has no code for this GPU */
    FUSEDOPT_ERROR_MEMORY,       /* host or device memory ran out */
    FUSEDOPT_ERROR_LAUNCH        /* the driver refused a kernel */
} fusedopt_status;

typedef enum fusedopt_type {
    FUSEDOPT_NO_TYPE = 0, /* in the manifest: no such operand */
    FUSEDOPT_FLOAT32,
    FUSEDOPT_BFLOAT16,
    FUSEDOPT_FLOAT16,
    FUSEDOPT_FLOAT64
} fusedopt_type;

/* The kernels and buffers of one device. */
typedef struct fusedopt_context fusedopt_context;

/* CUstream and cudaStream_t; NULL is the legacy default stream, also where the caller was compiled
 * with a default stream for each thread. */
typedef struct CUstream_st *fusedopt_stream;

/* Make a context on GPU number `device`, as CUDA counts (CUDA_VISIBLE_DEVICES applies).
 *
 * Loads the NVIDIA driver (libcuda.so.1, or what the environment variable FUSEDOPT_DRIVER names) and
 * retains the device's primary context, the one that the CUDA runtime uses. A program that has
 * several optimizers makes a context for each: the tables of the latest step are kept in it.
 * Errors: NULL, DRIVER, DEVICE, ARCHITECTURE, MEMORY. On an error *out is NULL. */
FUSEDOPT_API fusedopt_status fusedopt_init(fusedopt_context **out, int device);

/* Free a context, after waiting for its latest step. NULL is ignored. */
FUSEDOPT_API void fusedopt_destroy(fusedopt_context *context);

/* "FUSEDOPT_ERROR_NULL" for that status, and so on. */
FUSEDOPT_API const char *fusedopt_status_name(fusedopt_status status);

/* What went wrong in this thread's latest call that failed, and what to do about it; "" before one.
 * Valid until this thread's next call. */
FUSEDOPT_API const char *fusedopt_last_error(void);

/* The library's version, "0.1.0". */
FUSEDOPT_API const char *fusedopt_version(void);

/* One compiled kernel of the library. */
typedef struct fusedopt_variant {
    const char *name;    /* unique: "cuda:90 Adam (amsgrad) bf16" */
    const char *kernel;  /* the function in the image: "update_tensors" */
    const char *rule;    /* "Adam", "SGD", "RMSprop"; "" for the kernels of norm and loss scaling */
    const char *options; /* compile-time options that are on: "amsgrad" */
    const char *target;  /* what it was compiled for: "cuda:90" */
    const char *machine; /* what that made: "sm_90a", which runs on 9.0 alone; sm_80 on any 8.x */
    fusedopt_type param_type, grad_type, state_type;
    int aligned;   /* whether all addresses must be multiples of 16 bytes */
    int threads;   /* of a block */
    int block;     /* elements of a block */
    int registers; /* a thread */
    int shared;    /* bytes of shared memory a block */
    const void *image;
    size_t image_bytes; /* of the cubin at image */
} fusedopt_variant;

FUSEDOPT_API size_t fusedopt_manifest_count(void);

/* Variant i; NULL from fusedopt_manifest_count() on. */
FUSEDOPT_API const fusedopt_variant *fusedopt_manifest(size_t i);

#define FUSEDOPT_MAX_STATES 3

/* Tensors that share their types. Arrays have `count` entries and may be NULL where count is 0. */
typedef struct fusedopt_tensors {
    size_t count;
    const int64_t *numel;    /* elements of each; one with 0 is skipped, whatever its addresses */
    void *const *param;      /* addresses of the parameters, written */
    const void *const *grad; /* addresses of the gradients, never written */
    /* Addresses of the optimizer's states, written. Which there are is said at each optimizer; the
     * caller sets them to zero before the first step. An array that no group needs may be NULL. */
    void *const *state[FUSEDOPT_MAX_STATES];
    const uint32_t *group; /* index of each tensor's group; NULL: all 0 */
    fusedopt_type param_type, grad_type;
    fusedopt_type state_type; /* not looked at where no group has states */
} fusedopt_tensors;

typedef enum fusedopt_norm_type {
    FUSEDOPT_NORM_2 = 0,  /* root of the sum of squares */
    FUSEDOPT_NORM_INF = 1 /* largest magnitude */
} fusedopt_norm_type;

/* What is done to the gradients of one call besides; all zero, as NULL for it, is nothing. */
typedef struct fusedopt_control {
    /* Gradients are multiplied by min(1, max_norm / (norm + 1e-6)), with the norm over all tensors of
     * all sets, as torch.nn.utils.clip_grad_norm_ does; 0, negative or infinite: no clipping. */
    double max_norm;
    fusedopt_norm_type norm_type;
    /* Device address; the norm before clipping is written there. May be NULL. */
    float *norm;
    /* Device addresses of a loss scaler's scale and overflow flag; may be NULL. Gradients are divided
     * by *grad_scale (the norm is that of the quotients), and where *found_inf is not 0 nothing is
     * updated: whether the step then counts is up to the caller. */
    const float *grad_scale;
    const float *found_inf;
} fusedopt_control;

/* Each struct below is the hyper-parameters of one parameter group, with torch's meaning and ranges
 * (which are in brackets; every number must be finite). Flags are 0 or not. `step` counts from 1: the
 * number of steps including this one. Groups of one call may select different code (one with amsgrad
 * and one without): that takes a launch more. */

/* States: exp_avg, exp_avg_sq, and with amsgrad max_exp_avg_sq. */
typedef struct fusedopt_adam {
    double lr, beta1, beta2; /* [0, inf), [0, 1), [0, 1) */
    double eps;              /* [0, inf), in units of the gradient */
    double weight_decay;     /* [0, inf), added to the gradient as weight_decay * parameter */
    int amsgrad, maximize;
    int64_t step;
} fusedopt_adam;

/* States: as for fusedopt_adam. */
typedef struct fusedopt_adamw {
    double lr, beta1, beta2; /* as above */
    double eps;
    double weight_decay; /* [0, inf): the parameter is multiplied by 1 - lr * weight_decay */
    int amsgrad, maximize;
    int64_t step;
} fusedopt_adamw;

/* States: momentum_buffer where momentum is not 0. */
typedef struct fusedopt_sgd {
    double lr, momentum;  /* [0, inf) */
    double dampening;     /* not applied at step 1 */
    double weight_decay;  /* [0, inf), added to the gradient as weight_decay * parameter */
    int nesterov;         /* needs momentum > 0 and dampening = 0 */
    int maximize;
    int64_t step;
} fusedopt_sgd;

/* States: square_avg; grad_avg where centered; momentum_buffer (always state[2]) where momentum is
 * not 0. */
typedef struct fusedopt_rmsprop {
    double lr, alpha;    /* [0, inf) */
    double eps;          /* [0, inf), added to the root, in units of the gradient */
    double weight_decay; /* [0, inf), added to the gradient as weight_decay * parameter */
    double momentum;     /* [0, inf) */
    int centered, maximize;
} fusedopt_rmsprop;

/* Update all tensors of all sets.
 *
 * `groups` has n_groups entries. A set with other types is a set of its own; tensors of different
 * groups may share a set. The stream belongs to the context's device and must not be capturing a CUDA
 * graph. Steps of one context on different streams run one after the other.
 * Errors: all but DEVICE and ARCHITECTURE. */
FUSEDOPT_API fusedopt_status fusedopt_adam_step(fusedopt_context *context,
                                                const fusedopt_tensors *sets, size_t n_sets,
                                                const fusedopt_adam *groups, size_t n_groups,
                                                const fusedopt_control *control,
                                                fusedopt_stream stream);
FUSEDOPT_API fusedopt_status fusedopt_adamw_step(fusedopt_context *context,
                                                 const fusedopt_tensors *sets, size_t n_sets,
                                                 const fusedopt_adamw *groups, size_t n_groups,
                                                 const fusedopt_control *control,
                                                 fusedopt_stream stream);
FUSEDOPT_API fusedopt_status fusedopt_sgd_step(fusedopt_context *context,
                                               const fusedopt_tensors *sets, size_t n_sets,
                                               const fusedopt_sgd *groups, size_t n_groups,
                                               const fusedopt_control *control,
                                               fusedopt_stream stream);
FUSEDOPT_API fusedopt_status fusedopt_rmsprop_step(fusedopt_context *context,
                                                   const fusedopt_tensors *sets, size_t n_sets,
                                                   const fusedopt_rmsprop *groups, size_t n_groups,
                                                   const fusedopt_control *control,
                                                   fusedopt_stream stream);

#ifdef __cplusplus
}
#endif

#endif
