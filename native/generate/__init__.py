"""Kernels compiled ahead of time into a library for programs in C and C++.

``table`` lists what the library offers, ``images`` compiles it, ``trace`` states the host's half of
a rule in C, and ``sources`` writes what ``CMakeLists.txt`` compiles. In the build step::

    python -m native.generate --target cuda:90 --output DIR --jobs N

The interface and the host's code are in ``native/``.
"""
