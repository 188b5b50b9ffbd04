#include "error.h"
#include "work.h"

/* More than any kernel takes: its own parameters and scratch addresses. */
enum { MOST_PARAMETERS = 10 };

static CUdeviceptr constant(const struct work *work, size_t index)
{
    return work->context->constants + index * sizeof(double);
}

static CUdeviceptr max_norm_address(const struct work *work)
{
    const size_t count = work->step->n_groups * work->step->entry->n_coefficients;
    return work->context->rows.device + (count + count % 2) * sizeof(double);
}

static const struct kernel *norm_kernel(const struct work *work, const struct cohort *cohort)
{
    return find_norm(work->context->target, "partial_norms",
                     work->step->sets[cohort->set].grad_type, cohort->aligned, work->infinity);
}

fusedopt_status load_kernels(struct work *work)
{
    fusedopt_context *context = work->context;
    const struct target *target = context->target;
    const struct plan *plan = &context->plan;
    for (size_t i = 0; i < plan->now.count; i++) {
        const struct cohort *cohort = &plan->now.list[i];
        TRY(load_kernel(context, cohort->update, &work->updates[i]));
        if (work->wants_norm)
            TRY(load_kernel(context, norm_kernel(work, cohort), &work->norms[i]));
    }
    if (work->wants_norm) {
        work->clip_kernel = find_norm(target, "clip_factor", FUSEDOPT_NO_TYPE, 1, work->infinity);
        TRY(load_kernel(context, work->clip_kernel, &work->clip_factor));
    }
    if (work->scales) {
        work->scaler_kernel = find_norm(target, "load_scaler", FUSEDOPT_NO_TYPE, 1, 0);
        TRY(load_kernel(context, work->scaler_kernel, &work->load_scaler));
    }
    return FUSEDOPT_OK;
}

static fusedopt_status launch(struct work *work, const struct kernel *kernel, CUfunction function,
                              int32_t programs, void **arguments, int count)
{
    void *parameters[MOST_PARAMETERS];
    CUdeviceptr no_scratch = 0;
    for (int i = 0; i < count; i++)
        parameters[i] = arguments[i];
    for (int i = 0; i < kernel->scratch; i++)
        parameters[count + i] = &no_scratch;
    CALL_OR(&work->context->driver, FUSEDOPT_ERROR_LAUNCH, cuLaunchKernel, function,
            (unsigned)programs, 1, 1, (unsigned)kernel->variant.threads, 1, 1,
            (unsigned)kernel->variant.shared, work->stream, parameters, NULL);
    return FUSEDOPT_OK;
}

static fusedopt_status launch_scaler(struct work *work)
{
    const fusedopt_control *control = work->step->control;
    int64_t grad_scale = (int64_t)(uintptr_t)control->grad_scale;
    int64_t found_inf = (int64_t)(uintptr_t)control->found_inf;
    CUdeviceptr inverse = constant(work, INVERSE_SCALE), values = constant(work, SCALER_CONTROL);
    void *arguments[] = {&grad_scale, &found_inf, &inverse, &values};
    return launch(work, work->scaler_kernel, work->load_scaler, 1, arguments, 4);
}

static fusedopt_status launch_partial_norms(struct work *work, size_t index)
{
    fusedopt_context *context = work->context;
    struct cohort *cohort = &context->plan.now.list[index];
    const CUdeviceptr chunks = context->norm_chunks.device;
    CUdeviceptr table = context->tables.device + cohort->table * sizeof(int64_t);
    CUdeviceptr columns = chunks + cohort->norm_chunks.columns * sizeof(int32_t);
    CUdeviceptr blocks = chunks + cohort->norm_chunks.blocks * sizeof(int32_t);
    CUdeviceptr inverse = constant(work, work->scales ? INVERSE_SCALE : ONE);
    CUdeviceptr partials = context->partials + cohort->partials * sizeof(double);
    void *arguments[] = {&table, &cohort->width, &columns, &blocks, &inverse, &partials};
    return launch(work, norm_kernel(work, cohort), work->norms[index],
                  cohort->norm_chunks.programs, arguments, 6);
}

static fusedopt_status launch_clip_factor(struct work *work)
{
    fusedopt_context *context = work->context;
    int32_t count = (int32_t)context->plan.n_partials;
    CUdeviceptr partials = context->partials;
    CUdeviceptr inverse = constant(work, work->scales ? INVERSE_SCALE : ONE);
    CUdeviceptr bound = max_norm_address(work), norm = constant(work, NORM);
    CUdeviceptr values = constant(work, !work->clips   ? UNUSED_CONTROL
                                        : work->scales ? SCALER_CONTROL
                                                       : CLIP_CONTROL);
    void *arguments[] = {&partials, &count, &inverse, &bound, &values, &norm};
    TRY(launch(work, work->clip_kernel, work->clip_factor, 1, arguments, 6));
    if (work->step->control->norm != NULL)
        /* The kernel may take its addresses for multiples of 16, and the caller's need not be. */
        CALL(&context->driver, cuMemcpyDtoDAsync, (CUdeviceptr)work->step->control->norm, norm,
             sizeof(float), work->stream);
    return FUSEDOPT_OK;
}

static fusedopt_status launch_update(struct work *work, size_t index)
{
    fusedopt_context *context = work->context;
    struct cohort *cohort = &context->plan.now.list[index];
    const CUdeviceptr chunks = context->chunks.device;
    CUdeviceptr table = context->tables.device + cohort->table * sizeof(int64_t);
    CUdeviceptr columns = chunks + cohort->chunks.columns * sizeof(int32_t);
    CUdeviceptr blocks = chunks + cohort->chunks.blocks * sizeof(int32_t);
    CUdeviceptr rows = context->rows.device;
    CUdeviceptr values = constant(work, work->scales  ? SCALER_CONTROL
                                        : work->clips ? CLIP_CONTROL
                                                      : NEUTRAL_CONTROL);
    void *arguments[] = {&table, &cohort->width, &columns, &blocks, &rows, &values};
    TRY(launch(work, cohort->update, work->updates[index], cohort->chunks.programs, arguments, 6));
    work->updates_queued++;
    return FUSEDOPT_OK;
}

fusedopt_status launch_all(struct work *work)
{
    const size_t count = work->context->plan.now.count;
    if (work->scales)
        TRY(launch_scaler(work));
    if (work->wants_norm) {
        for (size_t i = 0; i < count; i++)
            TRY(launch_partial_norms(work, i));
        TRY(launch_clip_factor(work));
    }
    for (size_t i = 0; i < count; i++)
        TRY(launch_update(work, i));
    return FUSEDOPT_OK;
}
