/* Steps of the library against the reference, on the stand-in driver or on a GPU. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "expect.h"
#include "model.h"
#include "values.h"

int failures = 0;

/* Whole blocks of both kernels, tails, single elements, and none. */
static const int64_t sizes[] = {1024, 7, 513, 0, 2048, 1025, 1, 4097, 511};
static const int64_t other_sizes[] = {100, 512, 3000};

static const struct types all_types[] = {
    {FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT32},
    {FUSEDOPT_BFLOAT16, FUSEDOPT_BFLOAT16, FUSEDOPT_BFLOAT16},
    {FUSEDOPT_FLOAT16, FUSEDOPT_FLOAT16, FUSEDOPT_FLOAT16},
    {FUSEDOPT_BFLOAT16, FUSEDOPT_BFLOAT16, FUSEDOPT_FLOAT32},
    {FUSEDOPT_FLOAT32, FUSEDOPT_BFLOAT16, FUSEDOPT_FLOAT32},
    {FUSEDOPT_FLOAT64, FUSEDOPT_FLOAT64, FUSEDOPT_FLOAT64},
};

/* What the groups of a case share; the second group selects other code and ascends. */
static const struct hyper cases[] = {
    {.algorithm = ADAM, .lr = 0.1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-3, .weight_decay = 0.1},
    {.algorithm = ADAMW, .lr = 0.1, .beta1 = 0.3, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.1},
    {.algorithm = SGD, .lr = 0.3, .weight_decay = 0.1},
    {.algorithm = SGD, .lr = 0.3, .momentum = 0.9, .dampening = 0.4},
    {.algorithm = SGD, .lr = 0.3, .momentum = 0.9, .nesterov = 1},
    {.algorithm = RMSPROP, .lr = 0.1, .alpha = 0.9, .eps = 1e-2},
    {.algorithm = RMSPROP, .lr = 0.1, .alpha = 0.9, .eps = 1e-2, .momentum = 0.9},
};

struct control {
    const char *name;
    double max_norm;
    fusedopt_norm_type norm_type;
    int wants_norm;
    float grad_scale, found_inf; /* 0: none */
};

static const struct control controls[] = {
    {"plain", 0, FUSEDOPT_NORM_2, 0, 0, 0},
    {"clipped", 20.0, FUSEDOPT_NORM_2, 1, 0, 0},
    {"clipped by the largest", 0.25, FUSEDOPT_NORM_INF, 1, 0, 0},
    {"norm alone", 0, FUSEDOPT_NORM_2, 1, 0, 0},
    {"bound beyond the norm", 1e6, FUSEDOPT_NORM_2, 1, 0, 0},
    {"scaled", 0, FUSEDOPT_NORM_2, 0, 8, 0},
    {"scaled, norm alone", 0, FUSEDOPT_NORM_2, 1, 8, 0},
    {"scaled and clipped", 20.0, FUSEDOPT_NORM_2, 1, 8, 0},
    {"overflow", 2.0, FUSEDOPT_NORM_2, 1, 8, 1},
};

static void make_groups(const struct hyper *common, int64_t step, struct hyper *groups)
{
    for (int i = 0; i < N_GROUPS; i++) {
        groups[i] = *common;
        groups[i].lr *= 1 + i;
        groups[i].step = step + i;
    }
    groups[1].maximize = 1;
    groups[1].amsgrad = groups[1].centered = 1;
    groups[2].weight_decay = 0;
}

/* What a test has on the device besides tensors; none of it is aligned on 16 bytes. */
enum { NORM_PLACE = 1, SCALE_PLACE = 2, FLAG_PLACE = 3, N_PLACES = 4 };

static fusedopt_control make_control(const struct control *control, CUdeviceptr memory)
{
    const float values[N_PLACES] = {
        [NORM_PLACE] = -1, [SCALE_PLACE] = control->grad_scale, [FLAG_PLACE] = control->found_inf};
    float *const at = (float *)(uintptr_t)memory;
    device_write(memory, values, sizeof values);
    return (fusedopt_control){
        .max_norm = control->max_norm,
        .norm_type = control->norm_type,
        .norm = control->wants_norm ? at + NORM_PLACE : NULL,
        .grad_scale = control->grad_scale != 0 ? at + SCALE_PLACE : NULL,
        .found_inf = control->grad_scale != 0 ? at + FLAG_PLACE : NULL,
    };
}

