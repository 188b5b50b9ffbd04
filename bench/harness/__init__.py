"""What the benchmarks share: how time is taken, where it was taken, and how results are kept.

Nothing here knows what is measured. ``output`` and ``places`` import neither torch nor rich.
"""
