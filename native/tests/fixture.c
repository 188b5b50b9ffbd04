#include "fixture.h"

#include <string.h>

#include "expect.h"
#include "standin.h"

int failures = 0;

const int64_t sizes[N_TENSORS] = {1000, 5, 2048};
const struct types float32 = {FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32};

struct model model;
fusedopt_context *context;
fusedopt_tensors set;
fusedopt_adamw group;
fusedopt_control control;
void *addresses[N_OPERANDS][MOST_TENSORS];

static int live;

void open_fixture(void)
{
    uint64_t seed = 3;
    context = first_context();
    fusedopt_destroy(context);
    make_model(&model, sizes, N_TENSORS, float32, &seed);
    live = standin_live();
    EXPECT(fusedopt_init(&context, 0) == FUSEDOPT_OK, "%s", fusedopt_last_error());
}

int close_fixture(int kept)
{
    fusedopt_destroy(context);
    EXPECT(standin_live() == live + kept, "%d things leaked", standin_live() - live - kept);
    free_model(&model);
    printf("%d failures\n", failures);
    return failures != 0;
}

void expect_failure(fusedopt_status found, fusedopt_status wanted, const char *words,
                    int line)
{
    EXPECT(found == wanted, "line %d: %s instead of %s: %s", line, fusedopt_status_name(found),
           fusedopt_status_name(wanted), fusedopt_last_error());
    EXPECT(strstr(fusedopt_last_error(), words) != NULL, "line %d: no \"%s\" in: %s", line, words,
           fusedopt_last_error());
    EXPECT(standin_fault()[0] == '\0', "line %d: %s", line, standin_fault());
}

void start_again(void)
{
    memcpy(addresses, model.address, sizeof addresses);
    set = model.set;
    set.param = addresses[0];
    set.grad = (const void *const *)addresses[1];
    for (int i = 0; i < FUSEDOPT_MAX_STATES; i++)
        set.state[i] = addresses[2 + i];
    set.group = NULL;
    group = (fusedopt_adamw){
        .lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-6, .weight_decay = 0.1, .step = 1};
    control = (fusedopt_control){.max_norm = 0};
}

fusedopt_status step_with(fusedopt_context *own)
{
    return fusedopt_adamw_step(own, &set, 1, &group, 1, &control, NULL);
}
