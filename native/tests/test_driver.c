/* Calls of the driver that fail, and how many of them a step makes. */
#include <stdlib.h>
#include <string.h>

#include "expect.h"
#include "fixture.h"
#include "standin.h"

static const char *const step_functions[] = {
    "cuCtxPushCurrent_v2",  "cuStreamIsCapturing", "cuModuleLoadData",     "cuModuleGetFunction",
    "cuMemAlloc_v2",        "cuMemHostAlloc",      "cuEventCreate",        "cuStreamWaitEvent",
    "cuMemcpyHtoDAsync_v2", "cuEventRecord",       "cuMemsetD8Async",      "cuLaunchKernel",
    "cuMemcpyDtoDAsync_v2", "cuCtxPopCurrent_v2",
};

/* Contexts on the stack of the stand-in that a test has kept it from popping. */
static int unpoppable = 0;

static int same_parameters(double *const *values)
{
    int same = 1;
    for (size_t i = 0; i < N_TENSORS; i++) {
        double *now = read_operand(&model, i, 0);
        same &= memcmp(now, values[i], (size_t)sizes[i] * sizeof *now) == 0;
        free(now);
    }
    return same;
}

/* After a step that failed in `function`. */
static void check_failed_step(fusedopt_context *fresh, const char *function, fusedopt_status status,
                              double *const *before)
{
    const int launching = strcmp(function, "cuLaunchKernel") == 0;
    expect_failure(status, launching ? FUSEDOPT_ERROR_LAUNCH : FUSEDOPT_ERROR_DRIVER,
                   "CUDA_ERROR_UNKNOWN", __LINE__);
    EXPECT(strstr(fusedopt_last_error(), function) != NULL, "%s: %s", function,
           fusedopt_last_error());
    const int unchanged = strstr(fusedopt_last_error(), "are unchanged") != NULL;
    EXPECT(unchanged || strstr(fusedopt_last_error(), "may have changed") != NULL, "%s",
           fusedopt_last_error());
    device_wait();
    EXPECT(same_parameters(before) || !unchanged, "%s: parameters changed", function);
    EXPECT(step_with(fresh) == FUSEDOPT_OK,
           "after %s: %s", function, fusedopt_last_error());
    device_wait();
    EXPECT(!same_parameters(before), "after %s: no step", function);
}

/* Fail one call within a step of a fresh context: the message names it, nothing has changed unless it
 * says so, and the next step goes through. Returns whether a step makes that call. */
static int fail_in_step(const char *function, int call, double *const *before)
{
    fusedopt_context *fresh;
    const int live = standin_live();
    standin_reset();
    EXPECT(fusedopt_init(&fresh, 0) == FUSEDOPT_OK, "%s", fusedopt_last_error());
    const CUdeviceptr norm = device_new(sizeof(float)), scale = device_new(sizeof(float));
    const float one = 1.0f;
    device_write(scale, &one, sizeof one);
    start_again();
    control = (fusedopt_control){.max_norm = 1,
                                 .norm = (float *)(uintptr_t)norm,
                                 .grad_scale = (const float *)(uintptr_t)scale};
    standin_reset();
    standin_fail(function, call, CUDA_ERROR_UNKNOWN);
    const fusedopt_status status = step_with(fresh);
    const int was_reached = standin_calls(function) >= call;
    /* What waits for a device: a step that succeeds does none of it. */
    EXPECT(status != FUSEDOPT_OK || standin_calls("cuMemFree_v2") + standin_calls("cuMemFreeHost") +
                                            standin_calls("cuEventSynchronize") == 0,
           "a step waits for the device");
    EXPECT(was_reached || status == FUSEDOPT_OK, "%s", fusedopt_last_error());
    if (was_reached)
        check_failed_step(fresh, function, status, before);
    standin_reset();
    device_free(norm);
    device_free(scale);
    fusedopt_destroy(fresh);
    /* A context that the driver does not pop stays. */
    const int stays = was_reached && strcmp(function, "cuCtxPopCurrent_v2") == 0;
    unpoppable += stays;
    EXPECT(standin_live() == live + stays, "%s, call %d: %d things leaked", function, call,
           standin_live() - live);
    EXPECT(standin_fault()[0] == '\0', "%s, call %d: %s", function, call, standin_fault());
    return was_reached;
}

static void check_step_failures(void)
{
    for (size_t f = 0; f < sizeof step_functions / sizeof *step_functions; f++) {
        int was_reached = 1, call = 0;
        while (was_reached) {
            double *before[N_TENSORS];
            for (size_t i = 0; i < N_TENSORS; i++)
                before[i] = read_operand(&model, i, 0);
            was_reached = fail_in_step(step_functions[f], ++call, before);
            for (size_t i = 0; i < N_TENSORS; i++)
                free(before[i]);
        }
        EXPECT(call > 1, "a step does not call %s", step_functions[f]);
    }
}

/* What a failed step has queued on one stream must not be overtaken on another. */
static void check_order_after_failure(void)
{
    fusedopt_context *fresh;
    standin_reset();
    EXPECT(fusedopt_init(&fresh, 0) == FUSEDOPT_OK, "%s", fusedopt_last_error());
    start_again();
    double *before[N_TENSORS];
    for (size_t i = 0; i < N_TENSORS; i++)
        before[i] = read_operand(&model, i, 0);
    standin_fail("cuLaunchKernel", 1, CUDA_ERROR_UNKNOWN);
    EXPECT(step_with(fresh) == FUSEDOPT_ERROR_LAUNCH, "%s", fusedopt_last_error());
    EXPECT(fusedopt_adamw_step(fresh, &set, 1, &group, 1, NULL, (fusedopt_stream)0x2) ==
               FUSEDOPT_OK,
           "%s", fusedopt_last_error());
    device_wait();
    EXPECT(!same_parameters(before), "no step");
    EXPECT(standin_fault()[0] == '\0', "%s", standin_fault());
    for (size_t i = 0; i < N_TENSORS; i++)
        free(before[i]);
    fusedopt_destroy(fresh);
}

