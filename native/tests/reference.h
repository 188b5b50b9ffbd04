/* Steps of the optimizers in double, from the formulas of torch.optim's documentation. */
#ifndef FUSEDOPT_REFERENCE_H
#define FUSEDOPT_REFERENCE_H

#include <stdint.h>

enum algorithm { ADAM, ADAMW, SGD, RMSPROP };

/* The hyper-parameters of all of them. */
struct hyper {
    enum algorithm algorithm;
    double lr, beta1, beta2, eps, weight_decay, momentum, dampening, alpha;
    int amsgrad, maximize, nesterov, centered;
    int64_t step;
};

/* Update one element. state: exp_avg, exp_avg_sq, max_exp_avg_sq; or momentum_buffer; or square_avg,
 * grad_avg, momentum_buffer. */
void reference_step(const struct hyper *hyper, double *param, double gradient, double state[3]);

#endif
