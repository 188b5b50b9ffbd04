/* What the stand-in driver knows, and how a test controls it. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin_internal.h"

struct standin state;

static int from_environment(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

void standin_set_gpu(int count, int capability, int cuda)
{
    state.gpus = count;
    state.capability = capability;
    state.cuda = cuda;
    state.known = 1;
}

static void read_environment(void)
{
    if (!state.known)
        standin_set_gpu(from_environment("STANDIN_GPUS", 1),
                        from_environment("STANDIN_CAPABILITY", 90),
                        from_environment("STANDIN_CUDA", 13000));
}

void standin_reset(void)
{
    memset(state.functions, 0, sizeof state.functions);
    state.function_count = 0;
    state.fault[0] = '\0';
    state.known = 0;
}

static size_t find_function(const char *name)
{
    size_t i = 0;
    while (i < state.function_count && strcmp(state.functions[i].name, name) != 0)
        i++;
    if (i == state.function_count && i < MOST_FUNCTIONS - 1)
        state.functions[state.function_count++].name = name;
    return i;
}

void standin_fail(const char *function, int call, CUresult result)
{
    const size_t i = find_function(function);
    state.functions[i].fail_at = state.functions[i].calls + call;
    state.functions[i].result = result;
}

int standin_calls(const char *function)
{
    return state.functions[find_function(function)].calls;
}

int standin_live(void)
{
    return state.live + state.retained + state.depth;
}

const char *standin_fault(void)
{
    return state.fault;
}

void fault(const char *format, ...)
{
    if (state.fault[0] != '\0')
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(state.fault, sizeof state.fault, format, arguments);
    va_end(arguments);
}

CUresult note_call(const char *function)
{
    read_environment();
    const size_t i = find_function(function);
    state.functions[i].calls++;
    return state.functions[i].calls == state.functions[i].fail_at ? state.functions[i].result
                                                                  : CUDA_SUCCESS;
}

void *at_device(CUdeviceptr address, size_t bytes)
{
    const uintptr_t wanted = (uintptr_t)(address & ~MARK);
    if (address & MARK)
        for (const struct allocation *a = state.allocations; a != NULL; a = a->next)
            if (wanted >= (uintptr_t)a->host && wanted - (uintptr_t)a->host <= a->bytes &&
                bytes <= a->bytes - (wanted - (uintptr_t)a->host))
                return a->host + (wanted - (uintptr_t)a->host);
    fault("%zu bytes at %llx are not device memory", bytes, (unsigned long long)address);
    return NULL;
}
