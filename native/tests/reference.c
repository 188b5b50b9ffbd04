#include "reference.h"

#include <math.h>

static void adam(const struct hyper *h, double *param, double g, double *state)
{
    if (h->algorithm == ADAMW)
        *param -= h->lr * h->weight_decay * *param;
    else if (h->weight_decay != 0)
        g += h->weight_decay * *param;
    state[0] = h->beta1 * state[0] + (1 - h->beta1) * g;
    state[1] = h->beta2 * state[1] + (1 - h->beta2) * g * g;
    double second = state[1];
    if (h->amsgrad) {
        state[2] = fmax(state[2], state[1]);
        second = state[2];
    }
    const double first = state[0] / (1 - pow(h->beta1, (double)h->step));
    second /= 1 - pow(h->beta2, (double)h->step);
    *param -= h->lr * first / (sqrt(second) + h->eps);
}

static void sgd(const struct hyper *h, double *param, double g, double *state)
{
    if (h->weight_decay != 0)
        g += h->weight_decay * *param;
    if (h->momentum != 0) {
        state[0] = h->step == 1 ? g : h->momentum * state[0] + (1 - h->dampening) * g;
        g = h->nesterov ? g + h->momentum * state[0] : state[0];
    }
    *param -= h->lr * g;
}

static void rmsprop(const struct hyper *h, double *param, double g, double *state)
{
    if (h->weight_decay != 0)
        g += h->weight_decay * *param;
    state[0] = h->alpha * state[0] + (1 - h->alpha) * g * g;
    double spread = state[0];
    if (h->centered) {
        state[1] = h->alpha * state[1] + (1 - h->alpha) * g;
        spread -= state[1] * state[1];
    }
    const double ratio = g / (sqrt(fmax(spread, 0)) + h->eps);
    if (h->momentum > 0) {
        state[2] = h->momentum * state[2] + ratio;
        *param -= h->lr * state[2];
    } else {
        *param -= h->lr * ratio;
    }
}

void reference_step(const struct hyper *hyper, double *param, double gradient, double state[3])
{
    const double g = hyper->maximize ? -gradient : gradient;
    if (hyper->algorithm == SGD)
        sgd(hyper, param, g, state);
    else if (hyper->algorithm == RMSPROP)
        rmsprop(hyper, param, g, state);
    else
        adam(hyper, param, g, state);
}
