/* Status and message of a failure. */
#ifndef FUSEDOPT_ERROR_H
#define FUSEDOPT_ERROR_H

#include "fusedopt.h"

#if defined(__GNUC__)
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

/* Note what went wrong for fusedopt_last_error, and return the status. */
fusedopt_status fail(fusedopt_status status, const char *format, ...) PRINTF_LIKE(2, 3);

/* Append to the message of the failure that was noted last. */
void add_to_message(const char *format, ...) PRINTF_LIKE(1, 2);

/* Leave the function with a status that is not FUSEDOPT_OK. */
#define TRY(expression)                                                                            \
    do {                                                                                           \
        const fusedopt_status try_status = (expression);                                           \
        if (try_status != FUSEDOPT_OK)                                                             \
            return try_status;                                                                     \
    } while (0)

#endif
