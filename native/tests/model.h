/* A few tensors on the device, and calls of the library on them. */
#ifndef FUSEDOPT_TEST_MODEL_H
#define FUSEDOPT_TEST_MODEL_H

#include "device.h"
#include "fusedopt.h"
#include "reference.h"

enum { MOST_TENSORS = 16, N_OPERANDS = 2 + FUSEDOPT_MAX_STATES, N_GROUPS = 3 };

/* An array on the device, with elements before and after it that nobody may touch. */
struct array {
    fusedopt_type type;
    size_t numel, offset; /* elements in front */
    CUdeviceptr memory;
};

/* Tensors of one set: operand 0 is the parameter, 1 the gradient, then the states. */
struct model {
    size_t count;
    struct array operand[MOST_TENSORS][N_OPERANDS];
    int64_t numel[MOST_TENSORS];
    void *address[N_OPERANDS][MOST_TENSORS];
    uint32_t group[MOST_TENSORS];
    fusedopt_tensors set;
};

struct types {
    fusedopt_type param, grad, state;
};

/* A context on the first GPU, and the driver for tests; where the library does not find a GPU that it
 * has code for, the program ends with what ctest takes for "skipped". */
fusedopt_context *first_context(void);

/* Random numbers that are the same everywhere: uniform in [-1, 1). */
double random_number(uint64_t *seed);

/* Tensors of these sizes, every third of them with operands one element off their alignment; states
 * are zero. */
void make_model(struct model *model, const int64_t *numel, size_t count, struct types types,
                uint64_t *seed);
void free_model(struct model *model);

/* New gradients, random times `scale`, in memory of their own if `moved`. */
void new_gradients(struct model *model, double scale, int moved, uint64_t *seed);

/* Values of an operand. The caller frees them. */
double *read_operand(const struct model *model, size_t tensor, int operand);

/* Whether what surrounds the arrays is as it was. */
int surroundings_are_whole(const struct model *model);

/* Call the step function of the algorithm. */
fusedopt_status take_step(fusedopt_context *context, const fusedopt_tensors *sets, size_t n_sets,
                          const struct hyper *groups, size_t n_groups,
                          const fusedopt_control *control, fusedopt_stream stream);

#endif
