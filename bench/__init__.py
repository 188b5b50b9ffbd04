"""Benchmarks and the checks of speed; part of the checkout, and of no installation.

``step`` and ``per_sample`` measure, ``tune`` chooses, ``regression`` judges, ``gpu`` runs all that
needs a GPU; ``harness`` is what they share. The files beside them are suites of pytest-benchmark.
"""
