/* Arguments that are refused before the driver is asked for anything, and some that are not. */
#include <math.h>
#include <stdlib.h>

#include "expect.h"
#include "fixture.h"
#include "standin.h"

/* Give the tensor that is not aligned the addresses of one that is. */
static void align_last(void)
{
    for (int i = 0; i < N_OPERANDS; i++)
        addresses[i][N_TENSORS - 1] = addresses[i][0];
}

/* Break something, see the failure, and start again. */
#define REFUSES(change, status, words)                                                             \
    do {                                                                                           \
        start_again();                                                                             \
        standin_reset();                                                                           \
        change;                                                                                    \
        expect_failure(step_with(context), status, words, __LINE__);                                           \
        EXPECT(standin_calls("cuCtxPushCurrent_v2") == 0, "line %d: the driver was called",        \
               __LINE__);                                                                          \
    } while (0)

static void check_nulls(void)
{
    REFUSES(set.numel = NULL, FUSEDOPT_ERROR_NULL, "sets[0].numel is null");
    REFUSES(set.param = NULL, FUSEDOPT_ERROR_NULL, "sets[0].param is null");
    REFUSES(set.grad = NULL, FUSEDOPT_ERROR_NULL, "sets[0].grad is null");
    REFUSES(set.state[1] = NULL, FUSEDOPT_ERROR_NULL, "sets[0].state[1] (exp_avg_sq) is null");
    REFUSES(addresses[0][2] = NULL, FUSEDOPT_ERROR_NULL, "sets[0].param[2] is null");
    REFUSES(addresses[1][1] = NULL, FUSEDOPT_ERROR_NULL, "sets[0].grad[1] is null");
    REFUSES(addresses[2][1] = NULL, FUSEDOPT_ERROR_NULL, "sets[0].state[0][1] (exp_avg) is null");
    REFUSES((group.amsgrad = 1, set.state[2] = NULL), FUSEDOPT_ERROR_NULL,
            "sets[0].state[2] (max_exp_avg_sq) is null");
    start_again();
    expect_failure(fusedopt_adamw_step(context, NULL, 1, &group, 1, NULL, NULL),
                   FUSEDOPT_ERROR_NULL, "sets is null", __LINE__);
    expect_failure(fusedopt_adamw_step(context, &set, 1, NULL, 1, NULL, NULL),
                   FUSEDOPT_ERROR_NULL, "groups is null", __LINE__);
}

static void check_sizes_and_types(void)
{
    int64_t numel[N_TENSORS] = {1000, 5, 2048};
    REFUSES((set.numel = numel, numel[1] = -5), FUSEDOPT_ERROR_SIZE,
            "sets[0].numel[1] is -5, which is negative");
    REFUSES((set.numel = numel, numel[1] = (int64_t)1 << 41), FUSEDOPT_ERROR_SIZE,
            "sets[0].numel[1] is 2199023255552, which is too large");
    /* Each fits, but not all of them in one launch. */
    const int64_t large = ((int64_t)1 << 40) - 2048;
    REFUSES((set.numel = numel, numel[0] = numel[1] = numel[2] = large, align_last()),
            FUSEDOPT_ERROR_SIZE, "sets[0] has more elements than one launch can update");
    REFUSES(set.count = (size_t)1 << 31, FUSEDOPT_ERROR_SIZE, "sets[0].count is 2147483648");
    REFUSES(set.param_type = (fusedopt_type)9, FUSEDOPT_ERROR_TYPE, "sets[0].param_type is 9");
    REFUSES(set.grad_type = FUSEDOPT_NO_TYPE, FUSEDOPT_ERROR_TYPE, "sets[0].grad_type is 0");
    REFUSES(set.state_type = (fusedopt_type)-1, FUSEDOPT_ERROR_TYPE, "sets[0].state_type is");
    REFUSES(set.state_type = FUSEDOPT_NO_TYPE, FUSEDOPT_ERROR_TYPE,
            "gradients and no states; adamw was");
    REFUSES(set.grad_type = FUSEDOPT_FLOAT64, FUSEDOPT_ERROR_TYPE,
            "float32 parameters, float64 gradients and float32 states; adamw was compiled for "
            "float32/float32/float32, ");
    REFUSES(addresses[2][1] = (char *)addresses[2][1] + 2, FUSEDOPT_ERROR_VALUE,
            "which is not a multiple of its type's 4 bytes");
}

