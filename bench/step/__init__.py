"""The optimizer step against others: ``python -m fusedopt bench``.

Every contender takes two steps from one random start and is compared with float64 before a time
of its is taken; then all are timed in turn. A result is one JSON file and its pictures,
``<device>-<commit>.json``, ``-bars.png``, ``-roofline.png`` and, where that part was run,
``-sharded.png``; after the commit comes ``-full`` or ``-quick`` for those sets, and
``-partial-<time>`` where not all of a set was asked for. The JSON, with null for what was not
taken:

========== =========================================================================================
schema     1
kind       "bench"
measurement whether the figures mean anything: false with ``--quick``
note       what a reader has to know first, or ""
environment see ``bench.harness.environment``
settings   what was asked for; "parts", "set" (core, full, quick or cpu), "partial" (whether
           only some of the set), "device", "rounds", ...
copy       {"gbps": {"median", "p10", "p90"}, "bytes", "by_case": {case: GB/s}}: a device copy, read
           and written bytes both counted, taken again before each case
missing    [{"contender", "reason"}]: not installed, or failed on import
rows       one for each case, rule, types, contender, clip and scaler: see below
host       [{"rule", "contender", "tensors", "gradients", "microseconds", "launches",
           "ratio_to_torch_fused", "ratio_to_ours"}]: time of step() on the host without the launch;
           "gradients" are at the addresses of the step before ("same") or not ("moved"); ratio of
           this contender's time to torch's fused one (null where there is none), and to ours
sharded    [{"contender", "placement", "tensors", "first_us", "later_us", "launches", "reason"}]:
           host time of clipping and an AdamW step over DTensors, in microseconds a parameter, of
           the first call and of later ones, without launch and collective
first_step [{"contender", "rule", "types", "seconds", "variants_compiled", "reason"}]: of a fresh
           process with empty caches of Triton and Inductor
per_sample the result of ``bench.per_sample``
training   [{"contender", "tokens_per_second", "step_ms", "optimizer_ms", "share", "ratio",
           "ratio_quartiles"}]: ratio of the step's time to ours, share of it that is clipping and
           update
failed     steps of ours that differ from float64, and parts that went wrong: exit status 1.
           Others' steps that differ are rows of status "failed" alone
========== =========================================================================================

A row:

=================== ================================================================================
case                name in ``models.CASES``; "tensors" and "parameters" are its counts
rule, types         names in ``rules.RULES`` and ``codecs.CODECS``
contender           "fusedopt", "torch-for-loop", "torch-foreach", "torch-fused", "torch-compiled",
                    "optimi", "torchao", "heavyball", "bitsandbytes"
clip, scaler        whether the gradient norm is clipped, and a loss scale divided out
                    (by torch's GradScaler, whose search for an overflow is part of the time)
status              "measured", "failed", "skipped" or "does not fit", and "reason"
device_ms           {"median", "p10", "p90"} of the device; on a CPU wall time
host_ms             until step() returns, on a device that has nothing else to do
launches            kernels in one profiled step, and "copies"; null on a CPU
bytes_per_parameter what the contender's operations read and write: ``bytes_moved``
gbps                of those bytes; "percent_of_copy" of the copy that was measured before the case
extra_peak_bytes    allocated in a step, beyond what was before; null on a CPU
error               {"ulps", "relative", "bound_ulps"} against float64, in units of the stored type
ratio_to_ours       time over ours at the same clip and scaler: the median within a round of both;
                    "ratio_quartiles" besides
=================== ================================================================================
"""

# What needs a quiet GPU first, for a run may be cut short.
PARTS = ("step", "training", "first-step", "host", "sharded", "per-sample")
OURS = "fusedopt"
SCHEMA = 1
