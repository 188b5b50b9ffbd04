#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STRING(name) #name
#define EXPANDED_STRING(name) STRING(name)

#define FUNCTIONS(use)                                                                             \
    use(cuInit) use(cuDevicePrimaryCtxRetain) use(cuCtxPushCurrent) use(cuMemAlloc)                \
    use(cuMemFree) use(cuMemcpyHtoD) use(cuMemcpyDtoH) use(cuCtxSynchronize)

static struct {
#define MEMBER(name) __typeof__(&name) name;
    FUNCTIONS(MEMBER)
    const char *(*standin_fault)(void); /* NULL on a GPU */
} driver;

static void need(CUresult result, const char *what)
{
    if (result != CUDA_SUCCESS) {
        fprintf(stderr, "%s failed: %d\n", what, (int)result);
        exit(1);
    }
}

int device_open(void)
{
    const char *path = getenv("FUSEDOPT_DRIVER");
    void *handle = dlopen(path != NULL ? path : "libcuda.so.1", RTLD_NOW | RTLD_NODELETE);
    if (handle == NULL)
        return 0;
#define FIND(name)                                                                                 \
    {                                                                                              \
        void *symbol = dlsym(handle, EXPANDED_STRING(name));                                       \
        if (symbol == NULL)                                                                        \
            return 0;                                                                              \
        memcpy(&driver.name, &symbol, sizeof symbol);                                              \
    }
    FUNCTIONS(FIND)
    void *fault = dlsym(handle, "standin_fault");
    memcpy(&driver.standin_fault, &fault, sizeof fault);
    dlclose(handle);
    CUcontext context;
    if (driver.cuInit(0) != CUDA_SUCCESS)
        return 0;
    need(driver.cuDevicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain");
    need(driver.cuCtxPushCurrent(context), "cuCtxPushCurrent");
    return 1;
}

CUdeviceptr device_new(size_t bytes)
{
    CUdeviceptr address;
    need(driver.cuMemAlloc(&address, bytes), "cuMemAlloc");
    return address;
}

void device_free(CUdeviceptr address)
{
    need(driver.cuMemFree(address), "cuMemFree");
}

void device_write(CUdeviceptr to, const void *from, size_t bytes)
{
    need(driver.cuMemcpyHtoD(to, from, bytes), "cuMemcpyHtoD");
    /* The next step may be on a stream that does not wait for the default stream. */
    device_wait();
}

void device_read(void *to, CUdeviceptr from, size_t bytes)
{
    need(driver.cuMemcpyDtoH(to, from, bytes), "cuMemcpyDtoH");
}

void device_wait(void)
{
    need(driver.cuCtxSynchronize(), "cuCtxSynchronize");
}

const char *device_fault(void)
{
    return driver.standin_fault != NULL ? driver.standin_fault() : "";
}
