"""Which block and number of threads is fastest on this GPU: ``python -m bench.tune``.

Nothing is tried out when an optimizer runs, since a kernel that updates in place would apply the
update once for each trial. So it is done here, once for an architecture, and what is found is
written to ``kernels/tuned.json``, which launches read.
"""
