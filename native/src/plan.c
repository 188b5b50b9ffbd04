#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { ALIGNMENT = 16 };

static size_t round_up(size_t value, size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* Make an array at least so long; its content is lost. */
static fusedopt_status reserve(void **pointer, size_t *capacity, size_t count, size_t bytes)
{
    if (count <= *capacity)
        return FUSEDOPT_OK;
    const size_t wanted = count > 2 * *capacity ? count : 2 * *capacity;
    void *fresh = wanted > SIZE_MAX / bytes ? NULL : malloc(wanted * bytes);
    if (fresh == NULL)
        return fail(FUSEDOPT_ERROR_MEMORY, "no host memory is left; the tensors are unchanged");
    free(*pointer);
    *pointer = fresh;
    *capacity = wanted;
    return FUSEDOPT_OK;
}

static size_t rows_of(const struct layout *layout)
{
    return HEADER_ROWS + 2 + (size_t)layout->n_states;
}

/* Addresses of a tensor's operands, in the order of the table; their number is returned. */
static int operands(const fusedopt_tensors *set, size_t tensor, const struct layout *layout,
                    uintptr_t address[2 + FUSEDOPT_MAX_STATES])
{
    int count = 0;
    address[count++] = (uintptr_t)set->param[tensor];
    address[count++] = (uintptr_t)set->grad[tensor];
    for (int i = 0; i < layout->n_states; i++)
        address[count++] = (uintptr_t)set->state[layout->state[i]][tensor];
    return count;
}

static int is_aligned(const uintptr_t *address, int count)
{
    uintptr_t bits = 0;
    for (int i = 0; i < count; i++)
        bits |= address[i];
    return bits % ALIGNMENT == 0;
}

/* Find a cohort of the set that is being looked at: these stand last and are few. */
static struct cohort *find_cohort(struct cohorts *cohorts, size_t first,
                                  const struct layout *layout, int aligned)
{
    for (size_t i = first; i < cohorts->count; i++)
        if (cohorts->list[i].layout == layout && cohorts->list[i].aligned == aligned)
            return &cohorts->list[i];
    return NULL;
}

static void add_programs(int64_t *programs, int64_t numel, int block)
{
    *programs += numel / block + (numel % block != 0);
}

/* Count the tensors of each cohort of a set. */
static void count_set(struct cohorts *cohorts, const struct step *step, size_t index)
{
    const fusedopt_tensors *set = &step->sets[index];
    const size_t first = cohorts->count;
    for (size_t tensor = 0; tensor < set->count; tensor++) {
        if (set->numel[tensor] == 0)
            continue;
        uintptr_t address[2 + FUSEDOPT_MAX_STATES];
        const struct layout *layout = layout_of_group(step, group_of(set, tensor));
        const int aligned = is_aligned(address, operands(set, tensor, layout, address));
        struct cohort *cohort = find_cohort(cohorts, first, layout, aligned);
        if (cohort == NULL) {
            cohort = &cohorts->list[cohorts->count++];
            *cohort = (struct cohort){.layout = layout, .set = index, .aligned = aligned};
            cohort->update = find_update(step, set, layout, aligned);
        }
        cohort->width++;
    }
}

static fusedopt_status place_tables(struct cohorts *cohorts)
{
    size_t words = 0;
    for (size_t i = 0; i < cohorts->count; i++) {
        struct cohort *cohort = &cohorts->list[i];
        cohort->table = words;
        /* Two words are 16 bytes, which every table starts on. */
        words += round_up(rows_of(cohort->layout) * (size_t)cohort->width, 2);
    }
    void *storage = cohorts->words;
    const fusedopt_status status =
        reserve(&storage, &cohorts->word_capacity, words, sizeof *cohorts->words);
    cohorts->words = storage;
    TRY(status);
    if (words > 0)
        memset(cohorts->words, 0, words * sizeof *cohorts->words);
    cohorts->n_words = words;
    return FUSEDOPT_OK;
}

static void fill_set(struct cohorts *cohorts, const struct step *step, size_t index)
{
    const fusedopt_tensors *set = &step->sets[index];
    size_t first = 0;
    while (first < cohorts->count && cohorts->list[first].set != index)
        first++;
    for (size_t tensor = 0; tensor < set->count; tensor++) {
        if (set->numel[tensor] == 0)
            continue;
        uintptr_t address[2 + FUSEDOPT_MAX_STATES];
        const size_t group = group_of(set, tensor);
        const struct layout *layout = layout_of_group(step, group);
        const int count = operands(set, tensor, layout, address);
        struct cohort *cohort = find_cohort(cohorts, first, layout, is_aligned(address, count));
        const size_t width = (size_t)cohort->width;
        int64_t *column = cohorts->words + cohort->table + cohort->column++;
        column[0] = set->numel[tensor];
        column[width] = (int64_t)group;
        for (int i = 0; i < count; i++)
            column[(HEADER_ROWS + (size_t)i) * width] = (int64_t)address[i];
    }
}

/* Whether two steps have the same tensors but for addresses and groups. */
static bool same_tensors(const struct cohorts *a, const struct cohorts *b)
{
    if (a->count != b->count)
        return false;
    for (size_t i = 0; i < a->count; i++) {
        const struct cohort *x = &a->list[i], *y = &b->list[i];
        if (x->update != y->update || x->width != y->width ||
            memcmp(a->words + x->table, b->words + y->table, (size_t)x->width * sizeof *a->words))
            return false;
    }
    return true;
}

static fusedopt_status place_map(struct chunk_map *map, const struct cohorts *cohorts,
                                 const struct cohort *cohort, int block, size_t *used)
{
    int64_t programs = 0;
    for (int32_t column = 0; column < cohort->width && programs <= INT32_MAX; column++)
        add_programs(&programs, cohorts->words[cohort->table + (size_t)column], block);
    if (programs > INT32_MAX)
        return fail(FUSEDOPT_ERROR_SIZE,
                    "sets[%zu] has more elements than one launch can update; split it", cohort->set);
    map->programs = (int32_t)programs;
    map->columns = *used;
    map->blocks = map->columns + round_up((size_t)programs, ALIGNMENT / sizeof(int32_t));
    *used = map->blocks + round_up((size_t)programs, ALIGNMENT / sizeof(int32_t));
    return FUSEDOPT_OK;
}

static fusedopt_status place_maps(struct plan *plan, const struct step *step)
{
    plan->n_chunks = plan->n_norm_chunks = plan->n_partials = 0;
    for (size_t i = 0; i < plan->now.count; i++) {
        struct cohort *cohort = &plan->now.list[i];
        const struct kernel *norm =
            find_norm(step->target, "partial_norms", step->sets[cohort->set].grad_type,
                      cohort->aligned, 0);
        TRY(place_map(&cohort->chunks, &plan->now, cohort, cohort->update->variant.block,
                      &plan->n_chunks));
        cohort->norm_block = norm->variant.block;
        TRY(place_map(&cohort->norm_chunks, &plan->now, cohort, cohort->norm_block,
                      &plan->n_norm_chunks));
        cohort->partials = plan->n_partials;
        /* An even number, so that the next cohort's start on 16 bytes; the spare one stays 0. */
        plan->n_partials += round_up((size_t)cohort->norm_chunks.programs, 2);
    }
    if (plan->n_partials > INT32_MAX)
        return fail(FUSEDOPT_ERROR_SIZE, "the tensors have more elements than one norm can cover");
    return FUSEDOPT_OK;
}

static fusedopt_status partition(struct plan *plan, const struct step *step)
{
    struct cohorts *cohorts = &plan->now;
    cohorts->count = cohorts->n_words = 0;
    void *storage = cohorts->list;
    const fusedopt_status status =
        reserve(&storage, &cohorts->list_capacity, step->n_sets * step->entry->n_layouts * 2,
                sizeof *cohorts->list);
    cohorts->list = storage;
    TRY(status);
    for (size_t i = 0; i < step->n_sets; i++)
        count_set(cohorts, step, i);
    TRY(place_tables(cohorts));
    for (size_t i = 0; i < step->n_sets; i++)
        fill_set(cohorts, step, i);
    return FUSEDOPT_OK;
}

fusedopt_status make_plan(struct plan *plan, const struct step *step)
{
    const struct cohorts before = plan->now;
    plan->now = plan->before;
    plan->before = before;
    fusedopt_status status = partition(plan, step);
    if (status == FUSEDOPT_OK)
        status = place_maps(plan, step);
    if (status != FUSEDOPT_OK)
        plan->now.count = 0;
    if (status != FUSEDOPT_OK || !same_tensors(&plan->now, &plan->before))
        plan->has_chunks = plan->has_norm_chunks = false;
    return status;
}

static void write_map(const struct plan *plan, const struct cohort *cohort,
                      const struct chunk_map *map, int block, int32_t *chunks)
{
    int32_t *columns = chunks + map->columns, *blocks = chunks + map->blocks;
    for (int32_t column = 0; column < cohort->width; column++) {
        int64_t programs = 0;
        add_programs(&programs, plan->now.words[cohort->table + (size_t)column], block);
        for (int64_t i = 0; i < programs; i++) {
            *columns++ = column;
            *blocks++ = (int32_t)i;
        }
    }
}

void write_chunks(const struct plan *plan, int32_t *chunks)
{
    for (size_t i = 0; i < plan->now.count; i++) {
        const struct cohort *cohort = &plan->now.list[i];
        write_map(plan, cohort, &cohort->chunks, cohort->update->variant.block, chunks);
    }
}

void write_norm_chunks(const struct plan *plan, int32_t *chunks)
{
    for (size_t i = 0; i < plan->now.count; i++) {
        const struct cohort *cohort = &plan->now.list[i];
        write_map(plan, cohort, &cohort->norm_chunks, cohort->norm_block, chunks);
    }
}

void free_plan(struct plan *plan)
{
    free(plan->now.list);
    free(plan->now.words);
    free(plan->before.list);
    free(plan->before.words);
    memset(plan, 0, sizeof *plan);
}
