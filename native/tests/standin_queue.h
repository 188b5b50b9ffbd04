/* Work of the stand-in driver, queued by stream. */
#ifndef FUSEDOPT_STANDIN_QUEUE_H
#define FUSEDOPT_STANDIN_QUEUE_H

#include "standin_internal.h"

enum kind { COPY_IN, COPY_ON_DEVICE, FILL, LAUNCH, WAIT };

struct operation {
    enum kind kind;
    struct operation *next;
    CUdeviceptr to, from;
    const void *host;
    void *taken; /* host memory that is freed once the operation has run, or NULL */
    size_t bytes;
    unsigned char byte;
    struct launch launch;
    /* For WAIT: what must have run. */
    CUstream stream;
    size_t count;
};

/* Queue a copy of an operation. */
CUresult enqueue(CUstream stream, const struct operation *operation);

/* How many operations were ever queued on a stream; run so many of them. */
size_t queued(CUstream stream);
void run_stream(CUstream stream, size_t count);

#endif
