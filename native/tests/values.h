/* Numbers as memory holds them, by fusedopt_type. */
#ifndef FUSEDOPT_VALUES_H
#define FUSEDOPT_VALUES_H

#include "fusedopt.h"

size_t value_bytes(fusedopt_type type);

/* Element i of an array. Storing rounds to nearest, ties to even. */
double get_value(fusedopt_type type, const void *array, size_t i);
void set_value(fusedopt_type type, void *array, size_t i, double value);

/* Distance from a number to the next larger one of its type, at its magnitude. */
double unit_in_last_place(fusedopt_type type, double value);

#endif