static void check_init_failures(void)
{
    static const char *const functions[] = {
        "cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute",
        "cuDriverGetVersion", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemAlloc_v2",
        "cuMemcpyHtoD_v2", "cuEventCreate", "cuEventRecord", "cuCtxPopCurrent_v2",
    };
    for (size_t f = 0; f < sizeof functions / sizeof *functions; f++) {
        fusedopt_context *made = (fusedopt_context *)&made;
        const int live = standin_live();
        const int pops = strcmp(functions[f], "cuCtxPopCurrent_v2") == 0;
        standin_reset();
        standin_fail(functions[f], 1, CUDA_ERROR_UNKNOWN);
        expect_failure(fusedopt_init(&made, 0), FUSEDOPT_ERROR_DRIVER, functions[f], __LINE__);
        EXPECT(made == NULL, "%s failed, and there is a context", functions[f]);
        unpoppable += pops;
        EXPECT(standin_live() == live + pops, "%s: %d things leaked", functions[f],
               standin_live() - live);
    }
    fusedopt_context *made;
    standin_reset();
    standin_fail("cuMemAlloc_v2", 1, CUDA_ERROR_OUT_OF_MEMORY);
    expect_failure(fusedopt_init(&made, 0), FUSEDOPT_ERROR_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY",
                   __LINE__);
    standin_reset();
    expect_failure(fusedopt_init(&made, 1), FUSEDOPT_ERROR_DEVICE, "no GPU number 1", __LINE__);
    expect_failure(fusedopt_init(&made, -1), FUSEDOPT_ERROR_DEVICE, "no GPU number -1", __LINE__);
    standin_set_gpu(0, 90, 13000);
    expect_failure(fusedopt_init(&made, 0), FUSEDOPT_ERROR_DEVICE, "finds no GPU", __LINE__);
    standin_set_gpu(1, 90, 11080);
    expect_failure(fusedopt_init(&made, 0), FUSEDOPT_ERROR_DRIVER, "it is for CUDA 11.8", __LINE__);
    standin_reset();
}

/* One launch for a set of aligned tensors, and one for those that are not; tables only when they
 * change; no wait for the device. */
static void check_economy(void)
{
    start_again();
    EXPECT(step_with(context) == FUSEDOPT_OK, "%s", fusedopt_last_error());
    standin_reset();
    for (int64_t count = 2; count < 6; count++) {
        group.step = count;
        EXPECT(step_with(context) == FUSEDOPT_OK, "%s", fusedopt_last_error());
    }
    EXPECT(standin_calls("cuLaunchKernel") == 8, "%d launches instead of 8",
           standin_calls("cuLaunchKernel"));
    EXPECT(standin_calls("cuMemcpyHtoDAsync_v2") == 4, "%d copies for 4 new steps",
           standin_calls("cuMemcpyHtoDAsync_v2"));
    EXPECT(standin_calls("cuMemAlloc_v2") == 0, "memory is allocated again");
    standin_reset();
    EXPECT(step_with(context) == FUSEDOPT_OK, "%s", fusedopt_last_error());
    EXPECT(standin_calls("cuMemcpyHtoDAsync_v2") == 0, "a copy of what the device has");
    EXPECT(standin_calls("cuEventSynchronize") == 0, "a wait for nothing");
}

/* Buffers that grow, for chunks and for groups; at the end everything is given back. */
static void check_growth(void)
{
    enum { MANY = 300 };
    static const int64_t large[] = {1000000, 3000};
    static fusedopt_adamw groups[MANY];
    uint64_t seed = 9;
    struct model larger;
    make_model(&larger, large, 2, float32, &seed);
    start_again();
    standin_reset();
    for (int i = 0; i < MANY; i++)
        groups[i] = group;
    groups[MANY - 1].lr = 0.5;
    larger.group[0] = 0;
    larger.group[1] = MANY - 1;
    for (int i = 0; i < 3; i++)
        EXPECT(fusedopt_adamw_step(context, &set, 1, &group, 1, NULL, NULL) == FUSEDOPT_OK &&
                   fusedopt_adamw_step(context, &larger.set, 1, groups, MANY, NULL, NULL) ==
                       FUSEDOPT_OK,
               "%s", fusedopt_last_error());
    EXPECT(standin_calls("cuMemFree_v2") + standin_calls("cuMemFreeHost") == 0,
           "a step waits for memory to be freed");
    double *values = read_operand(&larger, 1, 0), *gradient = read_operand(&larger, 1, 1);
    uint64_t again = 9;
    double start = 0;
    for (int64_t i = 0; i < large[0] * 2 + 1; i++)
        start = random_number(&again);
    /* Three steps of 0.5 against the gradient's sign, in whose wake the decay hardly counts. */
    const double moved = (float)start - values[0];
    EXPECT(moved * gradient[0] > 0 && moved * moved > 0.5, "the last group's first parameter moved by "
           "%g, its gradient is %g", moved, gradient[0]);
    free(values);
    free(gradient);
    free_model(&larger);
    EXPECT(standin_fault()[0] == '\0', "%s", standin_fault());
}

int main(void)
{
    open_fixture();
    check_economy();
    check_growth();
    check_step_failures();
    check_order_after_failure();
    check_init_failures();
    return close_fixture(unpoppable);
}
