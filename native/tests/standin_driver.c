/* Memory and queued work of the stand-in driver; see standin.h. */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin_internal.h"
#include "standin_queue.h"

enum { ALIGNMENT = 256 };

struct CUevent_st {
    CUstream stream;
    size_t count; /* operations of the stream that it stands behind */
};

/* ---- memory ---- */

EXPORT cuMemAlloc(CUdeviceptr *out, size_t bytes)
{
    ENTER_IN_CONTEXT();
    if (bytes == 0)
        return CUDA_ERROR_INVALID_VALUE;
    struct allocation *a = malloc(sizeof *a);
    const size_t whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    unsigned char *host = a != NULL ? aligned_alloc(ALIGNMENT, whole) : NULL;
    if (host == NULL) {
        free(a);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(host, 0xff, whole);
    *a = (struct allocation){state.allocations, host, bytes};
    state.allocations = a;
    state.live++;
    *out = (CUdeviceptr)(uintptr_t)host | MARK;
    return CUDA_SUCCESS;
}

EXPORT cuMemFree(CUdeviceptr address)
{
    ENTER_IN_CONTEXT();
    run_everything();
    for (struct allocation **a = &state.allocations; *a != NULL; a = &(*a)->next)
        if (((CUdeviceptr)(uintptr_t)(*a)->host | MARK) == address) {
            struct allocation *found = *a;
            *a = found->next;
            free(found->host);
            free(found);
            state.live--;
            return CUDA_SUCCESS;
        }
    fault("%llx was not allocated", (unsigned long long)address);
    return CUDA_ERROR_INVALID_VALUE;
}

EXPORT cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    ENTER_IN_CONTEXT();
    (void)flags;
    *out = malloc(bytes);
    state.live += *out != NULL;
    return *out != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT cuMemFreeHost(void *area)
{
    ENTER_IN_CONTEXT();
    run_everything();
    free(area);
    state.live--;
    return CUDA_SUCCESS;
}

EXPORT cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes)
{
    ENTER_IN_CONTEXT();
    run_everything();
    if (at_device(to, bytes) == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    /* As of pageable memory: taken before the call returns, but on the device only when the default
     * stream comes to it. */
    void *taken = malloc(bytes);
    if (taken == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(taken, from, bytes);
    return enqueue(NULL, &(struct operation){.kind = COPY_IN, .to = to, .host = taken,
                                             .taken = taken, .bytes = bytes});
}

EXPORT cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes)
{
    ENTER_IN_CONTEXT();
    run_everything();
    const void *host = at_device(from, bytes);
    if (host == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(to, host, bytes);
    return CUDA_SUCCESS;
}

/* ---- queued work ---- */

EXPORT cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    ENTER_IN_CONTEXT();
    return enqueue(stream, &(struct operation){
                               .kind = COPY_IN, .to = to, .host = from, .bytes = bytes});
}

EXPORT cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    ENTER_IN_CONTEXT();
    return enqueue(stream, &(struct operation){
                               .kind = COPY_ON_DEVICE, .to = to, .from = from, .bytes = bytes});
}

EXPORT cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream stream)
{
    ENTER_IN_CONTEXT();
    return enqueue(stream,
                   &(struct operation){.kind = FILL, .to = to, .byte = byte, .bytes = bytes});
}

EXPORT cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads,
                      unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream,
                      void **parameters, void **extra)
{
    ENTER_IN_CONTEXT();
    struct operation operation = {.kind = LAUNCH};
    operation.launch.variant = function->variant;
    operation.launch.programs = x;
    if (x == 0 || y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || extra != NULL ||
        threads != (unsigned)function->variant->threads ||
        shared != (unsigned)function->variant->shared) {
        fault("%s is not launched as it was compiled", function->variant->name);
        return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult result = read_arguments(&operation.launch, parameters);
    return result == CUDA_SUCCESS ? enqueue(stream, &operation) : result;
}

EXPORT cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    ENTER_IN_CONTEXT();
    (void)flags;
    return enqueue(stream, &(struct operation){
                               .kind = WAIT, .stream = event->stream, .count = event->count});
}

EXPORT cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    ENTER_IN_CONTEXT();
    /* The one stream that a test calls so. */
    *status = (uintptr_t)stream == 0xca9 ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                         : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

EXPORT cuEventCreate(CUevent *event, unsigned flags)
{
    ENTER_IN_CONTEXT();
    (void)flags;
    *event = calloc(1, sizeof **event);
    state.live += *event != NULL;
    return *event != NULL ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT cuEventDestroy(CUevent event)
{
    ENTER_IN_CONTEXT();
    free(event);
    state.live--;
    return CUDA_SUCCESS;
}

EXPORT cuEventRecord(CUevent event, CUstream stream)
{
    ENTER_IN_CONTEXT();
    event->stream = stream;
    event->count = queued(stream);
    return CUDA_SUCCESS;
}

EXPORT cuEventSynchronize(CUevent event)
{
    ENTER_IN_CONTEXT();
    run_stream(event->stream, event->count);
    return CUDA_SUCCESS;
}

EXPORT cuCtxSynchronize(void)
{
    ENTER_IN_CONTEXT();
    run_everything();
    return CUDA_SUCCESS;
}
