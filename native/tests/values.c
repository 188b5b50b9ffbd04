#include "values.h"

#include <float.h>
#include <math.h>
#include <string.h>

size_t value_bytes(fusedopt_type type)
{
    return type == FUSEDOPT_FLOAT64 ? 8 : type == FUSEDOPT_FLOAT32 ? 4 : 2;
}

/* Bits of the fraction, and the exponent of the smallest normal number. */
static int fraction_bits(fusedopt_type type)
{
    return type == FUSEDOPT_FLOAT64 ? 52 : type == FUSEDOPT_FLOAT32 ? 23
                                       : type == FUSEDOPT_FLOAT16   ? 10
                                                                    : 7;
}

static int smallest_exponent(fusedopt_type type)
{
    return type == FUSEDOPT_FLOAT64 ? -1022 : type == FUSEDOPT_FLOAT16 ? -14 : -126;
}

double unit_in_last_place(fusedopt_type type, double value)
{
    int exponent = smallest_exponent(type) + 1;
    if (value != 0.0 && isfinite(value)) {
        int own;
        frexp(value, &own);
        exponent = own > exponent ? own : exponent;
    }
    return ldexp(1.0, exponent - 1 - fraction_bits(type));
}

/* Round to a 2-byte type; what is beyond its largest number becomes infinite. */
static double rounded(fusedopt_type type, double value)
{
    if (!isfinite(value))
        return value;
    const double unit = unit_in_last_place(type, value);
    const double result = nearbyint(value / unit) * unit;
    const double largest = type == FUSEDOPT_FLOAT16 ? 65504.0 : ldexp(255.0, 120);
    return fabs(result) > largest ? copysign(INFINITY, value) : result;
}

static uint16_t half_bits(double value)
{
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const double x = fabs(rounded(FUSEDOPT_FLOAT16, value));
    if (isnan(value))
        return 0x7e00;
    if (isinf(x))
        return sign | 0x7c00;
    if (x < ldexp(1.0, -14))
        return sign | (uint16_t)ldexp(x, 24);
    int exponent;
    const double fraction = frexp(x, &exponent);
    return sign | (uint16_t)((exponent + 14) << 10 | ((int)ldexp(fraction, 11) & 0x3ff));
}

static double half_value(uint16_t bits)
{
    const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? ldexp(fraction, -24)
                                             : ldexp(fraction + 1024, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

double get_value(fusedopt_type type, const void *array, size_t i)
{
    const unsigned char *at = (const unsigned char *)array + i * value_bytes(type);
    uint16_t bits;
    if (type == FUSEDOPT_FLOAT64 || type == FUSEDOPT_FLOAT32) {
        double wide;
        float single;
        if (type == FUSEDOPT_FLOAT64)
            return memcpy(&wide, at, sizeof wide), wide;
        return memcpy(&single, at, sizeof single), (double)single;
    }
    memcpy(&bits, at, sizeof bits);
    if (type == FUSEDOPT_FLOAT16)
        return half_value(bits);
    const uint32_t pattern = (uint32_t)bits << 16;
    float single;
    return memcpy(&single, &pattern, sizeof single), (double)single;
}

void set_value(fusedopt_type type, void *array, size_t i, double value)
{
    unsigned char *at = (unsigned char *)array + i * value_bytes(type);
    const float single = (float)(type == FUSEDOPT_BFLOAT16 ? rounded(type, value) : value);
    if (type == FUSEDOPT_FLOAT64) {
        memcpy(at, &value, sizeof value);
    } else if (type == FUSEDOPT_FLOAT32) {
        memcpy(at, &single, sizeof single);
    } else if (type == FUSEDOPT_FLOAT16) {
        const uint16_t bits = half_bits(value);
        memcpy(at, &bits, sizeof bits);
    } else {
        uint32_t pattern;
        memcpy(&pattern, &single, sizeof pattern);
        /* A nan whose fraction is in the lower half must not become infinite. */
        const uint16_t bits = (uint16_t)(pattern >> 16 | (isnan(value) ? 0x40 : 0));
        memcpy(at, &bits, sizeof bits);
    }
}
