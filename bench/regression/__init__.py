"""Checks for continuous integration that speed has not been lost: ``python -m bench.regression``.

They compare with what is committed in ``bench/baselines``, by ratios within one run and by counts,
never by times: the machine that runs them is another each time, and shared.
"""