/* Norm of the unscaled gradients of all models. */
static double expected_norm(struct model *const *models, size_t n_models, double inverse,
                            int infinity)
{
    double total = 0;
    for (size_t m = 0; m < n_models; m++)
        for (size_t tensor = 0; tensor < models[m]->count; tensor++) {
            double *g = read_operand(models[m], tensor, 1);
            for (int64_t i = 0; i < models[m]->numel[tensor]; i++) {
                const double x = fabs(g[i] * inverse);
                total = infinity ? fmax(total, x) : total + x * x;
            }
            free(g);
        }
    return infinity ? total : sqrt(total);
}

/* Values of all operands of a model. */
struct snapshot {
    double *values[MOST_TENSORS][N_OPERANDS];
};

static void take_snapshot(const struct model *model, struct snapshot *snapshot)
{
    for (size_t tensor = 0; tensor < model->count; tensor++)
        for (int i = 0; i < N_OPERANDS; i++)
            snapshot->values[tensor][i] = read_operand(model, tensor, i);
}

static void free_snapshot(const struct model *model, struct snapshot *snapshot)
{
    for (size_t tensor = 0; tensor < model->count; tensor++)
        for (int i = 0; i < N_OPERANDS; i++)
            free(snapshot->values[tensor][i]);
}

/* One element: what the reference makes of its operands (parameter, gradient, states). */
static void expected_values(const struct hyper *hyper, double factor, const double *operands,
                            double *values)
{
    memcpy(values, operands, N_OPERANDS * sizeof *values);
    if (!isnan(factor))
        reference_step(hyper, &values[0], values[1] * factor, &values[2]);
}

/* How far each value may be off: the rounding of its type, some of float (of double for float64, but
 * the norm of a clipped step is summed in float where a gradient is), and what the result changes by
 * where the operands change by as much. */
static void allowed_errors(const struct hyper *hyper, double factor, int single,
                           const fusedopt_type *types, const double *operands,
                           const double *values, double *allowed)
{
    const double unit = ldexp(1.0, single ? -23 : -52);
    for (int i = 0; i < N_OPERANDS; i++) {
        const double magnitude =
            fmax(fmax(fabs(values[i]), fabs(operands[i])), fabs(values[i] - operands[i]));
        allowed[i] = 0.5001 * unit_in_last_place(types[i], magnitude) + 4 * unit * magnitude;
    }
    for (int j = 0; j < N_OPERANDS; j++) {
        double changed[N_OPERANDS], result[N_OPERANDS];
        memcpy(changed, operands, sizeof changed);
        changed[j] *= 1 + 4 * unit;
        expected_values(hyper, factor, changed, result);
        for (int i = 0; i < N_OPERANDS; i++)
            allowed[i] += fabs(result[i] - values[i]);
    }
    /* Never written. */
    allowed[1] = 0;
    for (int i = 0; i < N_OPERANDS && isnan(factor); i++)
        allowed[i] = 0;
}

static void compare_tensor(const struct model *model, size_t tensor, const struct hyper *hyper,
                           const struct snapshot *before, double factor, int single,
                           const char *name)
{
    double *after[N_OPERANDS], worst = 0;
    fusedopt_type types[N_OPERANDS];
    size_t wrong = 0, moved = 0;
    const int64_t numel = model->numel[tensor];
    for (int i = 0; i < N_OPERANDS; i++) {
        after[i] = read_operand(model, tensor, i);
        types[i] = model->operand[tensor][i].type;
    }
    for (int64_t e = 0; e < numel; e++) {
        double operands[N_OPERANDS], values[N_OPERANDS], allowed[N_OPERANDS];
        for (int i = 0; i < N_OPERANDS; i++)
            operands[i] = before->values[tensor][i][e];
        expected_values(hyper, factor, operands, values);
        allowed_errors(hyper, factor, single, types, operands, values, allowed);
        for (int i = 0; i < N_OPERANDS; i++) {
            const double error = fabs(after[i][e] - values[i]);
            wrong += !(error <= allowed[i]);
            worst = fmax(worst, error / (allowed[i] > 0 ? allowed[i] : 1));
        }
        moved += fabs(after[0][e] - operands[0]) > 4 * allowed[0];
    }
    EXPECT(wrong == 0, "%s, tensor %zu of %lld elements: %zu values are off, at worst %g times what "
           "is allowed", name, tensor, (long long)numel, wrong, worst);
    /* A step of nothing must not pass for a step. */
    EXPECT(isnan(factor) || moved * 10 >= (size_t)numel * 8,
           "%s, tensor %zu: %zu of %lld parameters moved by more than is allowed", name, tensor,
           moved, (long long)numel);
    for (int i = 0; i < N_OPERANDS; i++)
        free(after[i]);
}

