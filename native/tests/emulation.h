/* The rules' updates of one element, as emulation.py writes them. */
#ifndef FUSEDOPT_EMULATION_H
#define FUSEDOPT_EMULATION_H

#include <stddef.h>

struct emulation {
    const char *rule, *options; /* as in fusedopt_variant */
    int n_coefficients, n_states;
    /* c: coefficients; v: parameter, gradient, states, updated but for the gradient. */
    void (*single)(const float *c, float *v);
    void (*wide)(const double *c, double *v);
};

extern const struct emulation emulations[];
extern const size_t emulation_count;

/* The larger of two; nan where either is. */
static inline float maximumf(float a, float b)
{
    return a != a ? a : b != b ? b : a > b ? a : b;
}

static inline double maximum(double a, double b)
{
    return a != a ? a : b != b ? b : a > b ? a : b;
}

#endif
