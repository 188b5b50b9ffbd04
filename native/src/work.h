/* A step on its way to the device. */
#ifndef FUSEDOPT_WORK_H
#define FUSEDOPT_WORK_H

#include "context.h"

/* What a step is made of, once everything has been checked. */
struct work {
    fusedopt_context *context;
    const struct step *step;
    CUstream stream;
    bool clips, scales, wants_norm, infinity;
    CUfunction *updates; /* by cohort */
    CUfunction *norms;   /* by cohort, where a norm is formed */
    CUfunction clip_factor, load_scaler;
    const struct kernel *clip_kernel, *scaler_kernel;
    size_t updates_queued;
};

/* Load the kernels that the plan needs. */
fusedopt_status load_kernels(struct work *work);

/* Queue every kernel of the step. */
fusedopt_status launch_all(struct work *work);

#endif
