"""Experiments on whole trainings: ``python -m experiments [NAME ...] [--reduced]``.

An experiment is a module with ``TITLE``; ``FULL`` and ``REDUCED``, its settings; ``run(settings,
progress)``, which returns all its figures as plain values; ``claims(result)``, what they must show,
as (text, measured, bound, holds); and ``draw(result)``, a picture of them.
"""

NAMES = (
    "digits",
    "ablations",
    "order",
    "noise_scale",
    "char_gpt",
    "svag",
    "temperature",
    "denominator",
    "bias_corrections",
    "square_root",
    "noise_signal",
    "state_codes",
    "every",
)
