#include "context.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

fusedopt_status enter(fusedopt_context *context)
{
    CALL(&context->driver, cuCtxPushCurrent, context->primary);
    return FUSEDOPT_OK;
}

fusedopt_status leave(fusedopt_context *context)
{
    CUcontext ours;
    CALL(&context->driver, cuCtxPopCurrent, &ours);
    return FUSEDOPT_OK;
}

/* Machine code for sm_80 runs on 8.0 and later 8.x, that for sm_90a on 9.0 alone. */
static bool runs_on(const struct target *target, int major, int minor)
{
    return target->major == major &&
           (target->exact ? target->minor == minor : target->minor <= minor);
}

static const struct target *choose_target(int major, int minor)
{
    const struct target *best = NULL;
    for (size_t i = 0; i < library_target_count; i++) {
        const struct target *target = &library_targets[i];
        if (runs_on(target, major, minor) && (best == NULL || target->minor > best->minor))
            best = target;
    }
    return best;
}

static fusedopt_status no_target(const char *gpu, int major, int minor)
{
    char have[512] = "", names[512] = "";
    for (size_t i = 0; i < library_target_count; i++) {
        const struct target *target = &library_targets[i];
        const size_t used = strlen(have), listed = strlen(names);
        snprintf(have + used, sizeof have - used, "%s%s (%d.%d%s)", i ? ", " : "", target->name,
                 target->major, target->minor, target->exact ? "" : " and later minor versions");
        snprintf(names + listed, sizeof names - listed, "%s;", target->name);
    }
    return fail(FUSEDOPT_ERROR_ARCHITECTURE,
                "this library has no code for %s, whose compute capability is %d.%d; it was built "
                "for %s. Build it with -DFUSEDOPT_TARGETS=\"%scuda:%d%d\"",
                gpu, major, minor, have, names, major, minor);
}

static fusedopt_status find_target(fusedopt_context *context)
{
    const struct driver *driver = &context->driver;
    char name[256] = "";
    int major = 0, minor = 0, version = 0;
    CALL(driver, cuDeviceGetName, name, (int)sizeof name, context->device);
    CALL(driver, cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
         context->device);
    CALL(driver, cuDeviceGetAttribute, &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
         context->device);
    context->target = choose_target(major, minor);
    if (context->target == NULL)
        return no_target(name, major, minor);
    CALL(driver, cuDriverGetVersion, &version);
    if (version < context->target->cuda)
        return fail(FUSEDOPT_ERROR_DRIVER,
                    "the NVIDIA driver is too old: it is for CUDA %d.%d, and the code for %s needs "
                    "that of CUDA %d.%d or newer",
                    version / 1000, version % 1000 / 10, context->target->name,
                    context->target->cuda / 1000, context->target->cuda % 1000 / 10);
    return FUSEDOPT_OK;
}

static fusedopt_status find_device(fusedopt_context *context, int device)
{
    int count = 0;
    CALL(&context->driver, cuDeviceGetCount, &count);
    if (device < 0 || device >= count)
        return fail(FUSEDOPT_ERROR_DEVICE,
                    "there is no GPU number %d: the driver finds %d%s", device, count,
                    count > 0 ? ", counted from 0" : "; does CUDA_VISIBLE_DEVICES hide one?");
    CALL(&context->driver, cuDeviceGet, &context->device, device);
    return find_target(context);
}

static fusedopt_status make_resources(fusedopt_context *context)
{
    const double constants[N_CONSTANTS] = {
        [NEUTRAL_CONTROL] = 1.0, [ONE] = 1.0, [CLIP_CONTROL] = 1.0};
    context->memory.driver = &context->driver;
    context->modules = calloc(library_image_count, sizeof *context->modules);
    context->functions = calloc(library_kernel_count, sizeof *context->functions);
    if (context->modules == NULL || context->functions == NULL)
        return fail(FUSEDOPT_ERROR_MEMORY, "no host memory is left");
    CALL(&context->driver, cuMemAlloc, &context->constants, sizeof constants);
    CALL(&context->driver, cuMemcpyHtoD, context->constants, constants, sizeof constants);
    CALL(&context->driver, cuEventCreate, &context->latest, CU_EVENT_DISABLE_TIMING);
    /* A copy of pageable memory may return before the device has it, and a stream that is not
     * blocking does not wait for the default stream: the first step waits for this event. */
    CALL(&context->driver, cuEventRecord, context->latest, NULL);
    return FUSEDOPT_OK;
}