static void check_values(void)
{
    uint32_t groups[N_TENSORS] = {0, 0, 1};
    REFUSES(set.group = groups, FUSEDOPT_ERROR_VALUE, "sets[0].group[2] is 1, and there are 1");
    REFUSES(group.lr = NAN, FUSEDOPT_ERROR_VALUE, "groups[0].lr is nan");
    REFUSES(group.lr = -1, FUSEDOPT_ERROR_VALUE, "groups[0].lr is -1; it must be a finite number");
    REFUSES(group.lr = INFINITY, FUSEDOPT_ERROR_VALUE, "groups[0].lr is inf");
    REFUSES(group.beta1 = 1, FUSEDOPT_ERROR_VALUE, "groups[0].beta1 is 1");
    REFUSES(group.beta2 = -0.1, FUSEDOPT_ERROR_VALUE, "groups[0].beta2 is -0.1");
    REFUSES(group.eps = -1e-8, FUSEDOPT_ERROR_VALUE, "groups[0].eps is -1e-08");
    REFUSES(group.weight_decay = NAN, FUSEDOPT_ERROR_VALUE, "groups[0].weight_decay is nan");
    REFUSES(group.step = 0, FUSEDOPT_ERROR_VALUE, "groups[0].step is 0; it counts from 1");
    REFUSES(control.max_norm = NAN, FUSEDOPT_ERROR_VALUE, "control->max_norm is nan");
    REFUSES(control.norm_type = (fusedopt_norm_type)3, FUSEDOPT_ERROR_VALUE, "norm_type is 3");
    REFUSES(control.norm = (float *)0x1001, FUSEDOPT_ERROR_VALUE, "control->norm is 0x1001");
    REFUSES(control.found_inf = (float *)0x1002, FUSEDOPT_ERROR_VALUE, "control->found_inf is");
    fusedopt_sgd sgd = {.lr = 0.1, .nesterov = 1, .step = 1};
    const char *const nesterov = "groups[0]: nesterov needs momentum > 0 and dampening = 0";
    expect_failure(fusedopt_sgd_step(context, &set, 1, &sgd, 1, NULL, NULL), FUSEDOPT_ERROR_VALUE,
                   nesterov, __LINE__);
    sgd.momentum = 0.9, sgd.dampening = 0.5;
    expect_failure(fusedopt_sgd_step(context, &set, 1, &sgd, 1, NULL, NULL), FUSEDOPT_ERROR_VALUE,
                   nesterov, __LINE__);
    start_again();
    expect_failure(fusedopt_adamw_step(context, &set, 1, &group, 1, NULL, (fusedopt_stream)0xca9),
                   FUSEDOPT_ERROR_VALUE, "capturing a CUDA graph", __LINE__);
}

static void check_what_is_allowed(void)
{
    start_again();
    standin_reset();
    EXPECT(fusedopt_adamw_step(context, NULL, 0, NULL, 0, NULL, NULL) == FUSEDOPT_OK, "%s",
           fusedopt_last_error());
    const int64_t none[N_TENSORS] = {0, 0, 0};
    fusedopt_tensors empty = {.count = N_TENSORS, .numel = none,
                              .param_type = FUSEDOPT_FLOAT32, .grad_type = FUSEDOPT_FLOAT32};
    EXPECT(fusedopt_adamw_step(context, &empty, 1, &group, 1, NULL, NULL) == FUSEDOPT_OK, "%s",
           fusedopt_last_error());
    EXPECT(standin_calls("cuLaunchKernel") == 0, "a launch for no element");
    /* The norm of nothing. */
    float norm = -1;
    const CUdeviceptr place = device_new(sizeof norm);
    control = (fusedopt_control){.norm = (float *)(uintptr_t)place};
    EXPECT(fusedopt_adamw_step(context, &empty, 1, &group, 1, &control, NULL) == FUSEDOPT_OK, "%s",
           fusedopt_last_error());
    device_read(&norm, place, sizeof norm);
    EXPECT(norm == 0, "the norm of nothing is %g", (double)norm);
    device_free(place);
    /* SGD without momentum has no states, and their type is not looked at. */
    const fusedopt_type types[] = {FUSEDOPT_NO_TYPE, FUSEDOPT_FLOAT64, (fusedopt_type)77};
    const fusedopt_sgd sgd = {.lr = 0.1, .step = 1};
    for (size_t i = 0; i < COUNT(types); i++) {
        start_again();
        set.state[0] = set.state[1] = set.state[2] = NULL;
        set.state_type = types[i];
        EXPECT(fusedopt_sgd_step(context, &set, 1, &sgd, 1, NULL, NULL) == FUSEDOPT_OK, "%s",
               fusedopt_last_error());
    }
    EXPECT(standin_fault()[0] == '\0', "%s", standin_fault());
}

int main(void)
{
    open_fixture();
    check_nulls();
    check_sizes_and_types();
    check_values();
    check_what_is_allowed();
    return close_fixture(0);
}
