/* Devices, contexts and modules of the stand-in driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin_internal.h"

static int primary; /* its address is the context */

EXPORT cuModuleLoadData(CUmodule *module, const void *image)
{
    ENTER_IN_CONTEXT();
    for (size_t i = 0; i < fusedopt_manifest_count(); i++) {
        const fusedopt_variant *variant = fusedopt_manifest(i);
        if (variant->image != image)
            continue;
        char *suffix;
        const int machine = (int)strtol(variant->machine + 3, &suffix, 10);
        const int later = *suffix == '\0' && machine / 10 == state.capability / 10;
        if (machine != state.capability && !(later && machine < state.capability))
            return CUDA_ERROR_NO_BINARY_FOR_GPU;
        *module = calloc(1, sizeof **module);
        (*module)->image = image;
        state.live++;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_IMAGE;
}

EXPORT cuModuleUnload(CUmodule module)
{
    ENTER_IN_CONTEXT();
    run_everything();
    free(module);
    state.live--;
    return CUDA_SUCCESS;
}

/* Functions live as long as the process, as handles to them do in a driver. */
static void free_kernels(void)
{
    while (state.kernels != NULL) {
        struct CUfunc_st *kernel = state.kernels;
        state.kernels = kernel->next;
        free(kernel);
    }
}

EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    ENTER_IN_CONTEXT();
    for (size_t i = 0; i < fusedopt_manifest_count(); i++) {
        const fusedopt_variant *variant = fusedopt_manifest(i);
        if (variant->image != module->image || strcmp(variant->kernel, name) != 0)
            continue;
        if (state.kernels == NULL)
            atexit(free_kernels);
        *function = malloc(sizeof **function);
        **function = (struct CUfunc_st){variant, state.kernels};
        state.kernels = *function;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

EXPORT cuInit(unsigned flags)
{
    ENTER();
    (void)flags;
    return state.gpus > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT cuDriverGetVersion(int *version)
{
    ENTER();
    *version = state.cuda;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetCount(int *count)
{
    ENTER();
    *count = state.gpus;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGet(CUdevice *device, int ordinal)
{
    ENTER();
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetName(char *name, int length, CUdevice device)
{
    ENTER();
    (void)device;
    snprintf(name, (size_t)length, "Stand-in GPU");
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    ENTER();
    (void)device;
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? state.capability / 10
                                                                       : state.capability % 10;
    return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    ENTER();
    (void)device;
    state.retained++;
    *context = (CUcontext)(void *)&primary;
    return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRelease(CUdevice device)
{
    ENTER();
    (void)device;
    state.retained--;
    return CUDA_SUCCESS;
}

EXPORT cuCtxPushCurrent(CUcontext context)
{
    ENTER();
    if (state.depth == MOST_CONTEXTS)
        return CUDA_ERROR_OUT_OF_MEMORY;
    state.stack[state.depth++] = context;
    return CUDA_SUCCESS;
}

EXPORT cuCtxPopCurrent(CUcontext *context)
{
    ENTER();
    if (state.depth == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    *context = state.stack[--state.depth];
    return CUDA_SUCCESS;
}

EXPORT cuGetErrorName(CUresult error, const char **name)
{
    ENTER();
    *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == CUDA_ERROR_UNKNOWN     ? "CUDA_ERROR_UNKNOWN"
                                              : NULL;
    return *name != NULL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT cuGetErrorString(CUresult error, const char **text)
{
    ENTER();
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "some error";
    return CUDA_SUCCESS;
}
