/* RTLD_NODELETE is in no standard. */
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

#define STRING(name) #name
#define EXPANDED_STRING(name) STRING(name)

static const char *library_path(void)
{
    const char *path = getenv("FUSEDOPT_DRIVER");
    return path != NULL && path[0] != '\0' ? path : "libcuda.so.1";
}

/* dlsym gives an object pointer, and C has no cast from that to a function. */
static int find(void *handle, const char *name, void *function)
{
    void *symbol = dlsym(handle, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static fusedopt_status find_all(struct driver *driver)
{
#define FIND(name)                                                                                 \
    if (!find(driver->handle, EXPANDED_STRING(name), &driver->name))                               \
        return fail(FUSEDOPT_ERROR_DRIVER,                                                         \
                    "the NVIDIA driver (%s) is too old: it has no function %s; install CUDA 12's " \
                    "driver or a newer one",                                                       \
                    library_path(), EXPANDED_STRING(name));
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    return FUSEDOPT_OK;
}

static fusedopt_status start(const struct driver *driver)
{
    const CUresult result = driver->cuInit(0);
    if (result == CUDA_ERROR_NO_DEVICE)
        return fail(FUSEDOPT_ERROR_DEVICE, "the NVIDIA driver finds no GPU; is one hidden by "
                                           "CUDA_VISIBLE_DEVICES, or not given to the container?");
    if (result != CUDA_SUCCESS)
        return driver_failure(driver, result, "cuInit", FUSEDOPT_ERROR_DRIVER);
    return FUSEDOPT_OK;
}

fusedopt_status driver_load(struct driver *driver)
{
    memset(driver, 0, sizeof *driver);
    /* The driver has threads and exit handlers of its own: it is never unmapped. */
    driver->handle = dlopen(library_path(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (driver->handle == NULL) {
        const char *reason = dlerror();
        return fail(FUSEDOPT_ERROR_DRIVER,
                    "no NVIDIA driver: %s; install the driver, or name its library in the "
                    "environment variable FUSEDOPT_DRIVER",
                    reason != NULL ? reason : library_path());
    }
    fusedopt_status status = find_all(driver);
    if (status == FUSEDOPT_OK)
        status = start(driver);
    if (status != FUSEDOPT_OK)
        driver_unload(driver);
    return status;
}

void driver_unload(struct driver *driver)
{
    if (driver->handle != NULL)
        dlclose(driver->handle);
    driver->handle = NULL;
}

fusedopt_status driver_failure(const struct driver *driver, CUresult result, const char *call,
                               fusedopt_status status)
{
    const char *name = NULL, *text = NULL;
    if (driver->cuGetErrorName(result, &name) != CUDA_SUCCESS || name == NULL)
        name = "an unknown error";
    if (driver->cuGetErrorString(result, &text) != CUDA_SUCCESS || text == NULL)
        text = "no description";
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        status = FUSEDOPT_ERROR_MEMORY;
    return fail(status, "%s failed with %s (%d): %s", call, name, (int)result, text);
}
