#include "check.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

size_t type_bytes(fusedopt_type type)
{
    switch (type) {
    case FUSEDOPT_FLOAT32:
        return 4;
    case FUSEDOPT_BFLOAT16:
    case FUSEDOPT_FLOAT16:
        return 2;
    case FUSEDOPT_FLOAT64:
        return 8;
    case FUSEDOPT_NO_TYPE:
        break;
    }
    return 0;
}

static const char *type_name(fusedopt_type type)
{
    static const char *const names[] = {"no", "float32", "bfloat16", "float16", "float64"};
    return (unsigned)type < sizeof names / sizeof *names ? names[type] : "unknown";
}

const struct layout *layout_of_group(const struct step *step, size_t group)
{
    const unsigned options =
        step->entry->options(step->groups + group * step->entry->group_bytes);
    for (size_t i = 0; i < step->entry->n_layouts; i++)
        if (step->entry->layouts[i].options == options)
            return &step->entry->layouts[i];
    return NULL;
}

const struct kernel *find_update(const struct step *step, const fusedopt_tensors *set,
                                 const struct layout *layout, int aligned)
{
    for (size_t i = 0; i < step->target->count; i++) {
        const struct kernel *kernel = &library_kernels[step->target->first + i];
        const fusedopt_variant *variant = &kernel->variant;
        if (strcmp(variant->rule, step->entry->rule) == 0 && kernel->options == layout->options &&
            variant->param_type == set->param_type && variant->grad_type == set->grad_type &&
            (layout->n_states == 0 || variant->state_type == set->state_type) &&
            variant->aligned == aligned)
            return kernel;
    }
    return NULL;
}

const struct kernel *find_norm(const struct target *target, const char *name,
                               fusedopt_type grad_type, int aligned, int infinity)
{
    for (size_t i = 0; i < target->count; i++) {
        const struct kernel *kernel = &library_kernels[target->first + i];
        if (strcmp(kernel->variant.kernel, name) == 0 && kernel->variant.grad_type == grad_type &&
            kernel->variant.aligned == aligned && kernel->options == (unsigned)infinity)
            return kernel;
    }
    return NULL;
}

static fusedopt_status check_number(const struct field *field, size_t group, double value)
{
    static const char *const wanted[] = {
        [NOT_NEGATIVE] = "a finite number of at least 0",
        [BELOW_ONE] = "a number of at least 0 and below 1",
        [FINITE] = "a finite number",
    };
    const bool good = isfinite(value) && (field->range == FINITE || value >= 0) &&
                      (field->range != BELOW_ONE || value < 1);
    if (!good)
        return fail(FUSEDOPT_ERROR_VALUE, "groups[%zu].%s is %g; it must be %s", group, field->name,
                    value, wanted[field->range]);
    return FUSEDOPT_OK;
}

static fusedopt_status check_group(const struct step *step, size_t group)
{
    const struct entry_point *entry = step->entry;
    const unsigned char *hyper = step->groups + group * entry->group_bytes;
    for (size_t i = 0; i < entry->n_fields; i++) {
        double value;
        memcpy(&value, hyper + entry->fields[i].offset, sizeof value);
        TRY(check_number(&entry->fields[i], group, value));
    }
    if (entry->step_offset != NO_STEP) {
        int64_t count;
        memcpy(&count, hyper + entry->step_offset, sizeof count);
        if (count < 1)
            return fail(FUSEDOPT_ERROR_VALUE,
                        "groups[%zu].step is %lld; it counts from 1, this step included", group,
                        (long long)count);
    }
    const char *unmet = entry->requirements(hyper);
    if (unmet != NULL)
        return fail(FUSEDOPT_ERROR_VALUE, "groups[%zu]: %s", group, unmet);
    if (layout_of_group(step, group) == NULL)
        return fail(FUSEDOPT_ERROR_VALUE, "groups[%zu] selects code that was not compiled", group);
    return FUSEDOPT_OK;
}

