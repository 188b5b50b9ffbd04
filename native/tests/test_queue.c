/* Steps that are queued one behind the other, on the stand-in driver or on a GPU: no table is
 * overwritten before it was read, none is read before it is there, and none of an earlier step is
 * taken for this step's. */
#include <stdlib.h>
#include <string.h>

#include "expect.h"
#include "model.h"

int failures = 0;

enum { N_STEPS = 8, N_TENSORS = 6, N_GRADIENTS = 2 };

static const int64_t sizes[] = {3000, 5, 513, 1024, 4097, 2048};
static const struct types float32 = {FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32};

/* CU_STREAM_PER_THREAD is a stream of every driver. */
static const fusedopt_stream streams[] = {NULL, (fusedopt_stream)0x2};

/* The step's hyper-parameters, sizes and gradients differ from the last one's, each at times alone. */
static fusedopt_status queue_step(fusedopt_context *context, const struct model *models, int step)
{
    struct hyper groups[N_GROUPS];
    int64_t numel[N_TENSORS];
    for (int i = 0; i < N_GROUPS; i++)
        groups[i] = (struct hyper){.algorithm = ADAMW, .lr = 0.01 * (i + 1), .beta1 = 0.9,
                                   .beta2 = 0.99, .eps = 1e-3, .amsgrad = i == 1,
                                   .step = (step + 1) / 2};
    for (int i = 0; i < N_TENSORS; i++)
        numel[i] = step % 3 == 0 ? 1 + sizes[i] / 3 : sizes[i];
    fusedopt_tensors set = models[0].set;
    set.numel = numel;
    set.grad = models[step / 2 % N_GRADIENTS].set.grad;
    /* Two steps of three have a norm, whose maps are made later than those of the update. */
    const fusedopt_control control = {.max_norm = step % 3 == 1 ? 0 : 1.0 + step};
    return take_step(context, &set, 1, groups, N_GROUPS, &control, streams[step / 2 % 2]);
}

/* Every step in a context of its own, which knows nothing of the last, and with a wait behind it; or
 * all in one context, without. */
static void run_steps(fusedopt_context *context, double *results[N_TENSORS])
{
    uint64_t seed = 7;
    struct model models[N_GRADIENTS];
    for (int m = 0; m < N_GRADIENTS; m++)
        make_model(&models[m], sizes, N_TENSORS, float32, &seed);
    for (int step = 1; step <= N_STEPS; step++) {
        fusedopt_context *fresh = context;
        if (context == NULL)
            EXPECT(fusedopt_init(&fresh, 0) == FUSEDOPT_OK, "%s", fusedopt_last_error());
        EXPECT(queue_step(fresh, models, step) == FUSEDOPT_OK, "step %d: %s", step,
               fusedopt_last_error());
        if (context == NULL) {
            device_wait();
            fusedopt_destroy(fresh);
        }
    }
    device_wait();
    for (size_t i = 0; i < N_TENSORS; i++)
        results[i] = read_operand(&models[0], i, 0);
    for (int m = 0; m < N_GRADIENTS; m++)
        free_model(&models[m]);
}

int main(void)
{
    fusedopt_context *context = first_context();
    double *queued[N_TENSORS], *alone[N_TENSORS];
    run_steps(NULL, alone);
    run_steps(context, queued);
    for (size_t i = 0; i < N_TENSORS; i++) {
        EXPECT(memcmp(queued[i], alone[i], (size_t)sizes[i] * sizeof *queued[i]) == 0,
               "queued steps give other values of tensor %zu", i);
        free(queued[i]);
        free(alone[i]);
    }
    EXPECT(device_fault()[0] == '\0', "%s", device_fault());
    fusedopt_destroy(context);
    printf("%d failures\n", failures);
    return failures != 0;
}
