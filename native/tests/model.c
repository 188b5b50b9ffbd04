#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "values.h"

enum { SKIPPED = 77 };

fusedopt_context *first_context(void)
{
    fusedopt_context *context = NULL;
    const fusedopt_status status = fusedopt_init(&context, 0);
    if (status == FUSEDOPT_ERROR_DRIVER || status == FUSEDOPT_ERROR_DEVICE ||
        status == FUSEDOPT_ERROR_ARCHITECTURE) {
        printf("skipped: %s\n", fusedopt_last_error());
        exit(SKIPPED);
    }
    if (status != FUSEDOPT_OK || !device_open()) {
        fprintf(stderr, "no context: %s\n", fusedopt_last_error());
        exit(1);
    }
    return context;
}

/* Elements around an array, and the byte that fills them. */
enum { MARGIN = 16, FILLER = 0x5a };

double random_number(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(*seed >> 11) / 4503599627370496.0 - 1.0;
}

static size_t whole_bytes(const struct array *array)
{
    return (array->offset + array->numel + MARGIN) * value_bytes(array->type);
}

static void *address_of(const struct array *array)
{
    return (void *)(uintptr_t)(array->memory + array->offset * value_bytes(array->type));
}

/* Make an array with values in [-scale, scale). */
static void fill_array(struct array *array, double scale, uint64_t *seed)
{
    unsigned char *bytes = malloc(whole_bytes(array));
    memset(bytes, FILLER, whole_bytes(array));
    for (size_t i = 0; i < array->numel; i++)
        set_value(array->type, bytes, array->offset + i, scale * random_number(seed));
    array->memory = device_new(whole_bytes(array));
    device_write(array->memory, bytes, whole_bytes(array));
    free(bytes);
}

/* Every third tensor is off its alignment: the first of them in all operands, the next in one. */
static int is_aligned(size_t tensor, int operand)
{
    return tensor % 3 != 2 || (tensor > 2 && operand != (int)(tensor / 3) - 1);
}

static void make_tensor(struct model *model, size_t tensor, struct types types, uint64_t *seed)
{
    for (int i = 0; i < N_OPERANDS; i++) {
        struct array *array = &model->operand[tensor][i];
        array->type = i == 0 ? types.param : i == 1 ? types.grad : types.state;
        array->numel = (size_t)model->numel[tensor];
        array->offset = MARGIN + !is_aligned(tensor, i);
        fill_array(array, i < 2 ? 1.0 : 0.0, seed);
        model->address[i][tensor] = address_of(array);
    }
}

void make_model(struct model *model, const int64_t *numel, size_t count, struct types types,
                uint64_t *seed)
{
    memset(model, 0, sizeof *model);
    model->count = count;
    for (size_t tensor = 0; tensor < count; tensor++) {
        model->numel[tensor] = numel[tensor];
        model->group[tensor] = (uint32_t)(tensor % N_GROUPS);
        make_tensor(model, tensor, types, seed);
    }
    model->set = (fusedopt_tensors){
        .count = count,
        .numel = model->numel,
        .param = model->address[0],
        .grad = (const void *const *)model->address[1],
        .group = model->group,
        .param_type = types.param,
        .grad_type = types.grad,
        .state_type = types.state,
    };
    for (int i = 0; i < FUSEDOPT_MAX_STATES; i++)
        model->set.state[i] = model->address[2 + i];
}

void free_model(struct model *model)
{
    for (size_t tensor = 0; tensor < model->count; tensor++)
        for (int i = 0; i < N_OPERANDS; i++)
            device_free(model->operand[tensor][i].memory);
}

void new_gradients(struct model *model, double scale, int moved, uint64_t *seed)
{
    for (size_t tensor = 0; tensor < model->count; tensor++) {
        struct array *array = &model->operand[tensor][1];
        const CUdeviceptr old = array->memory;
        fill_array(array, scale, seed);
        if (moved) {
            device_free(old);
        } else {
            unsigned char *bytes = malloc(whole_bytes(array));
            device_read(bytes, array->memory, whole_bytes(array));
            device_write(old, bytes, whole_bytes(array));
            free(bytes);
            device_free(array->memory);
            array->memory = old;
        }
        model->address[1][tensor] = address_of(array);
    }
}

double *read_operand(const struct model *model, size_t tensor, int operand)
{
    const struct array *array = &model->operand[tensor][operand];
    unsigned char *bytes = malloc(whole_bytes(array));
    double *values = malloc((array->numel + 1) * sizeof *values);
    device_read(bytes, array->memory, whole_bytes(array));
    for (size_t i = 0; i < array->numel; i++)
        values[i] = get_value(array->type, bytes, array->offset + i);
    free(bytes);
    return values;
}

static int array_is_whole(const struct array *array)
{
    const size_t size = value_bytes(array->type);
    const size_t first = array->offset * size, end = first + array->numel * size;
    unsigned char *bytes = malloc(whole_bytes(array));
    device_read(bytes, array->memory, whole_bytes(array));
    int whole = 1;
    for (size_t i = 0; i < whole_bytes(array); i++)
        whole &= (i >= first && i < end) || bytes[i] == FILLER;
    free(bytes);
    return whole;
}

int surroundings_are_whole(const struct model *model)
{
    int whole = 1;
    for (size_t tensor = 0; tensor < model->count; tensor++)
        for (int i = 0; i < N_OPERANDS; i++)
            whole &= array_is_whole(&model->operand[tensor][i]);
    return whole;
}

fusedopt_status take_step(fusedopt_context *context, const fusedopt_tensors *sets, size_t n_sets,
                          const struct hyper *groups, size_t n_groups,
                          const fusedopt_control *control, fusedopt_stream stream)
{
    fusedopt_adam adam[N_GROUPS];
    fusedopt_adamw adamw[N_GROUPS];
    fusedopt_sgd sgd[N_GROUPS];
    fusedopt_rmsprop rmsprop[N_GROUPS];
    for (size_t i = 0; i < n_groups; i++) {
        const struct hyper *h = &groups[i];
        adam[i] = (fusedopt_adam){.lr = h->lr, .beta1 = h->beta1, .beta2 = h->beta2,
                                  .eps = h->eps, .weight_decay = h->weight_decay,
                                  .amsgrad = h->amsgrad, .maximize = h->maximize, .step = h->step};
        adamw[i] = (fusedopt_adamw){.lr = h->lr, .beta1 = h->beta1, .beta2 = h->beta2,
                                    .eps = h->eps, .weight_decay = h->weight_decay,
                                    .amsgrad = h->amsgrad, .maximize = h->maximize,
                                    .step = h->step};
        sgd[i] = (fusedopt_sgd){.lr = h->lr, .momentum = h->momentum, .dampening = h->dampening,
                                .weight_decay = h->weight_decay, .nesterov = h->nesterov,
                                .maximize = h->maximize, .step = h->step};
        rmsprop[i] = (fusedopt_rmsprop){.lr = h->lr, .alpha = h->alpha, .eps = h->eps,
                                        .weight_decay = h->weight_decay, .momentum = h->momentum,
                                        .centered = h->centered, .maximize = h->maximize};
    }
    switch (groups[0].algorithm) {
    case ADAM:
        return fusedopt_adam_step(context, sets, n_sets, adam, n_groups, control, stream);
    case ADAMW:
        return fusedopt_adamw_step(context, sets, n_sets, adamw, n_groups, control, stream);
    case SGD:
        return fusedopt_sgd_step(context, sets, n_sets, sgd, n_groups, control, stream);
    default:
        return fusedopt_rmsprop_step(context, sets, n_sets, rmsprop, n_groups, control, stream);
    }
}
