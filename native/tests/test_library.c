/* The library where there is no driver: symbols, manifest, messages. */
#include <stdlib.h>
#include <string.h>

#include "expect.h"
#include "fusedopt.h"

int failures = 0;

static void check_names(void)
{
    EXPECT(strcmp(fusedopt_version(), EXPECTED_VERSION) == 0, "version %s", fusedopt_version());
    EXPECT(strcmp(fusedopt_last_error(), "") == 0, "an error before any call");
    for (int status = FUSEDOPT_OK; status <= FUSEDOPT_ERROR_LAUNCH; status++) {
        const char *name = fusedopt_status_name((fusedopt_status)status);
        EXPECT(strncmp(name, "FUSEDOPT_", 9) == 0, "status %d is %s", status, name);
    }
    EXPECT(strcmp(fusedopt_status_name((fusedopt_status)99), "unknown status") == 0, "status 99");
}

static void check_variant(const fusedopt_variant *variant)
{
    static const unsigned char elf[] = {0x7f, 'E', 'L', 'F'};
    EXPECT(variant->image_bytes > 64 && memcmp(variant->image, elf, sizeof elf) == 0,
           "%s is no cubin", variant->name);
    EXPECT(strncmp(variant->machine, "sm_", 3) == 0, "%s is for %s", variant->name,
           variant->machine);
    EXPECT(strncmp(variant->name, variant->target, strlen(variant->target)) == 0, "%s is for %s",
           variant->name, variant->target);
    EXPECT(variant->threads >= 32 && variant->threads % 32 == 0 && variant->registers > 0,
           "%s has %d threads of %d registers", variant->name, variant->threads,
           variant->registers);
    if (strcmp(variant->kernel, "update_tensors") == 0)
        EXPECT(variant->rule[0] != '\0' && variant->param_type != FUSEDOPT_NO_TYPE &&
                   variant->grad_type != FUSEDOPT_NO_TYPE && variant->block > 0,
               "%s lacks a rule, types or a block", variant->name);
}

/* Every entry point, with and without alignment, for every target. */
static void check_manifest(void)
{
    static const char *const wanted[] = {
        "Adam fp32", "Adam (amsgrad) bf16 unaligned", "SGD fp16", "SGD (momentum) fp32",
        "SGD (momentum, nesterov) fp64", "RMSprop fp32", "RMSprop (centered) bf16",
        "RMSprop (momentum) fp32 unaligned", "RMSprop (centered, momentum) fp32",
        "clip_factor (2)", "clip_factor (inf)", "partial_norms (2) bf16", "load_scaler",
    };
    const size_t count = fusedopt_manifest_count();
    EXPECT(fusedopt_manifest(count) == NULL, "a variant beyond the last");
    for (size_t i = 0; i < count; i++) {
        check_variant(fusedopt_manifest(i));
        for (size_t k = 0; k < i; k++)
            EXPECT(strcmp(fusedopt_manifest(i)->name, fusedopt_manifest(k)->name) != 0,
                   "two variants named %s", fusedopt_manifest(i)->name);
    }
    for (size_t w = 0; w < sizeof wanted / sizeof *wanted; w++) {
        size_t found = 0, targets = 0;
        for (size_t i = 0; i < count; i++) {
            const fusedopt_variant *variant = fusedopt_manifest(i);
            const char *name = variant->name + strlen(variant->target) + 1;
            found += strcmp(name, wanted[w]) == 0;
            targets += strcmp(name, "load_scaler") == 0;
        }
        EXPECT(found == targets && found > 0, "%zu kernels %s for %zu targets", found, wanted[w],
               targets);
    }
}

static void check_missing_driver(void)
{
    fusedopt_context *context = (fusedopt_context *)&failures;
    EXPECT(fusedopt_init(NULL, 0) == FUSEDOPT_ERROR_NULL, "%s", fusedopt_last_error());
    setenv("FUSEDOPT_DRIVER", "/nowhere/libcuda.so.1", 1);
    EXPECT(fusedopt_init(&context, 0) == FUSEDOPT_ERROR_DRIVER, "%s", fusedopt_last_error());
    EXPECT(context == NULL, "a context without a driver");
    EXPECT(strstr(fusedopt_last_error(), "no NVIDIA driver") != NULL &&
               strstr(fusedopt_last_error(), "/nowhere/libcuda.so.1") != NULL &&
               strstr(fusedopt_last_error(), "FUSEDOPT_DRIVER") != NULL,
           "%s", fusedopt_last_error());
    /* A library that is there and is no driver. */
    setenv("FUSEDOPT_DRIVER", "libm.so.6", 1);
    EXPECT(fusedopt_init(&context, 0) == FUSEDOPT_ERROR_DRIVER, "%s", fusedopt_last_error());
    EXPECT(strstr(fusedopt_last_error(), "too old") != NULL &&
               strstr(fusedopt_last_error(), "cuInit") != NULL,
           "%s", fusedopt_last_error());
    fusedopt_destroy(NULL);
    const fusedopt_adamw group = {.lr = 0.1, .step = 1};
    EXPECT(fusedopt_adamw_step(NULL, NULL, 0, &group, 1, NULL, NULL) == FUSEDOPT_ERROR_NULL, "%s",
           fusedopt_last_error());
    EXPECT(strstr(fusedopt_last_error(), "context") != NULL, "%s", fusedopt_last_error());
}

int main(void)
{
    check_names();
    check_manifest();
    check_missing_driver();
    printf("%zu variants, %d failures\n", fusedopt_manifest_count(), failures);
    return failures != 0;
}