static fusedopt_status check_control(const fusedopt_control *control)
{
    const struct {
        const char *name;
        const void *address;
    } scalars[] = {{"norm", control->norm},
                   {"grad_scale", control->grad_scale},
                   {"found_inf", control->found_inf}};
    if (isnan(control->max_norm))
        return fail(FUSEDOPT_ERROR_VALUE, "control->max_norm is nan; 0 is for no clipping");
    if (control->norm_type != FUSEDOPT_NORM_2 && control->norm_type != FUSEDOPT_NORM_INF)
        return fail(FUSEDOPT_ERROR_VALUE, "control->norm_type is %d; it must be FUSEDOPT_NORM_2 or "
                                          "FUSEDOPT_NORM_INF", (int)control->norm_type);
    for (size_t i = 0; i < sizeof scalars / sizeof *scalars; i++)
        if ((uintptr_t)scalars[i].address % sizeof(float) != 0)
            return fail(FUSEDOPT_ERROR_VALUE, "control->%s is %p, which is no address of a float",
                        scalars[i].name, scalars[i].address);
    return FUSEDOPT_OK;
}

/* List the types that there is code for, where a set has others. */
static fusedopt_status no_kernel(const struct step *step, size_t index,
                                 const struct layout *layout)
{
    const fusedopt_tensors *set = &step->sets[index];
    fail(FUSEDOPT_ERROR_TYPE, "sets[%zu] has %s parameters, %s gradients", index,
         type_name(set->param_type), type_name(set->grad_type));
    if (layout->n_states > 0)
        add_to_message(" and %s states", type_name(set->state_type));
    add_to_message("; %s was compiled for", step->entry->name);
    const char *separator = " ";
    for (size_t i = 0; i < step->target->count; i++) {
        const struct kernel *kernel = &library_kernels[step->target->first + i];
        const fusedopt_variant *variant = &kernel->variant;
        if (strcmp(variant->rule, step->entry->rule) != 0 || !variant->aligned ||
            kernel->options != layout->options)
            continue;
        add_to_message("%s%s/%s", separator, type_name(variant->param_type),
                       type_name(variant->grad_type));
        if (layout->n_states > 0)
            add_to_message("/%s", type_name(variant->state_type));
        separator = ", ";
    }
    add_to_message(" (parameter/gradient%s)", layout->n_states > 0 ? "/states" : "");
    return FUSEDOPT_ERROR_TYPE;
}

/* An operand's array, and its address for one tensor. */
static fusedopt_status check_address(size_t set, const char *name, const char *state,
                                     const void *const *array, size_t tensor, size_t bytes)
{
    char where[96];
    snprintf(where, sizeof where, "sets[%zu].%s", set, name);
    const char *open = state != NULL ? " (" : "", *close = state != NULL ? ")" : "";
    if (state == NULL)
        state = "";
    if (array == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "%s%s%s%s is null, and tensor %zu needs it", where, open,
                    state, close, tensor);
    if (array[tensor] == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "%s[%zu]%s%s%s is null", where, tensor, open, state,
                    close);
    if ((uintptr_t)array[tensor] % bytes != 0)
        return fail(FUSEDOPT_ERROR_VALUE,
                    "%s[%zu]%s%s%s is %p, which is not a multiple of its type's %zu bytes", where,
                    tensor, open, state, close, array[tensor], bytes);
    return FUSEDOPT_OK;
}

/* `block` is the smallest number of elements that a block of threads may get. */
static fusedopt_status check_tensor(const struct step *step, size_t index, size_t tensor,
                                    const struct layout *layout, int block)
{
    static const char *const names[FUSEDOPT_MAX_STATES] = {"state[0]", "state[1]", "state[2]"};
    const fusedopt_tensors *set = &step->sets[index];
    if (set->numel[tensor] / block >= INT32_MAX)
        return fail(FUSEDOPT_ERROR_SIZE, "sets[%zu].numel[%zu] is %lld, which is too large", index,
                    tensor, (long long)set->numel[tensor]);
    TRY(check_address(index, "param", NULL, (const void *const *)set->param, tensor,
                      type_bytes(set->param_type)));
    TRY(check_address(index, "grad", NULL, set->grad, tensor, type_bytes(set->grad_type)));
    for (int i = 0; i < layout->n_states; i++) {
        const int state = layout->state[i];
        TRY(check_address(index, names[state], step->entry->states[state],
                          (const void *const *)set->state[state], tensor,
                          type_bytes(set->state_type)));
    }
    return FUSEDOPT_OK;
}

