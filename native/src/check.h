/* Checks of a step's arguments, before anything is done. */
#ifndef FUSEDOPT_CHECK_H
#define FUSEDOPT_CHECK_H

#include "library.h"

/* The arguments of a step function. */
struct step {
    const struct entry_point *entry;
    const struct target *target;
    const fusedopt_tensors *sets;
    size_t n_sets;
    const unsigned char *groups; /* n_groups structs of entry->group_bytes */
    size_t n_groups;
    const fusedopt_control *control; /* NULL for none */
};

/* What a group selects; the group has been checked. */
const struct layout *layout_of_group(const struct step *step, size_t group);

/* Index of the group of a tensor. */
static inline size_t group_of(const fusedopt_tensors *set, size_t tensor)
{
    return set->group != NULL ? set->group[tensor] : 0;
}

/* The kernel of the target with these properties, or NULL. Types that do not matter are 0. */
const struct kernel *find_update(const struct step *step, const fusedopt_tensors *set,
                                 const struct layout *layout, int aligned);
const struct kernel *find_norm(const struct target *target, const char *kernel,
                               fusedopt_type grad_type, int aligned, int infinity);

/* Bytes of an element, 0 for an unknown type. */
size_t type_bytes(fusedopt_type type);

fusedopt_status check_step(const struct step *step);

#endif
