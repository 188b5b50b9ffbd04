"""Kernels that reduce per-sample gradients, inside the weight gradient or from memory."""
