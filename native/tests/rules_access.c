/* Gives a test in another language the generated half of the rules, by name. */
#include <string.h>

#include "library.h"

static const struct entry_point *const entries[] = {&library_adam, &library_adamw, &library_sgd,
                                                    &library_rmsprop};

static const struct entry_point *find(const char *name)
{
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (strcmp(entries[i]->name, name) == 0)
            return entries[i];
    return NULL;
}

/* Fill a row; the number of coefficients is returned, 0 for no such entry point. */
FUSEDOPT_API size_t rules_coefficients(const char *name, const void *hyper, double *row);
FUSEDOPT_API unsigned rules_options(const char *name, const void *hyper);

size_t rules_coefficients(const char *name, const void *hyper, double *row)
{
    const struct entry_point *entry = find(name);
    if (entry == NULL)
        return 0;
    entry->coefficients(hyper, row);
    return entry->n_coefficients;
}

unsigned rules_options(const char *name, const void *hyper)
{
    return find(name)->options(hyper);
}
