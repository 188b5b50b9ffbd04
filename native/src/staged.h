/* Device memory, and memory that the host fills for it without waiting for the device. */
#ifndef FUSEDOPT_STAGED_H
#define FUSEDOPT_STAGED_H

#include <stdbool.h>

#include "driver.h"

/* Two areas: while the device still copies from one, the next content is written to the other. */
enum { STAGING_AREAS = 2 };

/* Memory that has grown too small. Queued work may still use it, and freeing would wait for that,
 * so it is kept until the context goes. Sizes double: all of it together is less than what is used. */
struct retired {
    struct retired *next;
    CUdeviceptr device;
    void *area[STAGING_AREAS]; /* pinned, or NULL */
};

struct memory {
    const struct driver *driver;
    struct retired *retired;
};

/* A device buffer with the content that the host last sent there. */
struct staged {
    CUdeviceptr device;
    size_t capacity;
    void *area[STAGING_AREAS];
    CUevent copied[STAGING_AREAS]; /* NULL until the area's first use */
    int current;                   /* the area that was sent last */
    size_t bytes;                  /* how much of it was sent; 0 for nothing that is known */
};

/* Make room for `bytes` (at least 1 is held): device memory alone, or with staging areas. What the
 * buffer held is lost if it grows. */
fusedopt_status reserve_device(struct memory *memory, CUdeviceptr *device, size_t *capacity,
                               size_t bytes);
fusedopt_status reserve_staged(struct memory *memory, struct staged *staged, size_t bytes);

/* The area to write the next content into, once the device no longer reads it. */
fusedopt_status begin_content(const struct memory *memory, struct staged *staged, void **area);

/* Send what was written into that area. */
fusedopt_status send_content(const struct memory *memory, struct staged *staged, size_t bytes,
                             CUstream stream);

/* Both of these, unless the device has this content already. */
fusedopt_status send_if_changed(struct memory *memory, struct staged *staged, const void *content,
                                size_t bytes, CUstream stream);

void free_staged(const struct memory *memory, struct staged *staged);
void free_retired(struct memory *memory);

#endif
