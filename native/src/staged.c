#include "staged.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { SMALLEST = 4096 };

/* Put memory aside: a device address and its staging areas, if any. */
static fusedopt_status retire(struct memory *memory, CUdeviceptr device, void *const *area)
{
    if (device == 0)
        return FUSEDOPT_OK;
    struct retired *entry = calloc(1, sizeof *entry);
    if (entry == NULL)
        return fail(FUSEDOPT_ERROR_MEMORY, "no host memory is left");
    entry->next = memory->retired;
    entry->device = device;
    if (area != NULL)
        memcpy(entry->area, area, sizeof entry->area);
    memory->retired = entry;
    return FUSEDOPT_OK;
}

static size_t grown(size_t capacity, size_t bytes)
{
    size_t size = capacity > SMALLEST / 2 ? 2 * capacity : SMALLEST;
    return size > bytes ? size : bytes;
}

fusedopt_status reserve_device(struct memory *memory, CUdeviceptr *device, size_t *capacity,
                               size_t bytes)
{
    if (*device != 0 && bytes <= *capacity)
        return FUSEDOPT_OK;
    const size_t size = grown(*capacity, bytes);
    CUdeviceptr fresh = 0;
    CALL(memory->driver, cuMemAlloc, &fresh, size);
    const fusedopt_status status = retire(memory, *device, NULL);
    if (status != FUSEDOPT_OK) {
        memory->driver->cuMemFree(fresh);
        return status;
    }
    *device = fresh;
    *capacity = size;
    return FUSEDOPT_OK;
}

fusedopt_status reserve_staged(struct memory *memory, struct staged *staged, size_t bytes)
{
    if (staged->device != 0 && bytes <= staged->capacity)
        return FUSEDOPT_OK;
    const size_t size = grown(staged->capacity, bytes);
    struct staged fresh = {.capacity = 0};
    fusedopt_status status = reserve_device(memory, &fresh.device, &fresh.capacity, size);
    for (int i = 0; i < STAGING_AREAS && status == FUSEDOPT_OK; i++) {
        const CUresult result =
            memory->driver->cuMemHostAlloc(&fresh.area[i], fresh.capacity, 0);
        if (result != CUDA_SUCCESS)
            status = driver_failure(memory->driver, result, "cuMemHostAlloc",
                                    FUSEDOPT_ERROR_DRIVER);
    }
    if (status == FUSEDOPT_OK)
        status = retire(memory, staged->device, staged->area);
    if (status != FUSEDOPT_OK) {
        free_staged(memory, &fresh);
        return status;
    }
    /* The events go on serving: new areas are read by no copy, so waiting for them does no harm. */
    memcpy(fresh.copied, staged->copied, sizeof fresh.copied);
    *staged = fresh;
    return FUSEDOPT_OK;
}

fusedopt_status begin_content(const struct memory *memory, struct staged *staged, void **area)
{
    const int next = (staged->current + 1) % STAGING_AREAS;
    if (staged->copied[next] == NULL)
        CALL(memory->driver, cuEventCreate, &staged->copied[next], CU_EVENT_DISABLE_TIMING);
    else
        CALL(memory->driver, cuEventSynchronize, staged->copied[next]);
    *area = staged->area[next];
    return FUSEDOPT_OK;
}

fusedopt_status send_content(const struct memory *memory, struct staged *staged, size_t bytes,
                             CUstream stream)
{
    const int next = (staged->current + 1) % STAGING_AREAS;
    /* Until the copy is queued, and the event behind it, nothing is known of the device's content. */
    staged->bytes = 0;
    CALL(memory->driver, cuMemcpyHtoDAsync, staged->device, staged->area[next], bytes, stream);
    CALL(memory->driver, cuEventRecord, staged->copied[next], stream);
    staged->current = next;
    staged->bytes = bytes;
    return FUSEDOPT_OK;
}

fusedopt_status send_if_changed(struct memory *memory, struct staged *staged, const void *content,
                                size_t bytes, CUstream stream)
{
    if (bytes == 0 ||
        (staged->bytes == bytes && memcmp(staged->area[staged->current], content, bytes) == 0))
        return FUSEDOPT_OK;
    void *area = NULL;
    TRY(begin_content(memory, staged, &area));
    memcpy(area, content, bytes);
    return send_content(memory, staged, bytes, stream);
}

void free_staged(const struct memory *memory, struct staged *staged)
{
    if (staged->device != 0)
        memory->driver->cuMemFree(staged->device);
    for (int i = 0; i < STAGING_AREAS; i++) {
        if (staged->area[i] != NULL)
            memory->driver->cuMemFreeHost(staged->area[i]);
        if (staged->copied[i] != NULL)
            memory->driver->cuEventDestroy(staged->copied[i]);
    }
    memset(staged, 0, sizeof *staged);
}

void free_retired(struct memory *memory)
{
    while (memory->retired != NULL) {
        struct retired *entry = memory->retired;
        memory->retired = entry->next;
        memory->driver->cuMemFree(entry->device);
        for (int i = 0; i < STAGING_AREAS; i++)
            if (entry->area[i] != NULL)
                memory->driver->cuMemFreeHost(entry->area[i]);
        free(entry);
    }
}
