#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[2048];

fusedopt_status fail(fusedopt_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

void add_to_message(const char *format, ...)
{
    const size_t length = strlen(message);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + length, sizeof message - length, format, arguments);
    va_end(arguments);
}

const char *fusedopt_last_error(void)
{
    return message;
}

const char *fusedopt_status_name(fusedopt_status status)
{
    switch (status) {
    case FUSEDOPT_OK:
        return "FUSEDOPT_OK";
    case FUSEDOPT_ERROR_NULL:
        return "FUSEDOPT_ERROR_NULL";
    case FUSEDOPT_ERROR_SIZE:
        return "FUSEDOPT_ERROR_SIZE";
    case FUSEDOPT_ERROR_VALUE:
        return "FUSEDOPT_ERROR_VALUE";
    case FUSEDOPT_ERROR_TYPE:
        return "FUSEDOPT_ERROR_TYPE";
    case FUSEDOPT_ERROR_DRIVER:
        return "FUSEDOPT_ERROR_DRIVER";
    case FUSEDOPT_ERROR_DEVICE:
        return "FUSEDOPT_ERROR_DEVICE";
    case FUSEDOPT_ERROR_ARCHITECTURE:
        return "FUSEDOPT_ERROR_ARCHITECTURE";
    case FUSEDOPT_ERROR_MEMORY:
        return "FUSEDOPT_ERROR_MEMORY";
    case FUSEDOPT_ERROR_LAUNCH:
        return "FUSEDOPT_ERROR_LAUNCH";
    }
    return "unknown status";
}
