/* Which tensors share a launch, and the tables that the kernels find them by.
 *
 * A table is described in kernels/multi_tensor.py: int64, a column for each tensor and the rows
 *     number of elements, row of the coefficients, addresses of parameter, gradient and states.
 */
#ifndef FUSEDOPT_PLAN_H
#define FUSEDOPT_PLAN_H

#include <stdbool.h>

#include "check.h"

enum { HEADER_ROWS = 2 };

/* Programs of a kernel over all tensors of a cohort: the map is two arrays of int32, the column of a
 * program's tensor and the number of its block in that tensor. */
struct chunk_map {
    int32_t programs;
    size_t columns, blocks; /* where the arrays start, in int32 */
};

/* Tensors that share a launch. */
struct cohort {
    const struct kernel *update;
    const struct layout *layout;
    size_t set;
    int aligned;
    int32_t width;   /* tensors */
    size_t table;    /* where its table starts, in int64 */
    int64_t column;  /* the next to be filled */
    struct chunk_map chunks, norm_chunks;
    int norm_block;  /* elements of a block of the norm kernels */
    size_t partials; /* where its partial norms start, in double */
};

struct cohorts {
    struct cohort *list;
    size_t count, list_capacity;
    int64_t *words; /* all tables */
    size_t n_words, word_capacity;
};

/* The cohorts of this step, and of the step before: where tensors stay what they are, so do the
 * chunk maps on the device. */
struct plan {
    struct cohorts now, before;
    size_t n_chunks, n_norm_chunks; /* int32 in the maps */
    size_t n_partials;              /* double */
    bool has_chunks, has_norm_chunks; /* whether the device has the maps of `now` */
};

/* Partition a step that has been checked. */
fusedopt_status make_plan(struct plan *plan, const struct step *step);

/* Write the maps of all cohorts into an array of n_chunks or n_norm_chunks. */
void write_chunks(const struct plan *plan, int32_t *chunks);
void write_norm_chunks(const struct plan *plan, int32_t *chunks);

void free_plan(struct plan *plan);

#endif
