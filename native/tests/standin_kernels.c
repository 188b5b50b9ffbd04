/* The kernels of the stand-in driver. */
#include <math.h>
#include <string.h>

#include "emulation.h"
#include "standin_internal.h"
#include "values.h"

enum { MOST_COEFFICIENTS = 16, MOST_OPERANDS = 2 + FUSEDOPT_MAX_STATES, ALIGNMENT = 16 };

static const struct {
    const char *kernel, *sizes; /* bytes of each argument */
} signatures[] = {
    {"update_tensors", "848888"},
    {"partial_norms", "848888"},
    {"clip_factor", "848888"},
    {"load_scaler", "8888"},
};

CUresult read_arguments(struct launch *launch, void **parameters)
{
    for (size_t i = 0; i < sizeof signatures / sizeof *signatures; i++) {
        if (strcmp(signatures[i].kernel, launch->variant->kernel) != 0)
            continue;
        for (size_t k = 0; signatures[i].sizes[k] != '\0'; k++) {
            const int bytes = signatures[i].sizes[k] - '0';
            memcpy(&launch->argument[k], parameters[k], (size_t)bytes);
            /* Pointers are compiled as multiples of 16; load_scaler's two addresses are integers. */
            if (bytes == 8 && launch->argument[k] % ALIGNMENT != 0 && (i != 3 || k >= 2))
                fault("argument %zu of %s is not aligned", k, launch->variant->name);
        }
        return CUDA_SUCCESS;
    }
    fault("no kernel %s", launch->variant->kernel);
    return CUDA_ERROR_INVALID_VALUE;
}

/* The tensor of a program, and its elements. */
struct chunk {
    const int64_t *column;
    uint32_t width;
    int64_t start, stop;
};

static int find_chunk(const struct launch *launch, uint32_t program, size_t rows,
                      struct chunk *chunk)
{
    const uint32_t width = (uint32_t)launch->argument[1];
    const int64_t *table = at_device(launch->argument[0], rows * width * sizeof *table);
    const int32_t *tensor = at_device(launch->argument[2], launch->programs * sizeof *tensor);
    const int32_t *index = at_device(launch->argument[3], launch->programs * sizeof *index);
    if (table == NULL || tensor == NULL || index == NULL)
        return 0;
    if (tensor[program] < 0 || (uint32_t)tensor[program] >= width || index[program] < 0) {
        fault("program %u of %s has chunk %d of tensor %d", program, launch->variant->name,
              index[program], tensor[program]);
        return 0;
    }
    chunk->column = table + tensor[program];
    chunk->width = width;
    chunk->start = (int64_t)index[program] * launch->variant->block;
    chunk->stop = chunk->start + launch->variant->block;
    if (chunk->stop > chunk->column[0])
        chunk->stop = chunk->column[0];
    if (chunk->start >= chunk->stop)
        fault("program %u of %s has no elements", program, launch->variant->name);
    return chunk->start < chunk->stop;
}

static void *operand(const struct launch *launch, const struct chunk *chunk, size_t row,
                     fusedopt_type type)
{
    const CUdeviceptr address = (CUdeviceptr)chunk->column[(2 + row) * chunk->width];
    if (launch->variant->aligned && address % ALIGNMENT != 0)
        fault("operand %zu of %s is not aligned", row, launch->variant->name);
    return at_device(address, (size_t)chunk->column[0] * value_bytes(type));
}

static const struct emulation *find_emulation(const fusedopt_variant *variant)
{
    for (size_t i = 0; i < emulation_count; i++)
        if (strcmp(emulations[i].rule, variant->rule) == 0 &&
            strcmp(emulations[i].options, variant->options) == 0)
            return &emulations[i];
    fault("no rule for %s", variant->name);
    return NULL;
}

static void update_element(const struct emulation *rule, int is_wide, const double *row,
                           double scale, double *values)
{
    const int n_values = 2 + rule->n_states;
    if (is_wide) {
        values[1] *= scale;
        rule->wide(row, values);
        return;
    }
    float c[MOST_COEFFICIENTS], v[MOST_OPERANDS];
    for (int i = 0; i < rule->n_coefficients; i++)
        c[i] = (float)row[i];
    for (int i = 0; i < n_values; i++)
        v[i] = (float)values[i];
    v[1] *= (float)scale;
    rule->single(c, v);
    for (int i = 0; i < n_values; i++)
        values[i] = v[i];
}