static void check_step(fusedopt_context *context, struct model *const *models,
                       const struct hyper *groups, const struct control *control,
                       CUdeviceptr scalars, const char *name)
{
    struct snapshot before[2];
    fusedopt_tensors sets[2];
    const double inverse = control->grad_scale != 0 ? 1.0 / (double)control->grad_scale : 1.0;
    const double norm = expected_norm(models, 2, inverse, control->norm_type == FUSEDOPT_NORM_INF);
    double factor = control->max_norm > 0 ? fmin(1, control->max_norm / (norm + 1e-6)) : 1;
    factor = control->found_inf != 0 ? NAN : factor * inverse;
    for (int m = 0; m < 2; m++) {
        take_snapshot(models[m], &before[m]);
        sets[m] = models[m]->set;
    }
    const fusedopt_control options = make_control(control, scalars);
    const fusedopt_status status =
        take_step(context, sets, 2, groups, N_GROUPS, &options, NULL);
    EXPECT(status == FUSEDOPT_OK, "%s: %s", name, fusedopt_last_error());
    device_wait();
    for (int m = 0; m < 2; m++) {
        const int single = control->max_norm > 0 || models[m]->set.param_type != FUSEDOPT_FLOAT64;
        for (size_t tensor = 0; tensor < models[m]->count; tensor++)
            compare_tensor(models[m], tensor, &groups[models[m]->group[tensor]], &before[m],
                           factor, single, name);
        free_snapshot(models[m], &before[m]);
    }
    if (control->wants_norm) {
        float found[N_PLACES];
        device_read(found, scalars, sizeof found);
        EXPECT(fabs(found[NORM_PLACE] - norm) <= 1e-5 * norm, "%s: norm %g instead of %g", name,
               (double)found[NORM_PLACE], norm);
    }
}

static void run_case(fusedopt_context *context, const struct hyper *common, struct types types,
                     const struct control *control)
{
    uint64_t seed = 1;
    struct model first, second, *models[] = {&first, &second};
    char name[128];
    CUdeviceptr scalars = device_new(N_PLACES * sizeof(float));
    make_model(&first, sizes, COUNT(sizes), types, &seed);
    make_model(&second, other_sizes, COUNT(other_sizes), all_types[0], &seed);
    for (int step = 1; step <= 3; step++) {
        struct hyper groups[N_GROUPS];
        make_groups(common, step, groups);
        snprintf(name, sizeof name, "algorithm %d (momentum %g), types %d/%d/%d, %s, step %d",
                 common->algorithm, common->momentum, types.param, types.grad, types.state,
                 control->name, step);
        check_step(context, models, groups, control, scalars, name);
        /* The second time in place, the third elsewhere. */
        for (int m = 0; m < 2; m++)
            new_gradients(models[m], control->grad_scale != 0 ? 8.0 : 1.0, step == 2, &seed);
    }
    for (int m = 0; m < 2; m++) {
        EXPECT(device_fault()[0] == '\0', "%s: %s", name, device_fault());
        EXPECT(surroundings_are_whole(models[m]), "%s: wrote outside of a tensor", name);
        free_model(models[m]);
    }
    device_free(scalars);
}

int main(void)
{
    fusedopt_context *context = first_context();
    for (size_t c = 0; c < COUNT(cases); c++)
        for (size_t t = 0; t < COUNT(all_types); t++)
            for (size_t k = 0; k < COUNT(controls); k++)
                run_case(context, &cases[c], all_types[t], &controls[k]);
    fusedopt_destroy(context);
    printf("%d failures\n", failures);
    return failures != 0;
}
