/* What a test needs of a driver, the real one or the stand-in. */
#ifndef FUSEDOPT_TEST_DEVICE_H
#define FUSEDOPT_TEST_DEVICE_H

#include <cuda.h>

/* Load the driver that libfusedopt loads, and make a context current; 0 where there is no GPU. */
int device_open(void);

/* These end the program where the driver fails. */
CUdeviceptr device_new(size_t bytes);
void device_free(CUdeviceptr address);
void device_write(CUdeviceptr to, const void *from, size_t bytes);
void device_read(void *to, CUdeviceptr from, size_t bytes);
void device_wait(void);

/* What the stand-in has to complain about; "" on a GPU. */
const char *device_fault(void);

#endif
