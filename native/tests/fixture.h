/* Three tensors and a context on the stand-in driver, for calls that fail. */
#ifndef FUSEDOPT_FIXTURE_H
#define FUSEDOPT_FIXTURE_H

#include "model.h"

enum { N_TENSORS = 3 };
extern const int64_t sizes[N_TENSORS];
extern const struct types float32;

extern struct model model;
extern fusedopt_context *context;

/* The arguments of a good step with AdamW, which a test then spoils; `addresses` are those of `set`. */
extern fusedopt_tensors set;
extern fusedopt_adamw group;
extern fusedopt_control control;
extern void *addresses[N_OPERANDS][MOST_TENSORS];

/* Make model and context; give them back, where `kept` things are known to stay. */
void open_fixture(void);
int close_fixture(int kept);

/* Make the arguments good again. */
void start_again(void);

/* Step with them. */
fusedopt_status step_with(fusedopt_context *own);

/* A status, a message that holds these words, and no complaint of the stand-in. */
void expect_failure(fusedopt_status found, fusedopt_status wanted, const char *words, int line);

#endif
