/* The NVIDIA driver, found when the program runs: nothing links to it. */
#ifndef FUSEDOPT_DRIVER_H
#define FUSEDOPT_DRIVER_H

#include <cuda.h>

#include "fusedopt.h"

/* cuda.h gives these names the version that its types belong to (cuMemAlloc is cuMemAlloc_v2). */
#define DRIVER_FUNCTIONS(use)                                                                      \
    use(cuInit) use(cuDriverGetVersion) use(cuGetErrorName) use(cuGetErrorString)                  \
    use(cuDeviceGetCount) use(cuDeviceGet) use(cuDeviceGetName) use(cuDeviceGetAttribute)          \
    use(cuDevicePrimaryCtxRetain) use(cuDevicePrimaryCtxRelease)                                   \
    use(cuCtxPushCurrent) use(cuCtxPopCurrent)                                                     \
    use(cuModuleLoadData) use(cuModuleUnload) use(cuModuleGetFunction)                             \
    use(cuMemAlloc) use(cuMemFree) use(cuMemHostAlloc) use(cuMemFreeHost)                          \
    use(cuMemcpyHtoD) use(cuMemcpyHtoDAsync) use(cuMemcpyDtoDAsync) use(cuMemsetD8Async)           \
    use(cuEventCreate) use(cuEventDestroy) use(cuEventRecord) use(cuEventSynchronize)              \
    use(cuStreamWaitEvent) use(cuStreamIsCapturing) use(cuLaunchKernel)

struct driver {
    void *handle;
#define DRIVER_MEMBER(name) __typeof__(&name) name;
    DRIVER_FUNCTIONS(DRIVER_MEMBER)
#undef DRIVER_MEMBER
};

/* Load and initialise the driver; on an error nothing stays loaded. */
fusedopt_status driver_load(struct driver *driver);
void driver_unload(struct driver *driver);

/* Note a failed call of the driver for fusedopt_last_error, and return the status. */
fusedopt_status driver_failure(const struct driver *driver, CUresult result, const char *call,
                               fusedopt_status status);

/* Call the driver, and leave the function with FUSEDOPT_ERROR_DRIVER where that fails. */
#define CALL(driver, function, ...)                                                                \
    CALL_OR((driver), FUSEDOPT_ERROR_DRIVER, function, __VA_ARGS__)

#define CALL_OR(driver, status, function, ...)                                                     \
    do {                                                                                           \
        const CUresult call_result = (driver)->function(__VA_ARGS__);                              \
        if (call_result != CUDA_SUCCESS)                                                           \
            return driver_failure((driver), call_result, #function, (status));                     \
    } while (0)

#endif
