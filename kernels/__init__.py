"""Triton kernels of fusedopt, imported as ``fusedopt.kernels``.

The directory stands at the top of the repository and is linked into the package, so that the
name resolves with and without an install; it is never installed as a top-level package.
"""
