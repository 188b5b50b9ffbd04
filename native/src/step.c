#include <math.h>
#include <stdlib.h>

#include "error.h"
#include "work.h"

/* Make every buffer large enough before any of them is written. */
static fusedopt_status reserve_buffers(struct work *work, size_t row_bytes)
{
    fusedopt_context *context = work->context;
    const struct plan *plan = &context->plan;
    struct memory *memory = &context->memory;
    TRY(reserve_staged(memory, &context->rows, row_bytes));
    TRY(reserve_staged(memory, &context->tables, plan->now.n_words * sizeof(int64_t)));
    TRY(reserve_staged(memory, &context->chunks, plan->n_chunks * sizeof(int32_t)));
    if (!work->wants_norm)
        return FUSEDOPT_OK;
    TRY(reserve_staged(memory, &context->norm_chunks, plan->n_norm_chunks * sizeof(int32_t)));
    return reserve_device(memory, &context->partials, &context->partials_capacity,
                          plan->n_partials * sizeof(double));
}

static fusedopt_status send_chunks(struct work *work)
{
    fusedopt_context *context = work->context;
    struct plan *plan = &context->plan;
    void *area = NULL;
    if (!plan->has_chunks && plan->n_chunks > 0) {
        TRY(begin_content(&context->memory, &context->chunks, &area));
        write_chunks(plan, area);
        TRY(send_content(&context->memory, &context->chunks, plan->n_chunks * sizeof(int32_t),
                         work->stream));
        plan->has_chunks = true;
    }
    if (!work->wants_norm || plan->has_norm_chunks || plan->n_norm_chunks == 0)
        return FUSEDOPT_OK;
    TRY(begin_content(&context->memory, &context->norm_chunks, &area));
    write_norm_chunks(plan, area);
    TRY(send_content(&context->memory, &context->norm_chunks,
                     plan->n_norm_chunks * sizeof(int32_t), work->stream));
    /* Partial norms that no program writes count as 0. */
    CALL(&context->driver, cuMemsetD8Async, context->partials, 0,
         plan->n_partials * sizeof(double), work->stream);
    plan->has_norm_chunks = true;
    return FUSEDOPT_OK;
}

static fusedopt_status send_tables(struct work *work, const double *rows, size_t row_bytes)
{
    fusedopt_context *context = work->context;
    const struct cohorts *now = &context->plan.now;
    TRY(send_if_changed(&context->memory, &context->rows, rows, row_bytes, work->stream));
    TRY(send_if_changed(&context->memory, &context->tables, now->words,
                        now->n_words * sizeof(int64_t), work->stream));
    return send_chunks(work);
}

static fusedopt_status refuse_capture(const struct work *work)
{
    CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
    CALL(&work->context->driver, cuStreamIsCapturing, work->stream, &capturing);
    if (capturing != CU_STREAM_CAPTURE_STATUS_NONE)
        return fail(FUSEDOPT_ERROR_VALUE, "the stream is capturing a CUDA graph, whose replays "
                                          "would repeat this step's scalars; step outside of it");
    return FUSEDOPT_OK;
}

/* Queue everything on the stream, behind the step before. */
static fusedopt_status queue(struct work *work, const double *rows, size_t row_bytes)
{
    fusedopt_context *context = work->context;
    CALL(&context->driver, cuStreamWaitEvent, work->stream, context->latest,
         CU_EVENT_WAIT_DEFAULT);
    fusedopt_status status = send_tables(work, rows, row_bytes);
    if (status == FUSEDOPT_OK)
        status = launch_all(work);
    /* On an error, too: what was queued must run before the next step's. */
    const CUresult result = context->driver.cuEventRecord(context->latest, work->stream);
    if (status == FUSEDOPT_OK && result != CUDA_SUCCESS)
        return driver_failure(&context->driver, result, "cuEventRecord", FUSEDOPT_ERROR_DRIVER);
    return status;
}

static fusedopt_status run_in_context(struct work *work, const double *rows, size_t row_bytes)
{
    TRY(refuse_capture(work));
    TRY(load_kernels(work));
    TRY(reserve_buffers(work, row_bytes));
    return queue(work, rows, row_bytes);
}

static fusedopt_status run(struct work *work, const double *rows, size_t row_bytes)
{
    TRY(enter(work->context));
    const fusedopt_status status = run_in_context(work, rows, row_bytes);
    if (status == FUSEDOPT_OK)
        return leave(work->context);
    CUcontext ours;
    work->context->driver.cuCtxPopCurrent(&ours);
    return status;
}

/* Coefficients of every group, then the bound on the norm on the next 16 bytes. */
static void fill_rows(const struct step *step, bool clips, double *rows, size_t count)
{
    const struct entry_point *entry = step->entry;
    for (size_t group = 0; group < step->n_groups; group++)
        entry->coefficients(step->groups + group * entry->group_bytes,
                            rows + group * entry->n_coefficients);
    rows[count - 2] = clips ? step->control->max_norm : INFINITY;
}

static fusedopt_status run_step(fusedopt_context *context, const struct step *step, CUstream stream)
{
    TRY(check_step(step));
    TRY(make_plan(&context->plan, step));
    const size_t cohorts = context->plan.now.count;
    const fusedopt_control *control = step->control;
    struct work work = {.context = context, .step = step, .stream = stream};
    if (control != NULL) {
        work.clips = control->max_norm > 0 && isfinite(control->max_norm);
        work.wants_norm = work.clips || control->norm != NULL;
        work.scales = control->grad_scale != NULL || control->found_inf != NULL;
        work.infinity = control->norm_type == FUSEDOPT_NORM_INF;
    }
    if (cohorts == 0 && !work.wants_norm)
        return FUSEDOPT_OK;
    size_t count = step->n_groups * step->entry->n_coefficients;
    count += count % 2 + 2;
    double *rows = calloc(count, sizeof *rows);
    work.updates = calloc(2 * cohorts + 1, sizeof *work.updates);
    fusedopt_status status;
    if (rows == NULL || work.updates == NULL) {
        status = fail(FUSEDOPT_ERROR_MEMORY, "no host memory is left");
    } else {
        work.norms = work.updates + cohorts;
        fill_rows(step, work.clips, rows, count);
        status = run(&work, rows, count * sizeof *rows);
        if (status != FUSEDOPT_OK)
            add_to_message("; %zu of %zu updates were queued, so the tensors %s",
                           work.updates_queued, cohorts,
                           work.updates_queued > 0 ? "may have changed" : "are unchanged");
    }
    free(rows);
    free(work.updates);
    return status;
}

static fusedopt_status step_of(const struct entry_point *entry, fusedopt_context *context,
                               const fusedopt_tensors *sets, size_t n_sets, const void *groups,
                               size_t n_groups, const fusedopt_control *control,
                               fusedopt_stream stream)
{
    if (context == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "context is null: fusedopt_init makes one");
    const struct step step = {entry, context->target, sets, n_sets, groups, n_groups, control};
    return run_step(context, &step, stream);
}

#define STEP_FUNCTION(name)                                                                        \
    fusedopt_status fusedopt_##name##_step(                                                        \
        fusedopt_context *context, const fusedopt_tensors *sets, size_t n_sets,                    \
        const fusedopt_##name *groups, size_t n_groups, const fusedopt_control *control,           \
        fusedopt_stream stream)                                                                    \
    {                                                                                              \
        return step_of(&library_##name, context, sets, n_sets, groups, n_groups, control, stream); \
    }

STEP_FUNCTION(adam)
STEP_FUNCTION(adamw)
STEP_FUNCTION(sgd)
STEP_FUNCTION(rmsprop)