/* The smaller block of the two kernels that tensors of a set may need. */
static fusedopt_status check_kernels(const struct step *step, size_t index,
                                     const struct layout *layout, int *block)
{
    const struct kernel *aligned = find_update(step, &step->sets[index], layout, 1);
    const struct kernel *unaligned = find_update(step, &step->sets[index], layout, 0);
    if (aligned == NULL || unaligned == NULL)
        return no_kernel(step, index, layout);
    *block = aligned->variant.block < unaligned->variant.block ? aligned->variant.block
                                                                : unaligned->variant.block;
    return FUSEDOPT_OK;
}

static fusedopt_status check_tensors(const struct step *step, size_t index)
{
    const fusedopt_tensors *set = &step->sets[index];
    const struct layout *known = NULL;
    int block = 1;
    for (size_t tensor = 0; tensor < set->count; tensor++) {
        const size_t group = group_of(set, tensor);
        if (set->numel[tensor] < 0)
            return fail(FUSEDOPT_ERROR_SIZE, "sets[%zu].numel[%zu] is %lld, which is negative",
                        index, tensor, (long long)set->numel[tensor]);
        if (group >= step->n_groups)
            return fail(FUSEDOPT_ERROR_VALUE,
                        "sets[%zu].group[%zu] is %zu, and there are %zu groups", index, tensor,
                        group, step->n_groups);
        if (set->numel[tensor] == 0)
            continue;
        const struct layout *layout = layout_of_group(step, group);
        if (layout != known)
            TRY(check_kernels(step, index, layout, &block));
        known = layout;
        TRY(check_tensor(step, index, tensor, layout, block));
    }
    return FUSEDOPT_OK;
}

static fusedopt_status check_set(const struct step *step, size_t index)
{
    const fusedopt_tensors *set = &step->sets[index];
    if (set->count > INT32_MAX)
        return fail(FUSEDOPT_ERROR_SIZE, "sets[%zu].count is %zu; at most %d tensors fit a set",
                    index, set->count, INT32_MAX);
    if (set->count > 0 && set->numel == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "sets[%zu].numel is null", index);
    return check_tensors(step, index);
}

static bool has_states(const struct step *step)
{
    for (size_t group = 0; group < step->n_groups; group++)
        if (layout_of_group(step, group)->n_states > 0)
            return true;
    return false;
}

/* Types are checked even where a set has no tensor that needs them, so that a mistake shows early. */
static fusedopt_status check_types(const struct step *step, size_t index, bool states)
{
    const fusedopt_tensors *set = &step->sets[index];
    const struct {
        const char *name;
        fusedopt_type type;
        bool matters;
    } types[] = {{"param_type", set->param_type, true},
                 {"grad_type", set->grad_type, true},
                 {"state_type", set->state_type, states && set->state_type != FUSEDOPT_NO_TYPE}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].matters && type_bytes(types[i].type) == 0)
            return fail(FUSEDOPT_ERROR_TYPE, "sets[%zu].%s is %d, which is no type of a tensor",
                        index, types[i].name, (int)types[i].type);
    return FUSEDOPT_OK;
}

fusedopt_status check_step(const struct step *step)
{
    if (step->n_sets > 0 && step->sets == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "sets is null, and n_sets is %zu", step->n_sets);
    if (step->n_groups > 0 && step->groups == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "groups is null, and n_groups is %zu", step->n_groups);
    if (step->n_groups > INT32_MAX || step->n_sets > INT32_MAX)
        return fail(FUSEDOPT_ERROR_SIZE, "%zu groups and %zu sets: at most %d of each fit a call",
                    step->n_groups, step->n_sets, INT32_MAX);
    for (size_t group = 0; group < step->n_groups; group++)
        TRY(check_group(step, group));
    if (step->control != NULL)
        TRY(check_control(step->control));
    const bool states = has_states(step);
    for (size_t i = 0; i < step->n_sets; i++) {
        TRY(check_types(step, i, states));
        TRY(check_set(step, i));
    }
    return FUSEDOPT_OK;
}
