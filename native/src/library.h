/* What the build writes (manifest.c, rules.c) and the library reads. */
#ifndef FUSEDOPT_LIBRARY_H
#define FUSEDOPT_LIBRARY_H

#include "fusedopt.h"

struct kernel {
    fusedopt_variant variant;
    unsigned options; /* a bit for each compile-time option */
    size_t image;     /* which distinct image */
    int scratch;      /* addresses of scratch memory after the kernel's own parameters, all null */
};

/* A compile target, and which kernels are for it. */
struct target {
    const char *name;
    int major, minor;
    int exact; /* whether its code runs on this capability alone, not on later minor ones */
    int cuda;  /* the oldest driver that loads it, as cuDriverGetVersion counts */
    size_t first, count;
};

enum range { NOT_NEGATIVE, BELOW_ONE, FINITE };

/* A number of a group's struct. */
struct field {
    const char *name;
    size_t offset;
    enum range range;
};

/* The states that selected code takes, as indices into fusedopt_tensors.state. */
struct layout {
    unsigned options;
    int n_states;
    int state[FUSEDOPT_MAX_STATES];
};

#define NO_STEP ((size_t)-1)

/* The host's half of an optimizer; `hyper` is a group's struct. */
struct entry_point {
    const char *name, *rule;
    size_t group_bytes;
    size_t step_offset; /* or NO_STEP */
    const struct field *fields;
    size_t n_fields;
    const struct layout *layouts;
    size_t n_layouts;
    const char *states[FUSEDOPT_MAX_STATES];
    size_t n_coefficients;
    void (*coefficients)(const void *hyper, double *row);
    unsigned (*options)(const void *hyper);
    const char *(*requirements)(const void *hyper); /* NULL, or what is not met */
};

extern const struct kernel library_kernels[];
extern const size_t library_kernel_count, library_image_count;
extern const struct target library_targets[];
extern const size_t library_target_count;
extern const char library_version[];

extern const struct entry_point library_adam, library_adamw, library_sgd, library_rmsprop;

#endif