static void update_chunk(const struct launch *launch, uint32_t program)
{
    const fusedopt_variant *variant = launch->variant;
    const struct emulation *rule = find_emulation(variant);
    const double *control = at_device(launch->argument[5], 2 * sizeof *control);
    struct chunk chunk;
    if (rule == NULL || control == NULL || control[1] != 0.0 ||
        !find_chunk(launch, program, (size_t)(4 + rule->n_states), &chunk))
        return;
    const size_t count = (size_t)rule->n_coefficients;
    const CUdeviceptr rows = launch->argument[4];
    const size_t row = (size_t)chunk.column[chunk.width] * count * sizeof(double);
    const double *coefficients = at_device(rows + row, count * sizeof(double));
    fusedopt_type types[MOST_OPERANDS] = {variant->param_type, variant->grad_type};
    void *memory[MOST_OPERANDS] = {0};
    const int n_operands = 2 + rule->n_states;
    for (int i = 0; i < n_operands; i++) {
        types[i] = i < 2 ? types[i] : variant->state_type;
        memory[i] = operand(launch, &chunk, (size_t)i, types[i]);
        if (memory[i] == NULL || coefficients == NULL)
            return;
    }
    for (int64_t e = chunk.start; e < chunk.stop; e++) {
        double values[MOST_OPERANDS];
        for (int i = 0; i < n_operands; i++)
            values[i] = get_value(types[i], memory[i], (size_t)e);
        update_element(rule, variant->param_type == FUSEDOPT_FLOAT64, coefficients, control[0],
                       values);
        for (int i = 0; i < n_operands; i++)
            if (i != 1)
                set_value(types[i], memory[i], (size_t)e, values[i]);
    }
}

static double accumulate(double total, double x, int infinity)
{
    if (!infinity)
        return total + x * x;
    return total != total || x != x ? NAN : fmax(total, fabs(x));
}

static void partial_norm(const struct launch *launch, uint32_t program)
{
    const fusedopt_variant *variant = launch->variant;
    const double *inverse = at_device(launch->argument[4], sizeof *inverse);
    double *partials = at_device(launch->argument[5], launch->programs * sizeof *partials);
    struct chunk chunk;
    if (inverse == NULL || partials == NULL || !find_chunk(launch, program, 4, &chunk))
        return;
    const void *gradient = operand(launch, &chunk, 1, variant->grad_type);
    double total = 0.0;
    for (int64_t e = chunk.start; gradient != NULL && e < chunk.stop; e++)
        total = accumulate(total, *inverse * get_value(variant->grad_type, gradient, (size_t)e),
                           strcmp(variant->options, "inf") == 0);
    partials[program] = total;
}

static void clip_factor(const struct launch *launch)
{
    const uint32_t count = (uint32_t)launch->argument[1];
    const int infinity = strcmp(launch->variant->options, "inf") == 0;
    const double *partials = count ? at_device(launch->argument[0], count * sizeof *partials) : NULL;
    const double *inverse = at_device(launch->argument[2], sizeof *inverse);
    const double *max_norm = at_device(launch->argument[3], sizeof *max_norm);
    double *control = at_device(launch->argument[4], sizeof *control);
    float *norm = at_device(launch->argument[5], sizeof *norm);
    if ((count && !partials) || !inverse || !max_norm || !control || !norm)
        return;
    double value = 0.0;
    for (uint32_t i = 0; i < count; i++)
        value = infinity ? accumulate(value, partials[i], 1) : value + partials[i];
    value = infinity ? value : sqrt(value);
    const double factor = *max_norm / (value + 1e-6);
    *control = (factor > 1.0 ? 1.0 : factor) * *inverse;
    *norm = (float)value;
}

static void load_scaler(const struct launch *launch)
{
    const float *scale = launch->argument[0] ? at_device(launch->argument[0], 4) : NULL;
    const float *found_inf = launch->argument[1] ? at_device(launch->argument[1], 4) : NULL;
    double *inverse = at_device(launch->argument[2], sizeof *inverse);
    double *control = at_device(launch->argument[3], 2 * sizeof *control);
    if (inverse == NULL || control == NULL)
        return;
    *inverse = control[0] = scale != NULL ? 1.0 / (double)*scale : 1.0;
    control[1] = found_inf != NULL ? (double)*found_inf : 0.0;
}

void run_kernel(const struct launch *launch)
{
    const char *kernel = launch->variant->kernel;
    if (strcmp(kernel, "clip_factor") == 0)
        clip_factor(launch);
    else if (strcmp(kernel, "load_scaler") == 0)
        load_scaler(launch);
    else
        for (uint32_t program = 0; program < launch->programs; program++) {
            if (strcmp(kernel, "update_tensors") == 0)
                update_chunk(launch, program);
            else
                partial_norm(launch, program);
        }
}
