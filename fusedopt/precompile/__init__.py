"""Fill a Triton cache ahead of time: the parts of ``python -m fusedopt precompile``.

The key of a cache entry is what Triton's launcher makes of the arguments of a launch, so that no
list of variants is kept here. Optimizers take real steps on small tensors of the CPU
(``cases``, ``per_sample``) under a fake driver of the GPU (``fake_driver``): the launcher
compiles, and nothing is launched.
"""