static void free_resources(fusedopt_context *context)
{
    const struct driver *driver = &context->driver;
    if (context->latest != NULL) {
        driver->cuEventSynchronize(context->latest);
        driver->cuEventDestroy(context->latest);
    }
    free_staged(&context->memory, &context->rows);
    free_staged(&context->memory, &context->tables);
    free_staged(&context->memory, &context->chunks);
    free_staged(&context->memory, &context->norm_chunks);
    free_retired(&context->memory);
    if (context->partials != 0)
        driver->cuMemFree(context->partials);
    if (context->constants != 0)
        driver->cuMemFree(context->constants);
    for (size_t i = 0; context->modules != NULL && i < library_image_count; i++)
        if (context->modules[i] != NULL)
            driver->cuModuleUnload(context->modules[i]);
}

/* With the primary context retained; leaves nothing behind on an error. */
static fusedopt_status make_in_primary(fusedopt_context *context)
{
    TRY(enter(context));
    fusedopt_status status = make_resources(context);
    if (status == FUSEDOPT_OK) {
        status = leave(context);
        if (status != FUSEDOPT_OK)
            free_resources(context);
        return status;
    }
    CUcontext ours;
    free_resources(context);
    context->driver.cuCtxPopCurrent(&ours);
    return status;
}

static fusedopt_status make(fusedopt_context *context, int device)
{
    TRY(find_device(context, device));
    CALL(&context->driver, cuDevicePrimaryCtxRetain, &context->primary, context->device);
    const fusedopt_status status = make_in_primary(context);
    if (status != FUSEDOPT_OK)
        context->driver.cuDevicePrimaryCtxRelease(context->device);
    return status;
}

static void free_host(fusedopt_context *context)
{
    free_plan(&context->plan);
    free(context->modules);
    free(context->functions);
    free(context);
}

fusedopt_status fusedopt_init(fusedopt_context **out, int device)
{
    if (out == NULL)
        return fail(FUSEDOPT_ERROR_NULL, "out is null: pass the address of a pointer");
    *out = NULL;
    fusedopt_context *context = calloc(1, sizeof *context);
    if (context == NULL)
        return fail(FUSEDOPT_ERROR_MEMORY, "no host memory is left");
    fusedopt_status status = driver_load(&context->driver);
    if (status == FUSEDOPT_OK) {
        status = make(context, device);
        if (status != FUSEDOPT_OK)
            driver_unload(&context->driver);
    }
    if (status != FUSEDOPT_OK) {
        free_host(context);
        return status;
    }
    *out = context;
    return FUSEDOPT_OK;
}

void fusedopt_destroy(fusedopt_context *context)
{
    if (context == NULL)
        return;
    /* After an error of the driver that ends the process's context there is nothing left to free. */
    if (context->driver.cuCtxPushCurrent(context->primary) == CUDA_SUCCESS) {
        CUcontext ours;
        free_resources(context);
        context->driver.cuCtxPopCurrent(&ours);
    }
    context->driver.cuDevicePrimaryCtxRelease(context->device);
    driver_unload(&context->driver);
    free_host(context);
}

fusedopt_status load_kernel(fusedopt_context *context, const struct kernel *kernel,
                            CUfunction *function)
{
    const size_t index = (size_t)(kernel - library_kernels);
    CUmodule *module = &context->modules[kernel->image];
    if (*module == NULL)
        CALL(&context->driver, cuModuleLoadData, module, kernel->variant.image);
    if (context->functions[index] == NULL)
        CALL(&context->driver, cuModuleGetFunction, &context->functions[index], *module,
             kernel->variant.kernel);
    *function = context->functions[index];
    return FUSEDOPT_OK;
}

const char *fusedopt_version(void)
{
    return library_version;
}

size_t fusedopt_manifest_count(void)
{
    return library_kernel_count;
}

const fusedopt_variant *fusedopt_manifest(size_t i)
{
    return i < library_kernel_count ? &library_kernels[i].variant : NULL;
}
