/* GPUs that the library has code for, and GPUs that it has none for. */
#include <stdlib.h>
#include <string.h>

#include "expect.h"
#include "fixture.h"
#include "standin.h"

/* Which capabilities the code runs on, by the suffix of its name. */
static int has_code(int capability)
{
    for (size_t i = 0; i < fusedopt_manifest_count(); i++) {
        const char *machine = fusedopt_manifest(i)->machine;
        const int own = atoi(machine + 3), exact = strchr(machine, 'a') != NULL;
        if (own == capability || (!exact && own / 10 == capability / 10 && own <= capability))
            return 1;
    }
    return 0;
}

static void check_architectures(void)
{
    static const int capabilities[] = {70, 75, 80, 86, 87, 89, 90, 91, 100, 101, 103, 120, 121};
    for (size_t i = 0; i < sizeof capabilities / sizeof *capabilities; i++) {
        fusedopt_context *made;
        char rebuild[64], capability[16];
        snprintf(rebuild, sizeof rebuild, ";cuda:%d\"", capabilities[i]);
        snprintf(capability, sizeof capability, "%d.%d", capabilities[i] / 10, capabilities[i] % 10);
        standin_set_gpu(1, capabilities[i], 13010);
        const fusedopt_status status = fusedopt_init(&made, 0);
        if (has_code(capabilities[i])) {
            EXPECT(status == FUSEDOPT_OK, "%s: %s", capability, fusedopt_last_error());
            /* The stand-in refuses code that would not run. */
            start_again();
            EXPECT(fusedopt_adamw_step(made, &set, 1, &group, 1, NULL, NULL) == FUSEDOPT_OK, "%s",
                   fusedopt_last_error());
            fusedopt_destroy(made);
        } else {
            expect_failure(status, FUSEDOPT_ERROR_ARCHITECTURE, "Stand-in GPU", __LINE__);
            expect_failure(status, FUSEDOPT_ERROR_ARCHITECTURE, capability, __LINE__);
            expect_failure(status, FUSEDOPT_ERROR_ARCHITECTURE, rebuild, __LINE__);
            expect_failure(status, FUSEDOPT_ERROR_ARCHITECTURE, "-DFUSEDOPT_TARGETS=\"cuda:",
                           __LINE__);
        }
    }
    standin_reset();
}

int main(void)
{
    open_fixture();
    check_architectures();
    return close_fixture(0);
}
