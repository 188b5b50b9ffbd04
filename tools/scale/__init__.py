"""What a step costs on thousands of GPUs, counted on paper: ``python -m tools.scale [--write]``.

Bytes are those of the kernels' tables, which ``make codegen`` holds the machine code to; times of a
GPU and of the host are of kept results (``measured``); links are assumptions, each with its source
(``cluster``). ``costs`` puts them together, ``page`` writes docs/scale.md and ``picture`` draws.
"""
